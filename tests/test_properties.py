"""Any problem the contract admits, drawn by hypothesis: shapes, strides, dtypes, options, splits; forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpet_kernels import Split, alternating, checkerboard, checkerboard_3d, second_checkerboard
from support import DTYPES, Problem, check, full_problem, run, size_dtype

SIZES = (1, 2, 3, 7, 8, 12, 16, 31, 33, 64, 65)  # widths around the vector lengths of every instruction set, and 1
LAYOUTS = ("contiguous", "transposed", "stepped", "offset", "expanded", "padded")


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` (of its first image, for "expanded") under other strides."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "stepped":  # every stride doubled, the last one too
        wide = t.new_full(tuple(2 * s for s in t.shape), float("nan") if t.is_floating_point() else 1)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if layout == "offset":  # odd storage offset: no alignment to count on
        return torch.cat((t.new_ones(1), t.flatten()))[1:].view(t.shape)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "padded":  # rows longer than they are used: a slice of a wider, fused buffer
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan") if t.is_floating_point() else 1)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]
    return t


def slice_of_qkv(key: Tensor, heads_first: bool) -> Tensor:
    """The same key as a view of a fused (B, N, 3, heads, C) projection, whose queries and values are NaN."""
    if key.dim() == 3:
        qkv = key.new_full((*key.shape[:2], 3 * key.shape[2]), float("nan"))
        qkv[..., key.shape[2] : 2 * key.shape[2]] = key
        return qkv[..., key.shape[2] : 2 * key.shape[2]]
    batch, heads, n, channels = key.shape
    if heads_first:  # (3, B, heads, N, C), as after timm's permute and a copy
        qkv = key.new_full((3, *key.shape), float("nan"))
        qkv[1] = key
        return qkv[1]
    qkv = key.new_full((batch, n, 3, heads, channels), float("nan"))
    qkv[:, :, 1] = key.transpose(1, 2)
    return qkv.permute(2, 0, 3, 1, 4)[1]


@st.composite
def splits(draw: st.DrawFn, most: int) -> tuple[Split, tuple[int, int] | None]:
    """A split of at most ``most`` tokens, and the grid if it is asked for by grid_size."""
    kind = draw(st.sampled_from(("grid", "grid", "grid", "checkerboard", "alternating", "second", "3d", "any")))
    sides = st.integers(1, 12)
    if kind in ("grid", "checkerboard"):
        grid = draw(st.tuples(sides, sides).filter(lambda s: 4 <= s[0] * s[1] <= most))
        return checkerboard(*grid), grid if kind == "grid" else None
    if kind == "alternating":
        return alternating(draw(st.integers(4, most))), None
    if kind == "second":
        grid = draw(st.tuples(st.integers(2, 11), st.integers(3, 11)).filter(lambda s: s[0] * s[1] <= 2 * most))
        return second_checkerboard(*grid), None
    if kind == "3d":
        grid3 = draw(
            st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)).filter(lambda s: 4 <= s[0] * s[1] * s[2] <= most)
        )
        return checkerboard_3d(*grid3), None
    n = draw(st.integers(3, most))  # down to no source at all
    order = torch.randperm(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    num_b = draw(st.integers(2, n - 1))
    return Split(n, order[num_b:].sort().values, order[:num_b].sort().values), None


@st.composite
def problems(draw: st.DrawFn, most: int) -> Problem:
    split, grid = draw(splits(min(most, 100) - 5))
    prefix, batch = draw(st.integers(0, 5)), draw(st.sampled_from((1, 2, 3, 5)))
    dim, channels = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    hidden = draw(st.sampled_from((0, 0, 1, 3, 8, 32)))
    heads = draw(st.sampled_from((0, 0, 1, 3, 4)))
    main = draw(st.sampled_from(DTYPES))  # one dtype for all, or each its own
    dtypes = st.just(main) if draw(st.booleans()) else st.sampled_from(DTYPES)
    n, merged = prefix + split.num_tokens, prefix + split.b.numel()
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    layouts = st.sampled_from(LAYOUTS)

    def tensor(*shape: int, dtype: torch.dtype | None = None, values: Tensor | None = None) -> Tensor:
        values = torch.randn(shape, generator=g) if values is None else values
        return lay_out(values.to(dtype or draw(dtypes)), draw(layouts))

    x, key_dtype = tensor(batch, n, dim, dtype=main), draw(dtypes)
    key = torch.randn((batch, heads, n, channels) if heads else (batch, n, channels), generator=g).to(key_dtype)
    layout = draw(st.sampled_from(("qkv", "heads first", *LAYOUTS)))
    key = slice_of_qkv(key, layout == "heads first") if layout in ("qkv", "heads first") else lay_out(key, layout)
    weights = draw(dtypes)
    mask = None
    if hidden and draw(st.booleans()):
        keep = torch.rand(batch, n, hidden, generator=g) > 0.3
        mask = lay_out(keep if draw(st.booleans()) else keep.to(draw(dtypes)) / 0.7, draw(layouts))
    return Problem(
        x=x,
        key=key,
        split=split,
        grid_size=grid,
        num_prefix_tokens=prefix,
        size=tensor(batch, n, 1, values=torch.randint(1, 9, (batch, n, 1), generator=g)) if draw(st.booleans()) else None,
        w_down=tensor(hidden, channels, dtype=weights, values=torch.randn(hidden, channels, generator=g) / 2)
        if hidden
        else None,
        w_up=tensor(channels, hidden, dtype=weights, values=torch.randn(channels, hidden, generator=g) / 2) if hidden else None,
        dropout_mask=mask,
        key_delta=tensor(batch, n, channels) if draw(st.booleans()) else None,
        scale=draw(st.sampled_from((1.0, 0.1, -2.5, 0.0))),
        similarity=draw(st.sampled_from(("cosine", "cosine", "dot"))),
        detach_key=draw(st.booleans()),
        grad_tokens=tensor(batch, merged, dim, dtype=main) if draw(st.integers(0, 9)) else None,
        grad_size=tensor(batch, merged, 1, dtype=size_dtype(main)) if draw(st.booleans()) else None,
    )


def test_any_problem(backend, device, max_tokens):
    examples = 12 if max_tokens < 100 else 150

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(problems(max_tokens))
    def judge(problem: Problem) -> None:
        problem = problem.on(device)
        before = problem.map(torch.clone)
        check(problem, backend)
        for name in ("x", "key", "size", "w_down", "w_up", "dropout_mask", "key_delta", "grad_tokens", "grad_size"):
            t = getattr(problem, name)
            assert t is None or torch.equal(t, getattr(before, name)), f"{name} was written to in {problem}"

    judge()


def test_long_sequences(backend, device, max_tokens):
    """More tokens than one tile of any kernel, and widths of real models."""
    for grid, dim, channels, prefix in (((14, 14), 192, 64, 1), ((23, 23), 64, 64, 5), ((3, 101), 32, 48, 0)):
        if prefix + grid[0] * grid[1] <= max_tokens:
            check(full_problem(grid=grid, dim=dim, channels=channels, prefix=prefix, batch=2, device=device), backend)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_empty_batch(similarity, backend, device):
    got = run(full_problem(batch=0, similarity=similarity, device=device), backend)
    assert got["tokens"].shape == (0, 11, 12) and got["size"].shape == (0, 11, 1) and got["match"].shape == (0, 10)
    assert not got["grad_w_up"].any() and not got["grad_w_down"].any()
