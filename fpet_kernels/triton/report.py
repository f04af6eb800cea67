"""What the compiler makes of the kernels, for GPUs that need not be there: registers, spills, shared memory.

    python -m fpet_kernels.triton.report                      # the representative shapes, every architecture of the tables
    python -m fpet_kernels.triton.report --target sm90 --case "ViT-B/16 bf16" --json

The launches are recorded from the launchers themselves, on tensors without storage, and compiled with the arguments'
specialisations (a 1, a multiple of 16) that Triton would find. Must not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["CASES", "TARGETS", "Case", "Row", "compile_case", "main"]

TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}


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
    """One compiled kernel. spills: registers (AMD) or bytes of stack (NVIDIA) that live in memory; None: not known."""

    case: str
    target: str
    kernel: str
    registers: int | None
    spills: int | None
    shared: int
    warps: int
    stages: int


def _record(case: Case, target: str, backward: bool = True) -> list[tuple[Any, tuple, dict[str, Any]]]:
    """The launches of one forward and backward."""
    from . import configs, ops

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n = case.prefix + case.grid[0] * case.grid[1]
    num_a, num_b = (case.grid[0] * case.grid[1] + 1) // 2, case.grid[0] * case.grid[1] // 2
    wide = _F64 if case.x == _F64 else _F32
    x = meta(case.batch, n, case.dim, dtype=case.x)
    key = meta(case.batch, n, case.channels, dtype=case.key)
    if case.heads > 1:  # the key third of a fused qkv projection
        qkv = meta(case.batch, n, 3, case.heads, case.channels, dtype=case.key)
        key = qkv.permute(2, 0, 3, 1, 4)[1]
    size = meta(case.batch, n, 1, dtype=wide) if case.sized else None
    down = meta(case.hidden, case.channels, dtype=wide) if case.hidden else None
    up = meta(case.channels, case.hidden, dtype=wide) if case.hidden else None
    tokens = meta(case.batch, case.prefix + num_b, case.dim, dtype=case.x)
    merged_size = meta(case.batch, case.prefix + num_b, 1, dtype=wide)
    index, mid = meta(case.batch, num_a, dtype=torch.int64), meta(case.batch, num_a, dtype=wide)
    problem = (None, None, *case.grid, case.prefix, 1.0, True)
    with configs.pretend(target), ops.recording() as launches:
        ops._launch_forward(x, key, size, down, up, None, None, *problem)
        if backward:
            ops._launch_backward(
                tokens, merged_size, x, key, size, down, up, None, None, tokens, merged_size, index, index, mid, *problem,
                True, case.sized, bool(case.hidden), not case.hidden, False,
            )  # fmt: skip
    return launches


_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64",
    torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


def _compile(kernel: Any, args: tuple, meta: dict[str, Any], target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in meta.items() if k in kernel.arg_names}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[at,] = [["tt.divisibility", 16]]
        elif name in meta or (type(value) is int and value == 1 and not kernel.params[at].do_not_specialize):
            signature[name] = "constexpr"
            constants[at,] = value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not kernel.params[at].do_not_specialize:
                attributes[at,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {name: meta[name] for name in ("num_warps", "num_stages") if name in meta}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _nvidia_usage(cubin: bytes) -> tuple[int | None, int | None]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    local = re.search(r"LOCAL:(\d+)", text)
    if found is None:
        return None, None
    return int(found[1]), int(found[2]) + (int(local[1]) if local else 0)


def _amd_usage(assembly: str) -> tuple[int | None, int | None]:
    """Vector registers; scalar ones spill into those, not into memory."""
    found = [re.search(rf"\.vgpr_{what}:\s*(\d+)", assembly) for what in ("count", "spill_count")]
    registers, spills = (int(f[1]) if f else None for f in found)
    return registers, spills


def compile_case(case: Case, target: str, kernels: tuple[str, ...] = ()) -> list[Row]:
    """Compiles the launches of one case for one target; ``kernels`` keeps only those of that name."""
    rows = []
    for kernel, args, meta in _record(case, target):
        name = kernel.fn.__name__
        if kernels and name not in kernels:
            continue
        compiled = _compile(kernel, args, meta, target)
        usage = _nvidia_usage(compiled.asm["cubin"]) if target.startswith("sm") else _amd_usage(compiled.asm["amdgcn"])
        warps, stages = compiled.metadata.num_warps, compiled.metadata.num_stages
        rows.append(Row(case.name, target, name, *usage, compiled.metadata.shared, warps, stages))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 1 where a short-grid kernel spills or a kernel needs more shared memory than there is."""
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
                short = row.kernel in ("merge_short", "backward_short")
                bad = (short and bool(row.spills)) or row.shared > configs.TABLES[target].shared
                failures += bad
                if options.json:
                    print(json.dumps(asdict(row)), flush=True)
                else:
                    print(
                        f"{row.target:7} {row.case:28} {row.kernel:24} {row.registers!s:>4} registers "
                        f"{row.spills!s:>5} spilled "
                        f"{row.shared / 1024:7.1f} KiB shared  {row.warps} warps {row.stages} stages{'  ✗' if bad else ''}",
                        flush=True,
                    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
