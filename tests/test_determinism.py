"""Bitwise the same result: run to run, on any number of threads, and for one image in whatever batch it sits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import Problem, full_problem, run

PER_IMAGE = ("tokens", "size", "match", "grad_x", "grad_size", "grad_key_delta", "grad_key")
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
SIMILARITY = pytest.mark.parametrize("similarity", ["cosine", "dot"])


def images(problem: Problem, index: list[int]) -> Problem:
    """Some images of a batch; the weights stay."""
    names = ("x", "key", "size", "dropout_mask", "key_delta", "grad_tokens", "grad_size")
    return replace(problem, **{name: getattr(problem, name)[index] for name in names})


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], names: tuple[str, ...], what: str) -> None:
    for name in names:
        differ = int((got[name] != want[name]).sum())
        assert differ == 0, f"{name} differs in {differ} of {got[name].numel()} elements {what}"


@DTYPE
@SIMILARITY
def test_run_to_run(dtype, similarity, backend, device, max_tokens):
    grid = (7, 8) if max_tokens < 100 else (14, 14)
    problem = full_problem(grid=grid, batch=3, dim=40, channels=24, dtype=dtype, similarity=similarity, device=device)
    first = run(problem, backend)
    for _ in range(3):
        assert_same(run(problem, backend), first, tuple(first), "between two runs")


@DTYPE
@pytest.mark.parametrize(("batch", "grid"), [(1, (14, 14)), (1, (40, 40)), (3, (14, 14)), (8, (7, 7)), (64, (4, 4))])
def test_thread_counts(batch, grid, dtype, fused, device, max_tokens, threads):
    if device != "cpu":
        pytest.skip("kernels on a GPU take no threads from PyTorch")
    if grid[0] * grid[1] * batch > 4 * max_tokens:
        pytest.skip("too many tokens for the interpreter")
    problem = full_problem(grid=grid, batch=batch, dim=40, channels=24, dtype=dtype)
    threads(1)
    want = run(problem, fused)
    for count in (2, 3, 4):
        threads(count)
        assert_same(run(problem, fused), want, tuple(want), f"between 1 and {count} threads")


@DTYPE
def test_batch_composition(dtype, fused, device, max_tokens, threads):
    """One image alone and inside batches of every size that kernels may schedule differently, anywhere in the batch."""
    grid, sizes = ((7, 7), (1, 2, 3)) if max_tokens < 100 else ((14, 14), (1, 2, 3, 7, 64))
    problem = full_problem(grid=grid, batch=max(sizes), dim=24, channels=16, dtype=dtype, device=device)
    for count in (1, 2):
        threads(count)
        want = run(problem, fused)
        for size in sizes:
            index = [(5 * i + 2) % max(sizes) for i in range(size)]
            got = run(images(problem, index), fused)
            assert_same(got, {n: want[n][index] for n in PER_IMAGE}, PER_IMAGE, f"in a batch of {size}, {count} threads")


def test_equal_images_get_equal_results(fused, device):
    problem = images(full_problem(batch=1, device=device), [0] * 9)
    got = run(problem, fused)
    for name in PER_IMAGE:
        assert (got[name] == got[name][:1]).all(), name
