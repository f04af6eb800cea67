"""What the compiler makes of the kernels, for GPUs that need not be there: registers, spills, shared memory, waves.

    python -m fpet_kernels.triton.report                      # the representative shapes, every architecture of the tables
    python -m fpet_kernels.triton.report --target sm90 --case "ViT-B/16 bf16" --json

The launches are recorded from the launchers themselves, on tensors without storage, and compiled by Triton as it would before
it made them. Must not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "BATCHES", "CASES", "MULTIPROCESSORS", "TARGETS", "Case", "Multiprocessor", "Row", "absent_gpu", "arguments",
    "compile_case", "fitting", "launched_programs", "main", "record", "usage",
]  # fmt: skip

TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
BATCHES = (1, 16, 64, 256)  # for which programs and waves are reported


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs that run on one at once share: 32-bit registers, threads, programs, bytes of shared memory.

    Each program takes ``reserved`` bytes more than it asks for.
    """

    registers: int
    threads: int
    programs: int
    shared: int
    reserved: int


MULTIPROCESSORS = {
    "sm80": Multiprocessor(65_536, 2_048, 32, 167_936, 1_024),
    "sm90": Multiprocessor(65_536, 2_048, 32, 233_472, 1_024),
    "sm100": Multiprocessor(65_536, 2_048, 32, 233_472, 1_024),
    "gfx942": Multiprocessor(131_072, 2_048, 32, 65_536, 0),
}


@dataclass(frozen=True)
class Case:
    """A call whose kernels are compiled: shapes as in :func:`fpet_kernels.bdm_merge`."""

    name: str
    grid: tuple[int, int]
    prefix: int
    dim: int
    channels: int
    x: torch.dtype
    key: torch.dtype
    heads: int = 1
    hidden: int = 0
    sized: bool = False
    batch: int = 64


_BF16, _F32, _F64 = torch.bfloat16, torch.float32, torch.float64
CASES = (
    Case("ViT-S/16 bf16", (14, 14), 1, 384, 64, _BF16, _BF16),
    Case("ViT-B/16 bf16", (14, 14), 1, 768, 64, _BF16, _BF16),
    Case("ViT-L/16 bf16", (14, 14), 1, 1024, 64, _BF16, _BF16),
    Case("ViT-B/16 autocast, refined", (14, 14), 1, 768, 64, _F32, _BF16, heads=12, hidden=32, sized=True),
    Case("ViT-B/16 bf16, refined", (14, 14), 1, 768, 64, _BF16, _BF16, heads=12, hidden=32),
    Case("ViT-L/16 at 352 bf16", (22, 22), 1, 1024, 64, _BF16, _BF16),
    Case("ViT-L at 1024 bf16, refined", (64, 64), 1, 1024, 64, _BF16, _BF16, heads=16, hidden=32),
    Case("ViT-B/16 float64, refined", (14, 14), 1, 768, 64, _F64, _F64, hidden=32, batch=2),
)


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        spills: registers (AMD) or bytes of stack (NVIDIA) that live in memory; None: not known.
        fit: programs that run on one multiprocessor at once.
        programs: of a launch, by batch.
    """

    case: str
    target: str
    kernel: str
    registers: int | None
    spills: int | None
    shared: int
    warps: int
    stages: int
    fit: int = 0
    programs: dict[int, int] = field(default_factory=dict)

    def waves(self) -> dict[int, int]:
        """By batch, how often all multiprocessors are filled with programs."""
        from . import configs

        at_once = max(1, self.fit) * configs.TABLES[self.target].multiprocessors
        return {batch: -(-programs // at_once) for batch, programs in self.programs.items()}


def fitting(target: str, registers: int | None, shared: int, warps: int) -> int:
    """Programs of a kernel that run on one multiprocessor at once; an unknown number of registers counts as 32."""
    of, lanes = MULTIPROCESSORS[target], TARGETS[target][2]
    threads = lanes * warps
    taken = -(-(registers or 32) // 8) * 8 * threads
    return min(of.registers // taken, of.threads // threads, of.programs, of.shared // (shared + of.reserved or 1))


def arguments(case: Case, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> tuple[tuple, Callable[..., tuple]]:
    """The arguments of ``bdm_forward``, its tensors by ``make``; and what makes those of ``bdm_backward`` from its results."""
    n = case.prefix + case.grid[0] * case.grid[1]
    wide = _F64 if case.x == _F64 else _F32
    x = make((case.batch, n, case.dim), case.x)
    if case.heads > 1:  # the key third of a fused qkv projection
        key = make((case.batch, n, 3, case.heads, case.channels), case.key).permute(2, 0, 3, 1, 4)[1]
    else:
        key = make((case.batch, n, case.channels), case.key)
    size = make((case.batch, n, 1), wide) if case.sized else None
    down = make((case.hidden, case.channels), wide) if case.hidden else None
    up = make((case.channels, case.hidden), wide) if case.hidden else None
    inputs, problem = (x, key, size, down, up, None, None), (None, None, *case.grid, case.prefix, 1.0, True)
    needs = (True, case.sized, bool(case.hidden), not case.hidden, False)
    return (*inputs, *problem), lambda *results: (results[0], results[1], *inputs, *results, *problem, *needs)


def record(case: Case) -> list[tuple[Any, tuple, dict[str, Any], tuple[int, ...]]]:
    """The launches of one forward and backward, on tensors without storage."""
    from . import ops

    forward, backward = arguments(case, lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
    with ops.recording() as launches:
        ops._launch_backward(*backward(*ops._launch_forward(*forward)))
    return launches


class _AbsentGPU:
    """What Triton asks of a driver to compile for a GPU; it launches nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.name])

    def get_current_device(self) -> str:
        return self.name  # under which Triton keeps what it compiled

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextlib.contextmanager
def absent_gpu(name: str) -> Iterator[None]:
    """Triton takes a GPU of ``TARGETS`` for the one at hand, and so do the tables of configurations: to compile, not to run."""
    from triton.runtime import driver

    from . import configs

    before = driver._active
    driver.set_active(_AbsentGPU(name))
    try:
        with configs.pretend(name):
            yield
    finally:
        driver._active = before


def usage(kernel: Any, args: tuple, meta: dict[str, Any], grid: tuple[int, ...], case: str, target: str) -> Row:
    """Compiles one recorded launch as Triton would before making it (its cache is filled), inside :func:`absent_gpu`."""
    compiled = kernel.run(*args, grid=(1, 1, 1), warmup=True, **meta)
    found = _nvidia_usage(compiled.asm["cubin"]) if target.startswith("sm") else _amd_usage(compiled.asm["amdgcn"])
    metadata = compiled.metadata
    fit = fitting(target, found[0], metadata.shared, metadata.num_warps)
    return Row(case, target, kernel.fn.__name__, *found, metadata.shared, metadata.num_warps, metadata.num_stages, fit)


def launched_programs(case: Case) -> dict[str, dict[int, int]]:
    """Programs of each kernel's launch by batch; of several launches, of the largest. Nothing is compiled."""
    found: dict[str, dict[int, int]] = {}
    for batch in BATCHES:
        for kernel, _args, _meta, grid in record(replace(case, batch=batch)):
            programs = found.setdefault(kernel.fn.__name__, {})
            programs[batch] = max(programs.get(batch, 0), math.prod(grid))
    return found


def _nvidia_usage(cubin: bytes) -> tuple[int | None, int | None]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    # A kernel, and what it calls without inlining it.
    found = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if not found:
        return None, None
    return max(int(registers) for registers, _, _ in found), sum(int(stack) + int(local) for _, stack, local in found)


def _amd_usage(assembly: str) -> tuple[int | None, int | None]:
    """Vector registers; scalar ones spill into those, not into memory."""
    found = [re.search(rf"\.vgpr_{what}:\s*(\d+)", assembly) for what in ("count", "spill_count")]
    registers, spills = (int(f[1]) if f else None for f in found)
    return registers, spills


def compile_case(case: Case, target: str, kernels: tuple[str, ...] = ()) -> list[Row]:
    """Compiles the launches of one case for one target; ``kernels`` keeps only those of that name."""
    with absent_gpu(target):
        # A kernel that is launched several times, for several parts of a problem, is compiled once.
        launches = {launch[0]: launch for launch in record(case) if not kernels or launch[0].fn.__name__ in kernels}
        programs = launched_programs(case)
        rows = [usage(*launch, case.name, target) for launch in launches.values()]
        return [replace(row, programs=programs.get(row.kernel, {})) for row in rows]


def _line(row: Row) -> str:
    waves = row.waves()
    programs = "  ".join(f"B={batch}: {programs} ({waves[batch]})" for batch, programs in row.programs.items())
    return (
        f"{row.target:7} {row.case:28} {row.kernel:18} {row.registers!s:>4} registers {row.spills!s:>5} spilled "
        f"{row.shared / 1024:7.1f} KiB shared  {row.warps} warps {row.stages} stages {row.fit:2} fit"
        f"  programs (waves) {programs}"
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 1 where the fused forward spills or a kernel needs more shared memory than there is."""
    from . import configs
    from .primitives import INTERPRETED

    parser = argparse.ArgumentParser(prog="python -m fpet_kernels.triton.report", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--kernel", action="append", default=[], help="only kernels of this name")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel")
    options = parser.parse_args(argv)
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    failures = 0
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        for target in options.target or TARGETS:
            for row in compile_case(case, target, tuple(options.kernel)):
                bad = (row.kernel == "merge_short" and bool(row.spills)) or row.shared > configs.TABLES[target].shared
                failures += bad
                print(json.dumps(asdict(row)) if options.json else f"{_line(row)}{'  ✗' if bad else ''}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
