"""How fast the fused merge is, against PyTorch: ``python benchmarks/kernel_vs_ref.py``.

Nothing is timed before it is right (harness/gate.py). What is timed (benchmarks/README.md says it at length): one call of
``bdm_merge`` on real per-head keys, head averaging and key refinement included; with ``forward+backward`` also the gradients
of x and of the refinement's two weights. Every implementation gets the same tensors, all are timed in turns in one run, and
so is a plain copy, whose bandwidth makes the floor: the time of moving the operator's bytes once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence

try:
    import torch

    import fpet_kernels
except ImportError as missing:
    raise SystemExit(f"fpet_kernels is not installed here ({missing}): make bench, or pip install -e '.[bench]'") from missing

from fpet_kernels import backends
from harness import cases, gate, run, timing
from harness import rows as files
from harness.cases import CASES, Case, Problem
from harness.options import DTYPES, Parser, listed
from harness.rows import Row
from harness.run import compile_whole
from kernel import formulations
from kernel.implementations import (
    BACKWARD,
    BASELINES,
    BEST,
    MODES,
    PAPER,
    PAPER_COMPILED,
    REFERENCE,
    Implementation,
    Setting,
    backend_calls,
    backward_alone,
    memory_needed,
    step,
)
from kernel.overhead import overhead
from kernel.report import grouped, label, plot, table

BATCHES = (1, 16, 64, 256)
DEFAULT_CASES, DEFAULT_BATCHES = ("vitb16_224",), (1, 64)
DEFAULT_BUDGET, QUICK_BUDGET = 48.0, 6.0
FORMULATIONS = (PAPER, PAPER_COMPILED, BEST)
TIMINGS = ("graph", "plain")  # replays of a CUDA graph; calls as they are
TICKS = 10  # of the progress bar, while one setting is timed


class Bench(run.Bench):
    """Times implementations of one call."""

    benchmark = "kernel_vs_ref"

    def __init__(self, options: argparse.Namespace, names: list[str]) -> None:
        super().__init__(options)
        self.names = names
        self.kinds = options.timing
        indexed = [f"indexed_{variant}" for variant in formulations.BEST_VARIANTS]
        self.baselines = [name for b in options.baselines for name in (indexed if b == BEST else [b])]
        self._features: tuple[str, tuple[torch.Tensor, ...]] = ("", ())

    def steps(self, setting: Setting) -> int:
        implementations = len(self.names) + len(self.baselines)
        return 1 + 2 * implementations + TICKS * len(self.kinds)

    def features(self, case: Case, batch: int) -> tuple[torch.Tensor, ...]:
        """(x, qkv) of as many of the case's crops as a batch can hold, in float32 on the CPU; kept until another case comes."""
        name, known = self._features
        count = min(case.distinct, batch)
        start = known[0].shape[0] if name == case.name else 0
        if start < count:  # a first batch of one must not wait for sixteen images
            model = cases.seeded_vit(case).to(self.device)
            images = cases.crops(cases.photograph(), count, case.image_size)[start:]
            found = [cases.features(model, image[None].to(self.device)) for image in images]
            more = tuple(torch.cat(t).cpu() for t in zip(*found, strict=True))
            known = tuple(map(torch.cat, zip(known, more, strict=True))) if start else more
            self._features = (case.name, known)
        return known

    def run(self, setting: Setting) -> list[Row]:
        """All implementations of one setting: gate, warm-up, time, memory."""
        self.bar.set_description(f"{setting}: input")
        self.clean()
        case, dtype = setting.case, DTYPES[setting.dtype]
        inputs = 2 * setting.batch * (5 * case.num_tokens) * case.dim * dtype.itemsize
        if inputs > 0.8 * timing.available_bytes(self.device):
            self.left_out.append(f"{setting}: its input of {inputs / 2e9:.1f} GB does not fit")
            return []
        problem = cases.make_problem(
            case, self.features(case, setting.batch), setting.batch, dtype, self.device, refine=self.options.refinement,
            averaged_key=self.options.key == "averaged",
        )  # fmt: skip
        problem.requires_grad_(setting.backward)
        self.bar.update(1)
        with torch.set_grad_enabled(setting.backward):
            ready = self.prepare(setting, problem)
            return self.time(setting, problem, ready) if ready else []

    def prepare(self, setting: Setting, problem: Problem) -> list[Implementation]:
        """Every implementation that fits and is right, warm."""
        examiner = gate.Examiner(problem, setting.backward)
        ready = []
        names = [*self.names, *self.baselines]
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
                function = compile_whole(function)
                verdict = gate.examine(lambda: function(*args), examiner, twice=False)
                if not verdict.right:
                    self.say(f"baseline {label(name)} is wrong here and left out: {verdict.complaint()}")
                    return None
                return Implementation(name, lambda: function(*args), errors={f.what: f.error for f in verdict.findings})
            function, args = formulations.paper_of(problem)
            if name == PAPER_COMPILED:
                function = compile_whole(function)
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
                "benchmark": self.benchmark, "implementation": name, "case": setting.case.name, "batch": batch,
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


# --- command line ------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(Bench.benchmark, __doc__, DTYPES)
    add = parser.add_argument
    add("--cases", default=",".join(DEFAULT_CASES), help="comma-separated names, or all; see --list")
    add("--batch", help=f"comma-separated; default {listed(DEFAULT_BATCHES)}, the full set is {listed(BATCHES)}")
    add("--mode", help=f"comma-separated from {', '.join((*MODES, BACKWARD))}; default the first two on the CPU, all on a GPU")
    add("--backends", help="comma-separated; default: every fused one that runs on the device, and the reference")
    add(
        "--baselines",
        default=listed(FORMULATIONS),
        help=f"of PyTorch, comma-separated from {listed(FORMULATIONS)} (default: all), or none",
    )
    add("--timing", help=f"comma-separated from {listed(TIMINGS)}; default both on a GPU, plain on the CPU")
    add("--key", choices=("heads", "averaged"), default="heads",
        help="heads (default): (B, heads, N, C) in place in the qkv buffer; averaged: (B, N, C)")  # fmt: skip
    add("--no-refinement", dest="refinement", action="store_false", help="plain keys; the backward then only yields dx")
    add("--malloc", choices=("default", "keep"), default="default",
        help="keep: have glibc keep freed pages (CPU; takes page faults out of everybody's time)")  # fmt: skip
    add("--budget", type=float, help=f"seconds of timing in all, default {DEFAULT_BUDGET:g}; preparing comes on top")
    add("--quick", action="store_true", help=f"a rough look: batch 16, {QUICK_BUDGET:g} s")
    add("--overhead", action="store_true", help="instead: µs that a forward on a tiny input takes on the host")
    add("--plot", metavar="FILE", nargs="?", const="", help="draw the picture of this run; default: beside the rows, as PNG")
    add("--list", action="store_true", help="cases and backends, and stop")
    options = parser.checked(argv)
    options.cases = parser.chosen(options.cases, CASES, "cases", public=[n for n in CASES if n != "tiny"])
    default = MODES if options.device.type == "cpu" else (*MODES, BACKWARD)
    options.mode = parser.chosen(options.mode or listed(default), (*MODES, BACKWARD), "mode")
    options.baselines = [] if options.baselines == "none" else parser.chosen(options.baselines, FORMULATIONS, "baselines")
    kinds = TIMINGS if options.device.type == "cuda" else ("plain",)
    options.timing = parser.chosen(options.timing or listed(kinds), kinds, "timing")
    options.batch_given = options.batch is not None
    options.batch = parser.counts(options.batch or ("16" if options.quick else listed(DEFAULT_BATCHES)), "batch")
    if options.budget is None:
        options.budget = QUICK_BUDGET if options.quick else DEFAULT_BUDGET
    if options.plot == "":
        options.plot = str(files.default_path(Bench.benchmark, options.device).with_suffix(".png"))
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
    complaints += [
        f"not in this run: {n}: {backends.refuses(n, probe)}. Fix: {backends.status(n).fix or '–'}"
        for n in fused
        if n not in names
    ]
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


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.list:
        print(listing())
        return 0
    if options.show:
        rows = run.show(options.show, Bench.benchmark, grouped, table)
        if rows and options.plot:
            plot(rows, options.plot)
        return 0 if rows else 2

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
    context = run.context(options, Bench.benchmark, argv, malloc=options.malloc)

    if options.overhead:
        rows = [{**row, **context} for row in overhead(names, options.device, min(options.budget, 10.0))]
        for row in rows:
            print(f"{row['us_per_call']:8.1f} µs   {row['implementation']}")
        print(f"median of {rows[0]['rounds']} rounds of {rows[0]['calls_per_round']} calls, B 1, N 17, D 16, C 8, float32")
        written = files.write(rows, Bench.benchmark, options.out, options.device)
        print(f"rows appended to {written}" if written else "no rows written")
        return 0

    work = itertools.product(options.cases, options.batch, options.dtype, options.mode)
    settings = [Setting(CASES[c], b, d, m) for c, b, d, m in work]
    options.settings = len(settings)
    bench = Bench(options, names)
    rows = bench.measure(settings, context, grouped, table)
    bench.finish(rows, context, time.perf_counter() - started)
    if not options.batch_given and options.cases == list(DEFAULT_CASES):
        others = ", ".join(n for n in CASES if n not in (*DEFAULT_CASES, "tiny"))
        print(f"not in this run: cases {others}; batches 16 and 256; other dtypes. All of it:")
        everything = f"--cases all --batch {listed(BATCHES)} --dtype {listed(DTYPES)} --budget 3000"
        print(f"  python benchmarks/kernel_vs_ref.py {everything}")
    if options.plot and rows:
        plot(rows, options.plot)
        print(f"picture: {options.plot}")
    return bench.status()


if __name__ == "__main__":
    sys.exit(main())
