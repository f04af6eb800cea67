"""Every source is matched, always: sizes add up in every dtype, on any input, and equal scores go to the lowest index."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fpet_kernels import bdm_merge, checkerboard, second_checkerboard
from support import DTYPES, Problem, full_problem, merge, random_problem, run, scores, size_dtype

GRIDS = ((14, 14), (7, 7), (1, 9), (2, 2))
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
SIMILARITY = pytest.mark.parametrize("similarity", ["cosine", "dot"])


def filled(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """A hostile (B, N, C) tensor."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "flat":
        t = t[:1, :1].expand(shape)
    elif kind == "tied":  # every vector appears many times
        t = t[:, [i % 3 for i in range(shape[1])]]
    elif kind == "zero":
        t = torch.zeros(shape)
    elif kind == "tiny":
        t = t * torch.finfo(dtype).smallest_normal
    elif kind == "huge":
        t = t.sign() * torch.finfo(dtype).max / 1024
    elif kind in ("nan", "inf", "-inf"):
        t = torch.full(shape, float(kind))
    elif kind == "sprinkled":
        t.flatten()[::7] = float("nan")
        t.flatten()[3::11] = float("inf")
        t.flatten()[5::13] = float("-inf")
    elif kind == "nan in one destination":
        t[:, -1] = float("nan")
    return t.to(dtype)


KINDS = ("normal", "flat", "tied", "zero", "tiny", "huge", "nan", "inf", "-inf", "sprinkled", "nan in one destination")
FINITE = KINDS[:6]


def assert_conserved(problem: Problem, tokens: Tensor, size: Tensor, match: Tensor) -> None:
    """size' is the incoming sizes gathered by match: exactly, since they are small integers."""
    p, prefix = problem, problem.num_prefix_tokens
    batch, n = p.x.shape[:2]
    assert match.dtype == torch.int64 and match.shape == (batch, p.split.a.numel())
    assert ((match >= prefix) & (match < prefix + p.split.b.numel())).all()
    incoming = torch.ones(batch, n, 1, dtype=torch.float64) if p.size is None else p.size.double().cpu()
    a, b = p.split.a + prefix, p.split.b + prefix
    want = torch.cat((incoming[:, :prefix], incoming[:, b]), 1).scatter_add(1, match.cpu()[..., None], incoming[:, a])
    assert size.dtype == size_dtype(p.x.dtype)
    assert torch.equal(size.double().cpu(), want)
    assert torch.equal(size.double().cpu().sum((1, 2)), incoming.sum((1, 2)))


@DTYPE
@SIMILARITY
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_keys(kind, similarity, dtype, backend, device, max_tokens):
    interpreted = max_tokens < 100
    for grid in GRIDS[2:] if interpreted else GRIDS:
        for prefix in (1,) if interpreted else (0, 1, 5):
            problem = random_problem(grid, dtype=dtype, prefix=prefix, size=prefix == 1, similarity=similarity)
            problem = replace(problem, key=filled(problem.key.shape, kind, dtype)).on(device)
            merged = merge(problem, backend)
            assert_conserved(problem, *merged)
            assert merged.tokens.isfinite().all(), "finite tokens became infinite or NaN by a key"
            if kind == "nan in one destination" and problem.split.b[-1] == problem.split.num_tokens - 1 > 3:
                assert (merged.match < prefix + problem.split.b.numel() - 1).all(), "a NaN score won over a finite one"


@DTYPE
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_tokens(kind, dtype, backend, device):
    problem = random_problem((5, 6), dtype=dtype, size=True)
    problem = replace(problem, x=filled(problem.x.shape, kind, dtype)).on(device)
    merged = merge(problem, backend)
    assert_conserved(problem, *merged)
    if kind in FINITE:
        assert merged.tokens.isfinite().all()
    if kind == "flat":  # a mean of equal tokens is that token, to the last rounding
        torch.testing.assert_close(merged.tokens, problem.x[:, : merged.tokens.shape[1]])


@DTYPE
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "sprinkled", "zero", "huge"])
def test_backward_survives(kind, dtype, backend, device):
    """No crash on hostile input, gradients of the right shapes, and none of it in other images."""
    problem = full_problem(grid=(5, 6), batch=3, dtype=dtype)
    for name in ("x", "key", "key_delta", "size", "grad_tokens"):
        t = getattr(problem, name).clone()
        t[1] = filled((1, *t[1:2].flatten(1, -2).shape[1:]), kind, dtype)[0].view(t[1].shape)
        hostile = replace(problem, **{name: t}).on(device)
        got, clean = run(hostile, backend), run(problem.on(device), backend)
        assert ((got["match"] >= 1) & (got["match"] < 16)).all()
        for output in ("tokens", "size", "match", "grad_x", "grad_size", "grad_key_delta", "grad_key"):
            assert got[output].shape == clean[output].shape
            assert torch.equal(got[output][::2], clean[output][::2]), f"{name} of one image changed {output} of another"


@DTYPE
@SIMILARITY
def test_ties_go_to_the_lowest_index(similarity, dtype, backend, device):
    """Keys of ±1 in 16 channels have exact norms and scores in every dtype, so the ties are exact."""
    for seed in range(4):
        problem = random_problem((6, 7), channels=16, dtype=dtype, similarity=similarity, seed=seed)
        few = filled((2, 5, 16), "normal", torch.float64, seed).sign()
        problem.key = few[:, torch.arange(43) * 7 % 5].to(dtype)
        exact = scores(problem.double())
        assert ((exact == exact.amax(-1, keepdim=True)).sum(-1) > 1).all(), "no tie, nothing tested"
        merged = merge(problem.on(device), backend)
        assert torch.equal(merged.match.cpu(), exact.argmax(-1) + 1)


@DTYPE
@SIMILARITY
def test_identical_destinations_tie(similarity, dtype, fused, device, max_tokens):
    """Destinations with the same key, whatever its values, get the same score wherever they sit in the row.

    Not asked of the reference: a BLAS may sum the last columns of a matrix product in another order.
    """
    for grid in ((14, 14), (5, 9), (1, 7)):
        if grid[0] * grid[1] + 1 > max_tokens:
            continue
        for channels in (5, 64):
            problem = random_problem(grid, channels=channels, dtype=dtype, similarity=similarity)
            problem.key[:, problem.split.b + 1] = problem.key[:1, :1].clone()
            merged = merge(problem.on(device), fused)
            assert (merged.match == 1).all(), (
                f"{int((merged.match != 1).sum())} of {merged.match.numel()} not to the lowest index"
            )
            assert (merged.size[:, 1] == 1 + problem.split.a.numel()).all()


def test_a_nan_token_reaches_only_its_own_destination(fused, device):
    problem = random_problem((6, 6), batch=1)
    source = int(problem.split.a[4]) + 1
    problem.x[0, source] = float("nan")
    tokens, _, match = merge(problem.on(device), fused)
    assert tokens.isnan().any(-1).nonzero().tolist() == [[0, int(match[0, 4])]]


def test_merging_again_keeps_the_sum(backend, device):
    """Layer after layer: the sizes of one merge are the input of the next, down to a few tokens."""
    problem = random_problem((8, 8), batch=3, prefix=2, size=True, device=device)
    x, size = problem.x, problem.size
    total = size.double().sum((1, 2))
    for split in (checkerboard(8, 8), second_checkerboard(8, 8), checkerboard(4, 4)):
        x, size, _ = bdm_merge(x, x, split=split, num_prefix_tokens=2, size=size, backend=backend)
        assert torch.equal(size.double().sum((1, 2)), total)
    assert x.shape[1] == 2 + 8
