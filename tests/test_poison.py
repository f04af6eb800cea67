"""Outputs are written in full: memory that comes uninitialised is filled with NaN and huge integers first."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpet_kernels import backends, bdm_unmerge
from support import Problem, backward_op_args, full_problem, op_args, random_problem, run


@pytest.fixture
def poison():
    """torch.empty and its kin return NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield lambda on: torch.use_deterministic_algorithms(on, warn_only=True)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def problems(device: str) -> list[Problem]:
    return [
        full_problem(grid=(7, 5), prefix=3, device=device),
        full_problem(grid=(1, 4), prefix=0, dim=1, channels=1, heads=1, hidden=1, device=device),
        full_problem(grid=(4, 4), dtype=torch.bfloat16, device=device),
        full_problem(grid=(4, 4), dtype=torch.float64, device=device),
        full_problem(grid=(5, 4), batch=0, device=device),  # the gradients of the weights are zeros, not whatever was there
        random_problem((6, 6), device=device),
    ]


@pytest.mark.parametrize("index", range(6))
def test_no_output_element_is_left_out(index, backend, device, poison):
    problem = problems(device)[index]
    poison(False)
    want = run(problem, backend)
    poison(True)
    got = run(problem, backend)
    for name, value in want.items():
        assert value.isfinite().all(), f"{name} is not finite to begin with"
        assert torch.equal(got[name], value), name


def test_gradients_of_the_operator_for_every_need(fused, device, poison):
    problem = full_problem(grid=(5, 4), device=device)
    forward, backward = backends.forward_op(fused), backends.backward_op(fused)
    poison(False)
    outputs = forward(*op_args(problem))
    want = backward(*backward_op_args(problem, outputs))
    poison(True)
    for got, clean in zip(forward(*op_args(problem)), outputs, strict=True):
        assert torch.equal(got, clean)
    for needs in itertools.product((False, True), repeat=5):
        for got, clean in zip(backward(*backward_op_args(problem, outputs, needs)), want, strict=True):
            assert got.numel() == 0 or torch.equal(got, clean)


def test_unmerge(device, poison):
    tokens = torch.randn(2, 1 + 10, 5, device=device, requires_grad=True)
    match = torch.full((2, 10), 3, device=device)  # most destinations get nothing back but their own position's gradient
    out = bdm_unmerge(tokens, match, grid_size=(4, 5))
    (grad,) = torch.autograd.grad(out, tokens, torch.ones_like(out))
    assert out.isfinite().all()
    assert torch.equal(grad[..., 0], torch.ones(2, 11, device=device).index_fill(1, torch.tensor([3], device=device), 11.0))


SCRIPT = """
import sys
import torch
from support import check, full_problem, random_problem

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for similarity in ("cosine", "dot"):
            check(full_problem(grid=(9, 8), batch=5, dim=33, channels=17, hidden=7, dtype=dtype, similarity=similarity), sys.argv[1])
            check(random_problem((5, 3), batch=1, prefix=0, dim=3, channels=2, dtype=dtype, similarity=similarity), sys.argv[1])
"""


@pytest.mark.parametrize("byte", [0x80, 0x01])
def test_poisoned_heap(byte, fused, device, max_tokens):
    """glibc fills what malloc returns with the complement of MALLOC_PERTURB_: 0x7F7F… is huge, 0xFEFE… hugely negative.

    It reaches workspaces and memory that does not come from PyTorch's empty.
    """
    if device != "cpu" or max_tokens < 100:
        pytest.skip("the heap belongs to the CPU's kernels")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, fused],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "MALLOC_PERTURB_": str(byte)},
    )
    assert done.returncode == 0, done.stderr
