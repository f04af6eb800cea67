"""How fast the fused merge is, against PyTorch: ``python benchmarks/kernel_vs_ref.py``.

Nothing is timed before it is right (gate.py). What is timed (benchmarks/README.md says it at length): one call of
``bdm_merge`` on real per-head keys, head averaging and key refinement included; with ``forward+backward`` also the gradients
of x and of the refinement's two weights. Every implementation gets the same tensors, all are timed in turns in one run, and
so is a plain copy, whose bandwidth makes the floor: the time of moving the operator's bytes once.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch

    import fpet_kernels
except ImportError as missing:
    raise SystemExit(f"fpet_kernels is not installed here ({missing}): make bench, or pip install -e '.[bench]'") from missing

import cases
import formulations
import gate
import timing
from cases import CASES, Case, Problem
from fpet_kernels import backends, bdm_merge

Row = dict[str, Any]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
MODES = ("forward", "forward+backward")
BACKWARD = "backward"  # the fused backward by itself, from a forward's results; by default on a GPU only
BATCHES = (1, 16, 64, 256)
DEFAULT_CASES, DEFAULT_BATCHES = ("vitb16_224",), (1, 64)
DEFAULT_BUDGET, QUICK_BUDGET = 48.0, 6.0
RESULTS = Path(__file__).parent / "results"
REFERENCE, PAPER, PAPER_COMPILED, BEST = "reference", "paper", "paper_compiled", "best"
BASELINES = (REFERENCE, PAPER, PAPER_COMPILED, BEST)
LABELS = {
    REFERENCE: "fpet_kernels.reference, eager",
    PAPER: "paper's formulation, eager",
    PAPER_COMPILED: "paper's formulation, compiled",
}


def label(name: str) -> str:
    """What a table calls an implementation."""
    if name.startswith("indexed_"):
        return f"indexed PyTorch ({name.removeprefix('indexed_')}), compiled"
    return LABELS.get(name, f"bdm_merge, {name}")


@dataclass(frozen=True)
class Setting:
    """One line of the work list: a problem, and how much of it is differentiated."""

    case: Case
    batch: int
    dtype: str
    mode: str

    @property
    def backward(self) -> bool:
        """Whether gradients are part of it."""
        return self.mode != "forward"

    def bytes_moved(self, problem: Problem) -> int:
        """What must be read or written, each once."""
        both = problem.bytes_moved(self.backward)
        return both - problem.bytes_moved(False) if self.mode == BACKWARD else both

    def __str__(self) -> str:
        return f"{self.case.name}, batch {self.batch}, {self.dtype}, {self.mode}"


@dataclass
class Implementation:
    """Something to time: ``call`` returns (tokens, size, match, …) of the problem it was made for."""

    name: str
    call: Callable[[], tuple]
    lost_tokens: int = 0
    errors: dict[str, float] = field(default_factory=dict)


# --- implementations -------------------------------------------------------------------------------------------------


def backend_calls(name: str, problem: Problem) -> tuple[Callable[[], tuple], Callable[[], tuple]]:
    """The call that is timed, and one for the gate that also returns the runner-up of every source."""
    case, refinement = problem.case, problem.refinement

    def merge() -> tuple:
        return bdm_merge(
            problem.x, problem.key, grid_size=case.grid, num_prefix_tokens=case.num_prefix_tokens, refinement=refinement,
            backend=name,
        )  # fmt: skip

    def with_second() -> tuple:
        if name == REFERENCE:
            second = gate.reference_answer(problem, backward=False).second
        else:
            with torch.no_grad():
                second = backends.forward_op(name)(
                    problem.x, problem.key, None, problem.w_down, problem.w_up, None, None, None, None, *case.grid,
                    case.num_prefix_tokens, 1.0, True,
                )[3]  # fmt: skip
        return (*merge(), second)

    return merge, with_second


def backward_alone(name: str, problem: Problem) -> Callable[[], gate.Answer]:
    """The backward's operator on the results of one forward; returns those with the gradients."""
    case, w_down, w_up = problem.case, problem.w_down, problem.w_up
    inputs = tuple(None if t is None else t.detach() for t in (problem.x, problem.key, None, w_down, w_up, None, None))
    task = (None, None, *case.grid, case.num_prefix_tokens, 1.0, True)
    results = backends.forward_op(name)(*inputs, *task)
    needs = (True, False, w_down is not None, False, False)

    def call() -> gate.Answer:
        found = backends.backward_op(name)(problem.grad_tokens, problem.grad_size, *inputs, *results, *task, *needs)
        return gate.Answer(*results[:4], found[:1] if w_down is None else (found[0], found[2], found[3]))

    return call


def step(call: Callable[[], tuple], problem: Problem, mode: str) -> Callable[[], object]:
    """What is timed: the call, and with ``forward+backward`` the gradients of everything learned."""
    if mode != "forward+backward":
        return call

    def both() -> object:
        tokens, size = call()[:2]
        return gate.gradients(tokens, size, problem)

    return both


def memory_needed(setting: Setting, name: str) -> int:
    """Bytes beyond the inputs, roughly and from above: dense N_A × N_B tensors, and copies of the tokens."""
    case, item = setting.case, DTYPES[setting.dtype].itemsize
    dense, copies = {PAPER: (8, 6), PAPER_COMPILED: (6, 6), REFERENCE: (14, 10)}.get(name, (0, 4))
    if name.startswith("indexed_"):
        dense, copies = 6, 6
    grow = 2 if setting.backward else 1
    num_a, num_b = case.split.a.numel(), case.split.b.numel()
    return setting.batch * max(item, 4) * grow * (dense * num_a * num_b + copies * case.num_tokens * case.dim)


def compiled(call: Callable[..., tuple]) -> Callable[..., tuple]:
    return torch.compile(call, fullgraph=True, dynamic=False)


class Bench:
    """Runs settings and collects rows; everything that went wrong is in ``failures``."""

    def __init__(self, options: argparse.Namespace, names: list[str], bar: Any) -> None:
        self.options, self.names, self.bar = options, names, bar
        self.device = options.device
        self.kinds = ("graph", "plain") if self.device.type == "cuda" else ("plain",)
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self._features: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None

    def say(self, text: str) -> None:
        self.bar.write(text)

    def features(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, qkv) of the case's crops in float32 on the CPU; kept until another case comes."""
        if self._features is None or self._features[0] != case.name:
            model = cases.seeded_vit(case).to(self.device)
            count = min(case.distinct, max(self.options.batch))
            images = cases.crops(cases.photograph(), count, case.image_size)
            found = [cases.features(model, image[None].to(self.device)) for image in images]
            self._features = (case.name, tuple(torch.cat(t).cpu() for t in zip(*found, strict=True)))  # type: ignore[assignment]
        assert self._features is not None
        return self._features[1]

    def run(self, setting: Setting) -> list[Row]:
        """All implementations of one setting: gate, warm-up, time, memory."""
        self.bar.set_description(f"{setting}: input")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # so that what is free counts as free
        case, dtype = setting.case, DTYPES[setting.dtype]
        inputs = 2 * setting.batch * (5 * case.num_tokens) * case.dim * dtype.itemsize
        if inputs > 0.8 * timing.available_bytes(self.device):
            self.left_out.append(f"{setting}: its input of {inputs / 2e9:.1f} GB does not fit")
            return []
        problem = cases.make_problem(
            case, self.features(case), setting.batch, dtype, self.device, refine=self.options.refinement,
            averaged_key=self.options.key == "averaged",
        )  # fmt: skip
        problem.requires_grad_(setting.backward)
        self.bar.update(1)
        with torch.set_grad_enabled(setting.backward):
            ready = self.prepare(setting, problem)
            return self.time(setting, problem, ready) if ready else []

    def prepare(self, setting: Setting, problem: Problem) -> list[Implementation]:
        """Every implementation that fits and is right, warm."""
        torch._dynamo.reset()
        examiner = gate.Examiner(problem, setting.backward)
        ready = []
        names = [*self.names, PAPER, PAPER_COMPILED, *(f"indexed_{v}" for v in formulations.BEST_VARIANTS)]
        if setting.mode == BACKWARD:
            names = [n for n in self.names if n != REFERENCE]
        for name in names:
            self.bar.set_description(f"{setting}: gate and warm-up of {name}")
            self.bar.update(1)
            if memory_needed(setting, name) > 0.8 * timing.available_bytes(self.device):
                self.left_out.append(f"{setting}: {label(name)} needs about {memory_needed(setting, name) / 1e9:.0f} GB")
                continue
            if name in self.names:
                found = self.admit_backend(name, problem, examiner, setting.mode)
            else:
                found = self.admit_baseline(name, problem, examiner)
            if found is not None:
                warm = step(found.call, problem, setting.mode)
                for _ in range(2):
                    warm()
                ready.append(found)
        return ready

    def admit_backend(self, name: str, problem: Problem, examiner: gate.Examiner, mode: str) -> Implementation | None:
        timed: Callable[[], tuple]
        try:
            if mode == BACKWARD:
                timed = backward_alone(name, problem)
                verdict = examiner.examine(timed(), timed())
            else:
                timed, examined = backend_calls(name, problem)
                verdict = gate.examine(examined, examiner)
        except Exception as error:  # one backend that breaks must not take the others' figures with it
            what = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.failures.append(f"BROKEN: backend {name!r} on {self.describe(problem)}: {what}")
            self.say(self.failures[-1])
            return None
        if not verdict.right:
            self.failures.append(f"WRONG: backend {name!r} on {self.describe(problem)}: {verdict.complaint()}")
            self.say(self.failures[-1] + ". No speed is reported for it.")
            return None
        return Implementation(name, timed, errors={f.what: f.error for f in verdict.findings})

    def admit_baseline(self, name: str, problem: Problem, examiner: gate.Examiner) -> Implementation | None:
        try:
            if name.startswith("indexed_"):
                function, args = formulations.Indexed(name.removeprefix("indexed_")).of(problem)
                function = compiled(function)
                verdict = gate.examine(lambda: function(*args), examiner, twice=False)
                if not verdict.right:
                    self.say(f"baseline {label(name)} is wrong here and left out: {verdict.complaint()}")
                    return None
                return Implementation(name, lambda: function(*args), errors={f.what: f.error for f in verdict.findings})
            function, args = formulations.paper_of(problem)
            if name == PAPER_COMPILED:
                function = compiled(function)
            with torch.no_grad() if not examiner.backward else torch.enable_grad():
                size = function(*args)[1]
            lost = problem.distinct * problem.case.num_tokens - size[: problem.distinct].double().sum().item()
            return Implementation(name, lambda: function(*args), lost_tokens=round(lost))
        except Exception as error:  # a compiler may be missing, or stumble: the others still count
            self.say(f"baseline {label(name)} does not run here: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            self.left_out.append(f"{self.describe(problem)}: {label(name)} does not run here")
            return None

    @staticmethod
    def describe(problem: Problem) -> str:
        return f"{problem.case.name}, batch {problem.batch}, {str(problem.x.dtype).removeprefix('torch.')}"

    def time(self, setting: Setting, problem: Problem, ready: list[Implementation]) -> list[Row]:
        calls = {i.name: step(i.call, problem, setting.mode) for i in ready}
        peaks = {}
        for name, call in calls.items():
            self.bar.set_description(f"{setting}: memory of {name}")
            peaks[name] = timing.peak_extra_bytes(call, self.device)
            self.bar.update(1)
        rows = []
        for kind in self.kinds:
            self.bar.set_description(f"{setting}: timing ({kind})")
            timed = self.captured(setting, calls) if kind == "graph" else calls
            shown = 0

            def tick(share: float) -> None:
                nonlocal shown
                ticks = round(share * TICKS)
                self.bar.update(ticks - shown)
                shown = ticks

            budget = self.options.budget / self.options.settings / len(self.kinds)
            samples, bandwidth = timing.measure(timed, self.device, budget, graph=kind == "graph", tick=tick)
            rows += self.rows(setting, problem, [i for i in ready if i.name in samples], kind, samples, bandwidth, peaks)
        return rows

    def captured(self, setting: Setting, calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """The calls as replays of CUDA graphs, without those that can't be captured."""
        replays = {}
        for name, call in calls.items():
            try:
                replays[name] = timing.capture(call)
            except RuntimeError as error:
                self.left_out.append(f"{setting}: {label(name)} as a CUDA graph: {str(error).splitlines()[0]}")
        return replays

    def rows(
        self,
        setting: Setting,
        problem: Problem,
        ready: list[Implementation],
        kind: str,
        samples: dict[str, timing.Samples],
        bandwidth: float,
        peaks: dict[str, int | None],
    ) -> list[Row]:
        seconds = {name: s.median for name, s in samples.items()}
        indexed = [name for name in seconds if name.startswith("indexed_")]
        if indexed:
            seconds[BEST] = min(seconds[name] for name in indexed)
        moved, batch = setting.bytes_moved(problem), setting.batch
        out = []
        for implementation in ready:
            name, sample = implementation.name, samples[implementation.name]
            peak, results = peaks[name], problem.result_bytes(setting.backward)
            out.append({
                "benchmark": "kernel_vs_ref", "implementation": name, "case": setting.case.name, "batch": batch,
                "dtype": setting.dtype, "mode": setting.mode, "device": self.device.type, "timing": kind,
                "key": self.options.key, "refinement": cases.HIDDEN if self.options.refinement else 0,
                "tokens": setting.case.num_tokens, "dim": setting.case.dim, "heads": setting.case.heads,
                "ms_per_image": sample.median / batch * 1e3,
                "ms_per_image_min": min(sample.seconds) / batch * 1e3,
                "ms_per_image_p10": sample.quantile(0.1) / batch * 1e3,
                "ms_per_image_p90": sample.quantile(0.9) / batch * 1e3,
                "rounds": len(sample.seconds), "calls_per_round": sample.calls,
                **{f"speedup_over_{b}": seconds[b] / sample.median if b in seconds else None
                   for b in BASELINES},
                "bytes_per_image": moved / batch, "gb_per_s": moved / sample.median / 1e9, "copy_gb_per_s": bandwidth / 1e9,
                "floor_ms_per_image": moved / bandwidth / batch * 1e3, "share_of_copy": moved / bandwidth / sample.median,
                "result_mb": results / 1e6, "peak_extra_mb": None if peak is None else max(0, peak - results) / 1e6,
                "lost_tokens": implementation.lost_tokens, "of_images": problem.distinct, "errors": implementation.errors,
            })  # fmt: skip
        return out


# --- tables and pictures ---------------------------------------------------------------------------------------------


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A figure with ``digits`` significant places, never in exponents; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}{unit}"


def group_key(row: Row) -> tuple:
    return tuple(row[k] for k in ("device", "case", "batch", "dtype", "mode", "timing", "key", "refinement", "malloc"))


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same setting together, the latest of each implementation."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(group_key(row), {})[row["implementation"]] = row
    return [list(g.values()) for g in groups.values()]


HEADINGS = ("ms/image", "× reference", "× paper", "× paper compiled", "× best PyTorch", "GB/s", "of copy", "extra MB")
OVER_FLOOR = "÷ floor"


def table(group: list[Row]) -> str:
    """One setting as text."""
    first = group[0]
    what = "strided per-head keys" if first["key"] == "heads" else "averaged keys"
    what += f", refinement h = {first['refinement']}" if first["refinement"] else ", no refinement"
    kind = "" if first["device"] == "cpu" else f", {first['timing']} timing, cold L2"
    lines = [
        f"{first['case']} · batch {first['batch']} · {first['dtype']} · {first['mode']} · {first['device']}{kind}",
        f"  N {first['tokens']}, D {first['dim']}, {what}; {first['bytes_per_image'] / 1e6:.2f} MB per image, "
        f"floor {number(first['floor_ms_per_image'])} ms at {number(first['copy_gb_per_s'])} GB/s of copying",
    ]
    names = [label(r["implementation"]) for r in group]
    width = max(map(len, names))
    headings = HEADINGS if first["device"] == "cpu" else (OVER_FLOOR, *HEADINGS)
    lines.append("  " + " " * width + "".join(f"{h:>{max(10, len(h) + 2)}}" for h in headings))
    for name, r in zip(names, group, strict=True):
        cells = [
            number(r["ms_per_image"]), *(number(r.get(f"speedup_over_{b}")) for b in BASELINES),
            number(r["gb_per_s"]), f"{100 * r['share_of_copy']:.0f} %", number(r["peak_extra_mb"]),
        ]  # fmt: skip
        if headings is not HEADINGS:
            cells.insert(0, number(1 / r["share_of_copy"]))
        lost = f"   loses {r['lost_tokens']} tokens in {r['of_images']} images" if r["lost_tokens"] else ""
        lines.append(
            f"  {name:<{width}}" + "".join(f"{c:>{max(10, len(h) + 2)}}" for c, h in zip(cells, headings, strict=True)) + lost
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Bars of ms per image, one panel per setting, with the floor drawn in."""
    matplotlib = cases.require("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [g for g in grouped(rows) if g[0]["timing"] == ("graph" if g[0]["device"] == "cuda" else "plain")]
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.2 * columns, 0.5 + 2.1 * lines), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        indexed = [r for r in group if r["implementation"].startswith("indexed_")]
        best = min(indexed, key=lambda r: r["ms_per_image"], default=None)
        bars = [r for r in group if r is best or r not in indexed]
        bars.sort(key=lambda r: r["ms_per_image"])
        names = ["best PyTorch found, compiled" if r is best else label(r["implementation"]) for r in bars]
        fused = [r["implementation"] in backends.ORDER and r["implementation"] != REFERENCE for r in bars]
        drawn = axis.barh(names, [r["ms_per_image"] for r in bars], color=["#c0392b" if f else "#95a5a6" for f in fused])
        axis.bar_label(drawn, [number(r["ms_per_image"]) for r in bars], padding=3, fontsize=8)
        floor = bars[0]["floor_ms_per_image"]
        axis.axvline(floor, color="black", linewidth=1, linestyle=":")
        axis.annotate("copy", (floor, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom")
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("ms per image (lower is better)", fontsize=8)
        head = bars[0]
        axis.set_title(f"{head['case']}, batch {head['batch']}, {head['dtype']}, {head['mode']}", fontsize=9, pad=12)
    machine = rows[0].get("gpu") or f"{rows[0].get('cpu')}, {rows[0].get('threads')} threads"
    figure.suptitle(f"{machine} · torch {rows[0].get('torch')}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- host overhead ---------------------------------------------------------------------------------------------------


def overhead(names: list[str], device: torch.device, budget: float) -> list[Row]:
    """µs that one forward on a tiny input takes on the host: what the way to the kernel costs."""
    x = torch.randn(1, 17, 16, device=device)
    key, w_down, w_up = torch.randn(1, 17, 8, device=device), torch.randn(4, 8, device=device), torch.randn(8, 4, device=device)
    refinement, learned = fpet_kernels.KeyRefinement(w_down, w_up), x.clone().requires_grad_()
    calls: dict[str, Callable[[], object]] = {"torch.add, for scale": lambda: torch.add(x, x)}
    for name in names:
        calls[f"{name}: bdm_merge"] = lambda n=name: bdm_merge(x, key, grid_size=(4, 4), backend=n)  # type: ignore[misc]
        calls[f"{name}: bdm_merge with refinement"] = lambda n=name: bdm_merge(  # type: ignore[misc]
            x, key, grid_size=(4, 4), refinement=refinement, backend=n
        )
        calls[f"{name}: bdm_merge recorded for backward"] = lambda n=name: bdm_merge(learned, key, grid_size=(4, 4), backend=n)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {n: [] for n in calls}
    start, count = time.perf_counter(), 100
    while time.perf_counter() - start < budget or len(seconds[next(iter(seconds))]) < 5:
        for name, call in calls.items():
            for _ in range(count // 10):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - begin) / count)
    rows = []
    for name, found in seconds.items():
        found.sort()
        rows.append({
            "benchmark": "host_overhead", "implementation": name, "device": device.type,
            "us_per_call": found[len(found) // 2] * 1e6, "us_per_call_min": found[0] * 1e6,
            "rounds": len(found), "calls_per_round": count,
        })  # fmt: skip
    return rows


# --- command line ------------------------------------------------------------------------------------------------------


TICKS = 10


def listed(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add("--dtype", help=f"comma-separated from {', '.join(DTYPES)}; default float32 on the CPU, bfloat16 elsewhere")
    add("--cases", default=",".join(DEFAULT_CASES), help="comma-separated names, or all; see --list")
    add("--batch", help=f"comma-separated; default {listed(DEFAULT_BATCHES)}, the full set is {listed(BATCHES)}")
    add("--mode", help=f"comma-separated from {', '.join((*MODES, BACKWARD))}; default the first two on the CPU, all on a GPU")
    add("--backends", help="comma-separated; default: every fused one that runs on the device, and the reference")
    add("--threads", type=int, help="CPU threads; default torch's")
    add("--key", choices=("heads", "averaged"), default="heads",
        help="heads (default): (B, heads, N, C) in place in the qkv buffer; averaged: (B, N, C)")  # fmt: skip
    add("--no-refinement", dest="refinement", action="store_false", help="plain keys; the backward then only yields dx")
    add("--malloc", choices=("default", "keep"), default="default",
        help="keep: have glibc keep freed pages (CPU; takes page faults out of everybody's time)")  # fmt: skip
    add("--budget", type=float, help=f"seconds of timing in all, default {DEFAULT_BUDGET:g}; preparing comes on top")
    add("--quick", action="store_true", help=f"a rough look: batch 16, {QUICK_BUDGET:g} s")
    add("--overhead", action="store_true", help="instead: µs that a forward on a tiny input takes on the host")
    add("--out", help="JSON lines are appended here; none: nowhere; default benchmarks/results/kernel_vs_ref-DEVICE.jsonl")
    add("--plot", metavar="FILE", nargs="?", const="", help="draw the picture of this run; default: beside the rows, as PNG")
    add("--show", metavar="FILE", help="measure nothing: table (and --plot) of the rows in FILE")
    add("--list", action="store_true", help="cases and backends, and stop")
    options = parser.parse_args(argv)

    def chosen(text: str, known: Iterable[str], what: str) -> list[str]:
        names = [n for n in text.replace(" ", "").split(",") if n]
        unknown = [n for n in names if n not in known]
        if unknown or not names:
            parser.error(f"--{what}: expected names out of {', '.join(known)}, got {text!r}")
        return names

    public = [n for n in CASES if n != "tiny"]
    options.cases = public if options.cases == "all" else chosen(options.cases, CASES, "cases")
    try:
        options.device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {options.device.type!r}: this benchmark can't time others")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False here")
    options.mode = chosen(options.mode or listed(MODES if options.device.type == "cpu" else (*MODES, BACKWARD)),
                          (*MODES, BACKWARD), "mode")  # fmt: skip
    options.dtype = chosen(options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16"), DTYPES, "dtype")
    options.batch_given = options.batch is not None
    text = options.batch or ("16" if options.quick else listed(DEFAULT_BATCHES))
    try:
        options.batch = [int(b) for b in text.split(",")]
    except ValueError:
        options.batch = []
    if not options.batch or min(options.batch) < 1:
        parser.error(f"--batch: expected positive integers separated by commas, got {text!r}")
    if options.budget is None:
        options.budget = QUICK_BUDGET if options.quick else DEFAULT_BUDGET
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected a positive integer, got {options.threads}")
    if options.plot == "":
        options.plot = str(default_out(options.device).with_suffix(".png"))
    return options


def choose_backends(asked: str | None, device: torch.device) -> tuple[list[str], list[str]]:
    """The backends to measure, and complaints about those that one would expect and can't have.

    Raises:
        SystemExit: one was asked for by name and is unknown or can't run.
    """
    probe = torch.empty(1, 1, 1, device=device)
    if asked is not None:
        names = [n for n in asked.replace(" ", "").split(",") if n]
        for name in names:
            if name not in backends.ORDER:
                raise SystemExit(f"--backends: expected names out of {', '.join(backends.ORDER)}, got {name!r}")
            why = backends.refuses(name, probe)
            if why is not None:
                raise SystemExit(f"--backends: {name!r} can't run on {device}: {why}. Fix: {backends.status(name).fix or '–'}")
        return names, []
    native = backends.select(probe, None)
    complaints = []
    if device.type == "cpu":
        if native != REFERENCE:
            return [native, REFERENCE], []
        found = backends.status("cpu")
        complaints.append(f"!! THE FUSED CPU BACKEND IS MISSING: {found.reason}. Fix: {found.fix or '–'}")
    # On the CPU, Triton only has its interpreter: a debugging tool, never measured unless asked for by name.
    fused = [n for n in backends.ORDER if n not in (REFERENCE, "cpu") and device.type != "cpu"]
    names = [n for n in fused if backends.refuses(n, probe) is None]
    complaints += [f"not in this run: {n}: {backends.refuses(n, probe)}. Fix: {backends.status(n).fix or '–'}"
                   for n in fused if n not in names]  # fmt: skip
    if not names:
        complaints.append(f"!! No fused backend runs on {device}; what follows is plain PyTorch:\n{fpet_kernels.explain()}")
    return [*names, REFERENCE], complaints


def listing() -> str:
    lines = ["cases (all batch sizes as memory allows):"]
    for case in CASES.values():
        grid = f"{case.grid[0]}×{case.grid[1]}"
        lines.append(
            f"  {case.name:<23} {case.model}, {grid} + {case.num_prefix_tokens}, N {case.num_tokens}, D {case.dim}, "
            f"{case.heads} heads × {case.channels}, block {case.layer}"
        )
    return "\n".join([*lines, "backends:", fpet_kernels.explain()])


def default_out(device: torch.device) -> Path:
    return RESULTS / f"kernel_vs_ref-{device.type}.jsonl"


def write(rows: list[Row], out: str | None, device: torch.device) -> Path | None:
    """Appends ``rows`` as JSON lines; returns where."""
    if out == "none" or not rows:
        return None
    path = Path(out) if out else default_out(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.list:
        print(listing())
        return 0
    if options.show:
        rows = [json.loads(line) for line in Path(options.show).read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [r for r in rows if r["benchmark"] == "kernel_vs_ref"]
        if not rows:
            print(f"{options.show} holds no rows of this benchmark", file=sys.stderr)
            return 2
        print("\n\n".join(map(table, grouped(rows))))
        if options.plot:
            plot(rows, options.plot)
        return 0

    started = time.perf_counter()
    if options.malloc == "keep" and not timing.keep_freed_pages():
        print("--malloc keep: needs glibc", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device.index is not None and options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # events and graphs belong to the current device
    names, complaints = choose_backends(options.backends, options.device)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    command = shlex.join(["python", "benchmarks/kernel_vs_ref.py", *(sys.argv[1:] if argv is None else argv)])
    context = {**timing.provenance(options.device, command), "malloc": options.malloc}
    if context["dirty"]:
        print("note: the working tree has changes that are not committed; the rows say so", file=sys.stderr)

    if options.overhead:
        rows = [{**row, **context} for row in overhead(names, options.device, min(options.budget, 10.0))]
        for row in rows:
            print(f"{row['us_per_call']:8.1f} µs   {row['implementation']}")
        print(f"median of {rows[0]['rounds']} rounds of {rows[0]['calls_per_round']} calls, B 1, N 17, D 16, C 8, float32")
        written = write(rows, options.out, options.device)
        print(f"rows appended to {written}" if written else "no rows written")
        return 0

    # torch.compile's remarks on wording and tuning are not about this measurement.
    warnings.filterwarnings("ignore", module=r"torch\.(_inductor|_dynamo|_functorch|utils|sparse)")
    work = itertools.product(options.cases, options.batch, options.dtype, options.mode)
    settings = [Setting(CASES[c], b, d, m) for c, b, d, m in work]
    options.settings = len(settings)
    implementations = len(names) + 2 + len(formulations.BEST_VARIANTS)
    rows = []
    tqdm = cases.require("tqdm").tqdm
    layout = "{l_bar}{bar:20}| {elapsed}<{remaining}"
    with tqdm(total=0, file=sys.stderr, leave=False, bar_format=layout) as bar:
        bench = Bench(options, names, bar)
        per_setting = 1 + 2 * implementations + TICKS * len(bench.kinds)
        bar.reset(total=per_setting * len(settings))
        for done, setting in enumerate(settings, 1):
            found = [{**row, **context} for row in bench.run(setting)]
            for group in grouped(found):
                bench.say(table(group) + "\n")
            rows += found
            bar.update(per_setting * done - bar.n)
    written = write(rows, options.out, options.device)

    if options.device.type == "cpu":
        machine = f"{context['cpu']}, {context['threads']} threads, load {context['load_average']} at the start"
    else:
        machine = f"{context['gpu']}, driver {context['driver']}"
    print(f"{machine} · torch {context['torch']} · {time.perf_counter() - started:.0f} s")
    for line in bench.left_out:
        print(f"left out: {line}")
    if not options.batch_given and options.cases == list(DEFAULT_CASES):
        others = ", ".join(n for n in CASES if n not in (*DEFAULT_CASES, "tiny"))
        print(f"not in this run: cases {others}; batches 16 and 256; other dtypes. All of it:")
        everything = f"--cases all --batch {listed(BATCHES)} --dtype {listed(DTYPES)} --budget 3000"
        print(f"  python benchmarks/kernel_vs_ref.py {everything}")
    if written:
        print(f"{len(rows)} rows appended to {written}")
    if options.plot and rows:
        plot(rows, options.plot)
        print(f"picture: {options.plot}")
    for failure in bench.failures:
        print(failure, file=sys.stderr)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
