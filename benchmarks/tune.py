"""Times launch configurations of the Triton kernels on this GPU and prints the rows for fpet_kernels/triton/configs.py.

    python benchmarks/tune.py                       # every shape class of the vision transformers, both directions
    python benchmarks/tune.py --dtype float32 --destinations 128 --write rows.txt

A candidate that fails to compile, needs more shared memory than there is, or gives another result than the plain PyTorch
reference is passed over, and said so. The inputs are rotated so that the L2 cache is cold.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fpet_kernels import backends, checkerboard
from fpet_kernels.reference import bdm_merge_reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GRIDS = {16: (5, 6), 32: (8, 8), 64: (10, 12), 128: (14, 14), 256: (20, 22)}  # destinations rounded up -> a grid with as many
COPIES_BYTES = 1 << 29  # rotated inputs together exceed any L2 cache


def candidates() -> Iterator[tuple[int, int, int, int]]:
    """(block_a, block_d, warps, stages)."""
    yield from itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))


class Trial:
    """One shape class on the device: inputs, calls, and the result that every candidate must give."""

    def __init__(self, destinations: int, dtype: torch.dtype, raw: bool, dim: int, batch: int) -> None:
        self.grid, self.dim, self.batch, self.raw = GRIDS[destinations], dim, batch, raw
        split = checkerboard(*self.grid)
        n = 1 + split.num_tokens
        key_dtype = dtype if dtype != torch.float32 else torch.bfloat16
        bytes_each = batch * n * dim * dtype.itemsize
        self.inputs = []
        for _ in range(max(2, COPIES_BYTES // bytes_each)):
            x = torch.randn(batch, n, dim, device="cuda", dtype=dtype)
            key = torch.randn(batch, n, 64, device="cuda", dtype=key_dtype)
            delta = None if raw else torch.randn(batch, n, 64, device="cuda", dtype=key_dtype)
            self.inputs.append((x, key, None, None, None, None, delta, None, None, *self.grid, 1, 1.0, True))
        x, key, *_, delta = self.inputs[0][:7]
        wanted = bdm_merge_reference(x[:4], key[:4], split=split, key_delta=None if delta is None else delta[:4])
        self.tokens, self.match = wanted[0], wanted[2]
        self.forward = backends.forward_op("triton")
        self.backward = backends.backward_op("triton")
        self.outputs = [self.forward(*i) for i in self.inputs]
        self.gradients = self._run_backward(0)

    def _run_backward(self, at: int) -> tuple:
        outputs = self.outputs[at]
        return self.backward(
            outputs[0], None, *self.inputs[at][:7], *outputs, *self.inputs[at][7:], True, False, False, True, False
        )

    def call(self, backward: bool) -> Callable[[int], tuple]:
        return self._run_backward if backward else lambda at: self.forward(*self.inputs[at])

    def wrong(self, backward: bool) -> str | None:
        """Why the configuration in force is no good."""
        if not backward:
            tokens, _, match, _, _ = self.forward(*self.inputs[0])
            if (match[:4] != self.match).float().mean() > 1e-3:
                return "matches differ"
            # Where a near tie fell the other way, two rows differ; the rest must agree.
            close = torch.isclose(tokens[:4].float(), self.tokens.float(), rtol=2e-2, atol=2e-2).float().mean()
            return None if close > 0.995 else "tokens differ"
        for got, want in zip(self._run_backward(0), self.gradients, strict=True):
            if got.numel() and (got - want).float().norm() > 1e-2 * want.float().norm():
                return "gradients differ"
        return None

    def milliseconds(self, backward: bool, seconds: float) -> float:
        """Median over rotated inputs."""
        call = self.call(backward)
        times: list[float] = []
        for at in range(len(self.inputs)):
            call(at)
        torch.cuda.synchronize()
        while sum(times) < 1e3 * seconds or len(times) < 20:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for at in range(len(self.inputs)):
                call(at)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / len(self.inputs))
        return sorted(times)[len(times) // 2]


def tune(
    trial: Trial, table: str, key: tuple[int, bool, int], backward: bool, seconds: float
) -> tuple[str, list[tuple[float, tuple[int, int, int, int]]]]:
    """The best configuration as a line of the table, and all timings."""
    from fpet_kernels.triton import configs

    direction = "backward" if backward else "forward"
    frozen = configs.TABLES[table]
    found, failures = [], []
    for candidate in candidates():
        tried = replace(frozen, **{direction: getattr(frozen, direction) | {key: configs.Short(*candidate)}})
        configs.TABLES["tried"] = tried
        with configs.pretend("tried"):
            try:
                why = trial.wrong(backward)
                if why is None:
                    found.append((trial.milliseconds(backward, seconds), candidate))
            except Exception as error:  # a compiler may fail in any way: that candidate is out
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if why is not None:
                failures.append(f"{candidate}: {why}")
    del configs.TABLES["tried"]
    for failure in failures:
        print(f"  passed over {failure}", file=sys.stderr)
    if not found:
        return f"    # {direction} {key}: no candidate ran", []
    found.sort()
    best = found[0]
    return f"    {key}: Short{best[1]},  # {direction}, {best[0] * 1e3:.1f} µs at batch {trial.batch}, D {trial.dim}", found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of x; default bfloat16 and float32")
    parser.add_argument("--destinations", type=int, choices=GRIDS, action="append", help="shape classes; default 128 and 256")
    parser.add_argument("--direction", choices=("forward", "backward"), action="append", help="default both")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.2, help="per candidate")
    parser.add_argument("--write", type=Path, help="also append the rows to this file")
    options = parser.parse_args(argv)
    why_not = backends.refuses("triton", torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu"))
    if not torch.cuda.is_available() or why_not is not None:
        print(f"tune: needs a GPU that Triton knows: {why_not or 'torch sees none'}", file=sys.stderr)
        return 1

    from fpet_kernels.triton import configs

    device = torch.device("cuda", torch.cuda.current_device())
    table = configs.architecture_of(device.type, device.index)
    lines = [f"# {torch.cuda.get_device_name()} ({table}), torch {torch.__version__}"]
    for dtype, destinations, raw, direction in itertools.product(
        options.dtype or ["bfloat16", "float32"], options.destinations or [128, 256], (True, False),
        options.direction or ["forward", "backward"],
    ):  # fmt: skip
        trial = Trial(destinations, DTYPES[dtype], raw, options.dim, options.batch)
        key = (DTYPES[dtype].itemsize, raw, destinations)
        line, _ = tune(trial, table, key, direction == "backward", options.seconds)
        lines.append(line)
        print(line, flush=True)
    if options.write:
        with options.write.open("a") as file:
            file.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
