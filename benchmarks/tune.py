"""Times launch configurations of the Triton kernels on this GPU and writes the rows for fpet_kernels/triton/configs.py.

    python benchmarks/tune.py --device cuda --out rows.txt      # a few minutes: everything below
    python benchmarks/tune.py --slot "forward (2, False, 128)"  # one row of a table
    python benchmarks/tune.py --dry-run                         # no GPU: compiles every candidate, prints predictions

Every candidate is compiled first, on all cores; what spills in a fused kernel or needs more shared memory than there is, is
out. The others must give the reference's result, and are timed as CUDA graphs over rotated inputs that no L2 cache holds.
Before a candidate is timed its time is predicted, from the bytes that must move, how many programs fit on a multiprocessor,
and what one program does: its PTX is executed on the CPU (tests/ptx), which counts instructions and round trips to memory. Both
times are printed, so that a wrong model shows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

try:
    from fpet_kernels.triton import configs, report
except ImportError as missing:
    raise SystemExit(f"tune: fpet_kernels and triton must be importable ({missing}): pip install -e . triton") from missing

BF16, F32 = torch.bfloat16, torch.float32
SHORT_CANDIDATES = tuple(itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3), (1, 2)))
TILE_CANDIDATES = (
    (64, 64, 64, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 8, 2), (64, 64, 64, 4, 3), (32, 64, 64, 4, 2), (64, 32, 64, 4, 2),
    (128, 64, 64, 8, 2), (64, 128, 64, 8, 2), (128, 128, 64, 8, 2), (128, 128, 32, 8, 2), (128, 64, 32, 8, 3),
)  # fmt: skip
# A guess, to be corrected by what is measured: seconds from asking for a line of memory to having it, under load.
LATENCY = 0.8e-6
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of one warp in a clock


@dataclass(frozen=True)
class Gpu:
    """What the prediction knows of a GPU. bandwidth: bytes per second of a copy, read and written. clock: in hertz."""

    bandwidth: float
    clock: float
    multiprocessors: int


ASSUMED = {"sm80": Gpu(1.6e12, 1.4e9, 108), "sm90": Gpu(4.3e12, 1.7e9, 132), "sm100": Gpu(6.5e12, 1.9e9, 148)}


@dataclass(frozen=True)
class Slot:
    """One entry of a table, and what is tried for it: ``candidates`` by the text that goes into the table."""

    name: str
    case: report.Case
    forward: bool
    backward: bool
    kernels: tuple[str, ...]
    candidates: dict[str, configs.Architecture]

    @property
    def bytes_moved(self) -> int:
        """Each input read and each result written, once: of the backward, what the gradients of x and of the weights need."""
        c = self.case
        patches = c.grid[0] * c.grid[1]
        n, merged = c.prefix + patches, c.prefix + patches // 2
        x, key, y = n * c.dim * c.x.itemsize, n * c.heads * c.channels * c.key.itemsize, merged * c.dim * c.x.itemsize
        matched, sizes = 20 * (patches - patches // 2), 4 * merged  # match and runner-up in int64, their mean score
        rows = patches * c.dim * c.x.itemsize if c.hidden else 0  # the sources' of x, the destinations' of the tokens
        forward, backward = x + key + y + matched + sizes, y + x + rows + (key if c.hidden else 0) + matched + sizes
        return c.batch * (self.forward * forward + self.backward * backward)


def slots(frozen: configs.Architecture, batch: int) -> Iterator[Slot]:
    """The most important first."""

    def case(
        name: str, grid: tuple[int, int], x: torch.dtype, refined: bool, dim: int = 768, images: int = batch
    ) -> report.Case:
        heads = dim // 64
        return report.Case(name, grid, 1, dim, 64, x, BF16, heads if refined else 1, 32 if refined else 0, batch=images)

    refined, plain = case("ViT-B/16, refined", (14, 14), BF16, True), case("ViT-B/16", (14, 14), BF16, False)
    for problem, size in (
        (refined, 128),
        (plain, 128),
        (case("float32 x, refined", (14, 14), F32, True), 128),
        (case("352 pixels, refined", (22, 22), BF16, True), 256),
        (case("352 pixels", (22, 22), BF16, False), 256),
    ):
        key = (problem.x.itemsize, not problem.hidden, size)
        tried = dict.fromkeys(
            (*((c,) if (c := frozen.forward.get(key)) else ()), *(configs.Short(*s) for s in SHORT_CANDIDATES))
        )
        yield Slot(
            f"forward {key}", problem, True, False, ("merge_short",),
            {f"{key}: Short{astuple(short)}": replace(frozen, forward=frozen.forward | {key: short}) for short in tried},
        )  # fmt: skip
    long = case("ViT-L at 1024, refined", (64, 64), BF16, True, dim=1024, images=4)
    rows = (frozen.tiles.rows, *(r for r in (16, 32, 64) if r != frozen.tiles.rows))
    yield Slot(
        "tiles.rows",
        long,
        True,
        True,
        ("prepare_keys", "prepare_backward", "refined_gradient", "weight_partials"),
        {f"tiles: rows={r}": replace(frozen, tiles=replace(frozen.tiles, rows=r)) for r in rows},
    )
    t = frozen.tiles
    tiles = dict.fromkeys(
        (t, *(replace(t, block_a=a, block_b=b, block_d=d, warps=w, stages=s) for a, b, d, w, s in TILE_CANDIDATES))
    )
    for name, problem in (("tiles", long), ("tiles, short grids", refined)):
        yield Slot(
            name, problem, problem is long, True,
            ("match_tiles", "pair_pass"), {f"{tile}": replace(frozen, tiles=tile) for tile in tiles},
        )  # fmt: skip
    yield Slot(
        "split_float32", case("float32 x, refined", (14, 14), F32, True), True, True, ("merge_short", "pair_pass"),
        {f"split_float32={s}": replace(frozen, split_float32=s) for s in (frozen.split_float32, not frozen.split_float32)},
    )  # fmt: skip


# --- compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A kernel of a candidate: the compiler's report, programs of its launches, what one of them does."""

    row: report.Row
    programs: int
    instructions: float = math.nan
    round_trips: float = math.nan


def compile_candidate(slot: Slot, text: str, target: str, everything: bool) -> list[Counted]:
    """Compiles a candidate's kernels into Triton's cache on disk; runs in a process of its own, which needs no GPU."""
    configs.TABLES["tried"] = slot.candidates[text]
    with report.absent_gpu(target), configs.pretend("tried"):
        launches: dict[Any, tuple] = {}
        programs: dict[str, int] = {}
        for launch in report.record(slot.case):
            name = launch[0].fn.__name__
            if everything or name in slot.kernels:
                launches[launch[0]] = launch
                programs[name] = programs.get(name, 0) + math.prod(launch[3])
        rows = [report.usage(*launch, slot.case.name, target) for launch in launches.values()]
        counts = count(slot, target)
    return [Counted(row, programs[row.kernel], *counts.get(row.kernel, ())) for row in rows]


def count(slot: Slot, target: str) -> dict[str, tuple[float, float]]:
    """Instructions and round trips of a program, by kernel; nothing where the interpreter is missing or can't."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    try:
        from ptx.emulate import emulated
        from ptx.memory import Fault
    except ImportError:
        return {}
    from fpet_kernels.triton import ops

    # One image on as many multiprocessors as it has in the batch: launches then share it out as they do there.
    table = configs.TABLES["tried"]
    configs.TABLES["one image"] = replace(table, multiprocessors=max(1, table.multiprocessors // slot.case.batch))
    generator = torch.Generator().manual_seed(0)
    forward, backward = report.arguments(
        replace(slot.case, batch=1), lambda shape, dtype: torch.randn(shape, generator=generator).to(dtype)
    )
    try:
        with emulated(target, whole=True) as emulation, configs.pretend("one image"):
            emulation.only = lambda _grid: [(0, 0, 0)]
            results = ops._launch_forward(*forward)
            if slot.backward:
                ops._launch_backward(*backward(*results))
    except Fault:
        return {}
    return {name: (machine.counts["instructions"], machine.counts["round trips"]) for name, machine in emulation.machines}


@dataclass
class Candidate:
    """One candidate of a slot, and what became of it."""

    text: str
    rows: list[Counted]
    refused: str = ""
    predicted: float = math.nan
    measured: float = math.nan


def predict(slot: Slot, candidate: Candidate, gpu: Gpu) -> float:
    """Seconds: the bytes at copy bandwidth; or, kernel after kernel, the instructions at full issue on the multiprocessor that
    has the most programs, or the round trips of its waves of programs."""
    total = 0.0
    for kernel in candidate.rows:
        most = math.ceil(kernel.programs / gpu.multiprocessors)
        issue = most * kernel.row.warps * kernel.instructions / (SCHEDULERS * gpu.clock)
        total += max(issue, math.ceil(most / max(1, kernel.row.fit)) * kernel.round_trips * LATENCY)
    return max(total, slot.bytes_moved / gpu.bandwidth)


def compile_all(
    work: list[tuple[Slot, list[Candidate]]], target: str, gpu: Gpu, limit: int, jobs: int, deadline: float
) -> None:
    """Fills in rows, predictions and refusals; a candidate that is not compiled by the deadline is refused."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    waiting: dict[Future, tuple[Slot, Candidate]] = {}
    for nth in range(max(len(found) for _, found in work)):  # the first of every slot, then the second …
        for slot, found in work:
            if nth < len(found):
                waiting[pool.submit(compile_candidate, slot, found[nth].text, target, nth == 0)] = slot, found[nth]
    for _, candidate in waiting.values():
        candidate.refused = "not compiled in time"
    try:
        for future in as_completed(waiting, timeout=max(1.0, deadline - time.monotonic())):
            slot, candidate = waiting[future]
            try:
                rows = future.result()
            except Exception as error:  # a compiler may fail in any way: that candidate is out
                candidate.refused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                continue
            candidate.rows, candidate.refused = [kernel for kernel in rows if kernel.row.kernel in slot.kernels], ""
            found = [kernel.row for kernel in candidate.rows]
            spilled = [r.kernel for r in found if r.spills and r.kernel == "merge_short"]
            large = [f"{r.kernel} {r.shared / 1024:.0f} KiB" for r in found if r.shared > limit]
            if not candidate.rows:
                candidate.refused = "does not reach the kernel"
            elif spilled or large:
                candidate.refused = ", ".join([*(f"{k} spills" for k in spilled), *(f"{k} shared" for k in large)])
            else:
                candidate.predicted = predict(slot, candidate, gpu)
    except OutOfTime:
        print(f"compiling: {sum(not f.done() for f in waiting)} candidates were not reached in time", file=sys.stderr)
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()


# --- running ---------------------------------------------------------------------------------------------------------


class Trial:
    """One case on the device: rotated inputs, and the result that every candidate must give."""

    def __init__(self, case: report.Case, device: torch.device) -> None:
        from fpet_kernels import ops as base

        generator = torch.Generator(device).manual_seed(0)

        def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=F32).to(dtype)

        bytes_each = (
            case.batch * (case.prefix + case.grid[0] * case.grid[1]) * (case.dim + case.heads * case.channels) * case.x.itemsize
        )
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.inputs = [report.arguments(case, make) for _ in range(max(2, -(-4 * cache // bytes_each)))]
        few = replace(case, batch=min(case.batch, 2))
        forward, backward = self.inputs[0]

        def cut(t: Any) -> Any:
            return t[: few.batch] if isinstance(t, torch.Tensor) and t.shape[0] == case.batch and t.dim() > 2 else t

        self.few = tuple(map(cut, forward))
        self.wanted = base._forward(*self.few)
        of_few = backward(*self.wanted)
        self.few_backward = (*of_few[:2], *self.few[:7], *of_few[9:])
        self.wanted_grads = base._backward(*self.few_backward)
        self.results: list[tuple] = []

    def wrong(self, forward: bool, backward: bool) -> str | None:
        """Why the configuration in force is no good."""
        from fpet_kernels.triton import ops

        if forward:
            tokens, _, match, _, _ = ops.forward(*self.few)
            if (match != self.wanted[2]).float().mean() > 1e-2:
                return "matches differ"
            # Where a near tie fell the other way, two rows differ; the rest must agree.
            close = torch.isclose(tokens.float(), self.wanted[0].float(), rtol=2e-2, atol=2e-2).float().mean()
            if not close > 0.99:
                return "tokens differ"
        if backward:
            for got, want in zip(ops.backward(*self.few_backward), self.wanted_grads, strict=True):
                if got.numel() and not (got.float() - want.float()).norm() <= 2e-2 * want.float().norm():
                    return "gradients differ"
        return None

    def calls(self, forward: bool, backward: bool) -> Callable[[], None]:
        """One pass over all inputs."""
        from fpet_kernels.triton import ops

        if not self.results:
            self.results = [ops.forward(*args) for args, _ in self.inputs]

        def run() -> None:
            for (args, of), results in zip(self.inputs, self.results, strict=True):
                if forward:
                    ops.forward(*args)
                if backward:
                    ops.backward(*of(*results))

        return run

    def seconds(self, forward: bool, backward: bool, budget: float) -> float:
        """Median of one call, as a replayed CUDA graph."""
        from harness.timing import capture

        replay = capture(self.calls(forward, backward))
        times: list[float] = []
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.monotonic()
        replay()
        while len(times) < 5 or (time.monotonic() - begin < budget and len(times) < 100):
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / len(self.inputs))
        return sorted(times)[len(times) // 2]


def run_all(work: list[tuple[Slot, list[Candidate]]], device: torch.device, budget: float, deadline: float) -> None:
    """Measures what is left, slot by slot."""
    trials: dict[str, Trial] = {}
    for slot, found in work:
        if slot.case.name not in trials:
            trials.clear()  # one case's inputs at a time
            trials[slot.case.name] = Trial(slot.case, device)
        trial = trials[slot.case.name]
        for candidate in sorted((c for c in found if not c.refused), key=lambda c: (math.isnan(c.predicted), c.predicted)):
            if time.monotonic() > deadline:
                candidate.refused = "not measured in time"
                continue
            configs.TABLES["tried"] = slot.candidates[candidate.text]
            with configs.pretend("tried"):
                try:
                    candidate.refused = trial.wrong(slot.forward, slot.backward) or ""
                    if not candidate.refused:
                        candidate.measured = trial.seconds(slot.forward, slot.backward, budget)
                except Exception as error:  # out of some resource, or refused by the driver: that candidate is out
                    candidate.refused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy: the best of ten."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = math.inf
    for _ in range(10):
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return 2 * source.numel() * 4 / best


# --- output ----------------------------------------------------------------------------------------------------------


def lines_of(slot: Slot, found: list[Candidate], gpu: Gpu) -> list[str]:
    """What was found for one slot, the best first."""
    floor = slot.bytes_moved / gpu.bandwidth

    def figure(seconds: float) -> str:
        return "       –         " if math.isnan(seconds) else f"{seconds * 1e6:8.1f} µs {seconds / floor:5.2f} ×"

    out = [
        f"{slot.name} · {slot.case.name}, batch {slot.case.batch} · floor {floor * 1e6:.1f} µs",
        f"    {'predicted':>17}  {'measured':>17}  registers  shared  programs on one multiprocessor",
    ]
    order = sorted(found, key=lambda c: (bool(c.refused), math.isnan(c.measured), c.measured, c.predicted))
    for c in order:
        if c.refused:
            continue
        kernels = [kernel.row for kernel in c.rows]
        registers, shared = max(r.registers or 0 for r in kernels), max(r.shared for r in kernels)
        fit = min(r.fit for r in kernels)
        out.append(f"    {figure(c.predicted)}  {figure(c.measured)}  {registers:9}  {shared / 1024:3.0f} KiB  {fit}  {c.text}")
    refused: dict[str, int] = {}
    for c in found:
        if c.refused:
            refused[c.refused] = refused.get(c.refused, 0) + 1
    out += [f"    {count} × {why}" for why, count in sorted(refused.items(), key=lambda item: -item[1])]
    return out


def row_of(slot: Slot, found: list[Candidate], gpu: Gpu, dry: bool) -> str:
    """The line for configs.py."""
    timed = [c for c in found if not c.refused and not math.isnan(c.predicted if dry else c.measured)]
    if not timed:
        return f"    # {slot.name}: nothing ran"
    best = min(timed, key=lambda c: c.predicted if dry else c.measured)
    floor, frozen = slot.bytes_moved / gpu.bandwidth, found[0]
    if dry:
        return f"    {best.text},  # {slot.name}: PREDICTED {best.predicted * 1e6:.1f} µs"
    before = "which did not run" if math.isnan(frozen.measured) else f"{frozen.measured * 1e6:.1f} µs"
    return (
        f"    {best.text},  # {slot.name}: {best.measured * 1e6:.1f} µs, {best.measured / floor:.2f} × floor; "
        f"until now {frozen.text}: {before}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda (default), cuda:1, …")
    add("--dry-run", action="store_true", help="no GPU: compile, predict, print")
    add("--target", choices=ASSUMED, help="of a dry run; default sm90")
    add("--slot", action="append", help="only slots whose name holds this text; may be repeated")
    add("--case", action="append", help="only slots of the cases whose name is this; may be repeated")
    add("--candidates", type=int, default=64, help="at most so many per slot (default 64)")
    add("--batch", type=int, default=64)
    add("--minutes", type=float, default=5.5, help="in all (default 5.5); what is not reached is named")
    add("--seconds", type=float, default=0.1, help="of timing per candidate (default 0.1)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile; default: one per core")
    add("--out", type=Path, help="also write everything to this file")
    add("--list", action="store_true", help="names of the slots, and stop")
    options = parser.parse_args(argv)
    for name in ("candidates", "batch", "minutes", "jobs"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    if options.dry_run:
        table, gpu, where = options.target or "sm90", ASSUMED[options.target or "sm90"], "dry run: nothing was measured"
    else:
        from fpet_kernels import backends

        if not torch.cuda.is_available():
            print("tune: torch sees no GPU; --dry-run compiles without one", file=sys.stderr)
            return 1
        device = torch.device(options.device)
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        why_not = backends.refuses("triton", torch.empty(1, 1, 1, device=device))
        table = configs.architecture_of(device.type, device.index)
        if why_not is not None or table not in ASSUMED:
            print(
                f"tune: {why_not or f'the table {table!r} has no compile target; there are ' + ', '.join(ASSUMED)}",
                file=sys.stderr,
            )
            return 1
        properties = torch.cuda.get_device_properties(device)
        gpu = replace(ASSUMED[table], bandwidth=copy_bandwidth(device), multiprocessors=properties.multi_processor_count)
        where = f"{properties.name}, copies at {gpu.bandwidth / 1e12:.2f} TB/s"
    frozen = configs.TABLES[table]
    chosen = [s for s in slots(frozen, options.batch) if not options.slot or any(text in s.name for text in options.slot)]
    chosen = [s for s in chosen if not options.case or s.case.name in options.case]
    if options.list or not chosen:
        names = "\n".join(f"{s.name}   ({s.case.name})" for s in slots(frozen, options.batch))
        print(
            names if options.list else f"tune: no such slot; there are\n{names}",
            file=sys.stdout if options.list else sys.stderr,
        )
        return 0 if options.list else 2
    import triton

    head = f"# {where} ({table}), torch {torch.__version__}, triton {triton.__version__}"
    print(head)
    work = [(s, [Candidate(text, []) for text in itertools.islice(s.candidates, options.candidates)]) for s in chosen]
    compile_until = end if options.dry_run else begin + 0.55 * (end - begin)
    compile_all(work, table, gpu, frozen.shared, options.jobs, compile_until)
    print(f"# compiled in {time.monotonic() - begin:.0f} s on {options.jobs} processes", flush=True)
    if not options.dry_run:
        run_all(work, device, options.seconds, end)
    text = [head]
    for slot, found in work:
        text += lines_of(slot, found, gpu)
    text += [f"# rows for configs.py, table {table!r}", *(row_of(slot, found, gpu, options.dry_run) for slot, found in work)]
    print("\n".join(text[1:]))
    print(f"# {time.monotonic() - begin:.0f} s in all")
    if options.out:
        options.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
