"""What happens on the host before a Triton kernel runs: which launches are compiled anew, what they are given, and where.

Nothing is compiled and nothing runs: Triton binds the arguments for a GPU that is not there.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from copy import copy
from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "") not in ("", "0"), reason="TRITON_INTERPRET is set: nothing is launched"
    ),
]

CASES = {
    "short": dict(),
    "short, no refinement": dict(hidden=0, heads=1),
    "tiled": dict(grid=(32, 32)),
    "float32": dict(x=torch.float32),
}


class FakeKernel:
    """A compiled kernel; notes what it is run with."""

    function, packed_metadata = "function", "packed metadata"

    def __init__(self, name: str) -> None:
        self.name, self.runs = name, []

    def launch_metadata(self, grid, stream, *args):
        return "launch metadata", tuple(grid), stream, args

    def run(self, *args):
        self.runs.append(args)


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that Triton would have compiled, in a list that grows."""
    from triton.runtime import jit

    from fpet_kernels.triton import backward, long, ops, short
    from fpet_kernels.triton.report import absent_gpu

    found: list[FakeKernel] = []

    def compile_nothing(self, key, *_):
        found.append(FakeKernel(self.fn.__name__))
        self.device_caches["sm90"][0][key] = found[-1]
        return found[-1]

    for module in (backward, long, short):
        for kernel in vars(module).values():
            if isinstance(kernel, jit.JITFunction):
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(ops, "_PROBLEMS", {})
    with absent_gpu("sm90"):
        yield found


def run(
    batch: int, *, grid: tuple[int, int] = (14, 14), x: torch.dtype = torch.bfloat16, hidden: int = 32, heads: int = 12,
    shift: int = 0,
) -> None:  # fmt: skip
    """Forward and backward of a ViT-B/16, on tensors without storage; ``shift`` elements off the start of x's memory."""
    from fpet_kernels.triton import ops

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n = 1 + grid[0] * grid[1]
    tokens_in = empty(batch, n, 768, dtype=x)
    key = empty(batch, n, 3, heads, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)[1]
    weights = (empty(hidden, 64), empty(64, hidden)) if hidden else (None, None)
    inputs = (tokens_in, key[:, 0] if heads == 1 else key, None, *weights, None, None)
    problem = (None, None, *grid, 1, 1.0, True)
    outputs = ops.forward(*inputs, *problem)
    needs = (True, False, bool(hidden), not hidden, False)
    ops.backward(outputs[0], outputs[1], *inputs, *outputs, *problem, *needs)


@pytest.mark.parametrize("case", CASES)
def test_another_batch_compiles_nothing(case, compiled):
    options = CASES[case]
    run(2, **options)
    first = len(compiled)
    assert first >= 2
    for batch in (1, 3, 16, 64, 100, 256, 300):
        run(batch, **options)
        again = [kernel.name for kernel in compiled[first:]]
        assert not again, f"batch {batch} compiled {again}"


def test_another_grid_of_the_same_class_compiles_nothing(compiled):
    run(4, grid=(14, 14))
    first = len(compiled)
    for grid in ((12, 16), (15, 15), (16, 16)):
        run(4, grid=grid)
        again = [kernel.name for kernel in compiled[first:]]
        assert not again, f"grid {grid} compiled {again}"


@pytest.mark.parametrize("case", CASES)
def test_the_short_cut_makes_the_call_that_triton_makes(case, compiled, monkeypatch):
    """A second launch goes straight to the compiled kernel, with the arguments that Triton gave it the first time."""
    from fpet_kernels.triton import ops

    calls = []
    launch = ops._Launch.__call__
    monkeypatch.setattr(ops._Launch, "__call__", lambda self, *tensors: (calls.append((self, tensors)), launch(self, *tensors)))
    run(3, **CASES[case])
    monkeypatch.undo()
    assert ops._SHORTCUT and len(calls) >= 2
    for made, tensors in calls:
        kernel = FakeKernel(made.kernel.fn.__name__)
        direct = copy(made)
        direct.device, direct.compiled = "sm90", kernel
        direct(*tensors)
        own = next(k for k in compiled if k.name == kernel.name).runs[-1]
        assert same(own, kernel.runs[0]), kernel.name


def same(one: object, other: object) -> bool:
    """Equal, tensors the very same."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or (not isinstance(one, torch.Tensor) and one == other)


def test_launches_leave_nothing_behind(compiled):
    """Torch's table of traced launches grows with every launch that goes through it; calls that nobody traces don't."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    before = len(kernel_side_table.constant_args), len(kernel_side_table.id_to_kernel)
    run(2)
    assert compiled
    assert (len(kernel_side_table.constant_args), len(kernel_side_table.id_to_kernel)) == before


def test_problems_are_remembered_and_forgotten(compiled, monkeypatch):
    from fpet_kernels.triton import ops

    monkeypatch.setattr(ops, "_MOST_PROBLEMS", 4)
    run(2)
    kept = list(ops._PROBLEMS.values())
    run(2)
    assert [a is b for a, b in zip(kept, ops._PROBLEMS.values(), strict=True)] == [True, True]
    for batch in range(3, 12):
        run(batch)
        assert len(ops._PROBLEMS) <= 4


def test_alignment_is_part_of_the_key():
    """Triton compiles another kernel for pointers that are no multiple of 16: it must not be taken for the aligned one."""
    from fpet_kernels.triton import ops

    memory = torch.empty(2 * 17 * 16 + 1)
    aligned, shifted = memory[:-1].view(2, 17, 16), memory[1:].view(2, 17, 16)
    assert aligned.stride() == shifted.stride()
    assert ops._signature((aligned,)) != ops._signature((shifted,))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_kernels_run_where_their_tensors_are(kind, monkeypatch):
    from fpet_kernels.triton import ops

    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch, kind, SimpleNamespace(current_device=lambda: 0, device=Guard))
    with ops._on_device(torch.device(kind, 0)):
        assert entered == []
    with ops._on_device(torch.device(kind, 1)):
        assert entered == [torch.device(kind, 1)]
    assert entered[-1] == "left"
    with ops._on_device(torch.device("cpu")):
        assert len(entered) == 2
