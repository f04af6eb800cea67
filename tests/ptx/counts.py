"""What the programs of each kernel do for one image: instructions, barriers, bytes, round trips to memory.

PYTHONPATH=tests:. python -m ptx.counts                              # ViT-B/16 in bfloat16, refined, on sm80 and sm90
PYTHONPATH=tests:. python -m ptx.counts --target sm90 --case "ViT-B/16 bf16" --batch 16
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

import torch

__all__ = ["CASE", "Count", "count"]

CASE = "ViT-B/16 bf16, refined"


@dataclass(frozen=True)
class Count:
    """A kernel's work for one image. Means over its programs, but ``longest``, the instructions of the longest one."""

    kernel: str
    programs: int
    warps: int
    instructions: float
    longest: int
    barriers: float
    round_trips: float
    loaded: float
    stored: float

    def __str__(self) -> str:
        return (
            f"{self.kernel:18} {self.programs:4} programs of {self.warps} warps: {self.instructions:7.0f} instructions "
            f"(longest {self.longest:6}), {self.round_trips:5.1f} round trips, {self.barriers:5.1f} barriers, "
            f"{self.loaded / 1024:6.1f} KiB loaded, {self.stored / 1024:5.1f} KiB stored; "
            f"{self.programs * self.warps * self.instructions / 1e3:6.0f} thousand warp instructions an image"
        )


def count(name: str, target: str, batch: int = 64) -> list[Count]:
    """Executes forward and backward of one image, shared out as in a batch of ``batch``."""
    from fpet_kernels.triton import configs, ops, report

    from .emulate import emulated

    case = replace(next(case for case in report.CASES if case.name == name), batch=1)
    table = configs.TABLES[target]
    configs.TABLES["one image"] = replace(table, multiprocessors=max(1, table.multiprocessors // batch))
    generator = torch.Generator().manual_seed(0)
    forward, backward = report.arguments(case, lambda shape, dtype: torch.randn(shape, generator=generator).to(dtype))
    with emulated(target) as emulation, configs.pretend("one image"):
        ops._launch_backward(*backward(*ops._launch_forward(*forward)))
    emulation.assert_clean()
    return [
        Count(
            kernel, math.prod(machine.grid), machine.threads // 32, machine.counts["instructions"] / machine.counts["programs"],
            machine.longest,
            *(machine.counts[what] / machine.counts["programs"]
              for what in ("barriers", "round trips", "bytes loaded", "bytes stored")),
        )
        for kernel, machine in emulation.machines
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=("sm80", "sm90"), help="default: both")
    parser.add_argument("--case", default=CASE, help=f"of fpet_kernels.triton.report; default {CASE}")
    parser.add_argument("--batch", type=int, default=64, help="in which the image is; default 64")
    options = parser.parse_args()
    import triton

    for target in options.target or ("sm80", "sm90"):
        print(f"{options.case}, {target}, triton {triton.__version__}, as in a batch of {options.batch}")
        for kernel in count(options.case, target, options.batch):
            print(f"  {kernel}", flush=True)


if __name__ == "__main__":
    main()
