"""How merged tokens travel through a model: as values, from block to block, never as state of a module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

from fpet_kernels import Merged, Split, bdm_merge, bdm_unmerge, checkerboard, second_checkerboard
from fpet_kernels.split import real_cpu_tensors

__all__ = [
    "MergeRecord", "MergeStep", "SizeBias", "SymbolicGrid", "kept_positions", "merge_splits", "pool_by_size", "refuse_fx",
    "select_rows_and_columns", "token_count", "unmerge",
]  # fmt: skip


class MergeStep(NamedTuple):
    """What a block needs to merge its tokens.

    Attributes:
        split: the patch tokens that come into the block, split into sources and destinations.
        size: (B, N, 1) tokens merged into each so far; None before the first merge.
        similarity: "cosine" or "dot".
        backend: of :func:`fpet_kernels.bdm_merge`; None takes the best.
        num_prefix_tokens: of the tokens that come in; None: whatever the split leaves.
    """

    split: Split | SymbolicGrid
    size: Tensor | None
    similarity: str = "cosine"
    backend: str | None = None
    num_prefix_tokens: int | None = None

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
        """Merges (B, N, D) ``x`` by (B, heads, N, C) ``key``; ``refinement`` is the block's KeyRefinement or None."""
        batch, n = x.shape[:2]
        weights = None if refinement is None else refinement.weights(batch, n)
        prefix = n - self.split.num_tokens if self.num_prefix_tokens is None else self.num_prefix_tokens
        size = self.size if self.size is None else self.size.to(x.device)  # a model may be spread over devices
        merged = bdm_merge(
            x, key, **_where(self.split), num_prefix_tokens=prefix, size=size, refinement=weights,
            similarity=self.similarity, backend=self.backend,
        )  # fmt: skip
        learned = weights is not None and (weights.w_down.requires_grad or weights.w_up.requires_grad)
        if learned or (self.size is not None and self.size.requires_grad) or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return merged
        # A gradient at these sizes would reach nothing, and costs attention its fastest kernels.
        return merged._replace(size=merged.size.detach())


class MergeRecord:
    """What a block that merges leaves here, so that its output is a tensor as any other block's: ``merged``."""

    __slots__ = ("merged",)

    def __init__(self) -> None:
        self.merged: Merged | None = None


class SymbolicGrid(NamedTuple):
    """Stands in for the checkerboard's :class:`Split` where the sides are symbols of an export."""

    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def _where(split: Split | SymbolicGrid) -> dict[str, Any]:
    """For fpet_kernels: the grid, where there is one, with which kernels need no lists and tracing no constants."""
    return {"split": split} if split.grid is None else {"grid_size": split.grid}


class SizeBias(NamedTuple):
    """Proportional attention: log(size) is added to the attention scores of every key.

    Attributes:
        log_size: (B, N), float32 or float64.
        form: "auto", "mask" or "column"; see :func:`fpet.vit.attention.attend`.
    """

    log_size: Tensor
    form: str = "auto"


@contextmanager
def _for_all() -> Iterator[None]:
    """What is made here serves all later calls: real tensors, and no part of what torch.jit.trace records."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with real_cpu_tensors():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _plan(height: int, width: int, count: int) -> tuple[tuple[Split, ...], tuple[Tensor, ...]]:
    """``count`` splits, and after each one the grid positions (int64, CPU) of the patch tokens that are left."""
    with _for_all():
        splits, kept, left = [], [], torch.arange(height * width)
        for step in range(count):
            if step % 2:
                split = second_checkerboard(height, width)
                height, width = height // 2, -(-width // 2)
            else:
                split = checkerboard(height, width)
            left = left[split.b]
            splits.append(split)
            kept.append(left)
        return tuple(splits), tuple(kept)


@functools.lru_cache(maxsize=256)
def _kept(height: int, width: int, count: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    patches = _plan(height, width, count)[1][count - 1]
    with _for_all():
        return torch.cat((torch.arange(num_prefix_tokens), patches + num_prefix_tokens)).to(device)


def merge_splits(height: int, width: int, count: int) -> tuple[Split | SymbolicGrid, ...]:
    """The splits of ``count`` merges in a row on a grid of ``height`` × ``width`` patches.

    The first is the paper's checkerboard. What it leaves is a grid turned by 45°, split again by the parity of the row
    (:func:`fpet_kernels.second_checkerboard`); what that leaves is a grid of half the size, and so on.

    Raises:
        ValueError: too few tokens are left to merge again; or the sides are symbols, of which only the first split is known.
    """
    if not _symbolic(height, width):
        return _constant_splits(height, width, count)
    if count > 1:
        raise ValueError(
            f"layer: expected one layer where height and width of the images are symbolic, got {count}; export with a fixed "
            f"image size, or with one merging layer"
        )
    return (SymbolicGrid((height, width)),) * count


def kept_positions(height: int, width: int, count: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """(M,) int64 on ``device``: which of the original tokens, prefix tokens first, are left after ``count`` merges."""
    if not _symbolic(height, width):
        return _constant_positions(height, width, count, num_prefix_tokens, device)
    first = 2 * torch.arange(height * width // 2, device=device)  # of two neighbours in raster order one is on an odd cell
    odd = (first // width + first % width) % 2
    return torch.cat((torch.arange(num_prefix_tokens, device=device), first + 1 - odd + num_prefix_tokens))


def _symbolic(*sides: int) -> bool:
    return any(isinstance(side, torch.SymInt) for side in sides)


# The tracer takes both tables as constants: they depend on the shape of the grid alone.
@torch.compiler.assume_constant_result
def _constant_splits(height: int, width: int, count: int) -> tuple[Split, ...]:
    return _plan(height, width, count)[0]


@torch.compiler.assume_constant_result
def _constant_positions(height: int, width: int, count: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    return _kept(height, width, count, num_prefix_tokens, device)


def select_rows_and_columns(attn_mask: Tensor, kept: Tensor) -> Tensor:
    """Of a mask (…, N, N) those of the tokens that are left; a dimension of 1 is broadcast, and stays."""
    for dim in (-2, -1):
        if attn_mask.dim() >= -dim and attn_mask.shape[dim] != 1:
            attn_mask = attn_mask.index_select(dim, kept)
    return attn_mask


def token_count(x: Tensor, grid: tuple[Any, Any], num_prefix_tokens: int) -> tuple[int, int]:
    """Rows and columns of patches, as numbers where torch.jit.trace makes tensors of them: a trace is for one image size.

    Raises:
        ValueError: x (B, N, D) has other tokens than ``num_prefix_tokens`` and the patches.
    """
    height, width = (int(side) if isinstance(side, Tensor) else side for side in grid)
    count = int(x.shape[1]) if isinstance(x.shape[1], Tensor) else x.shape[1]
    if count != num_prefix_tokens + height * width:
        raise ValueError(
            f"model: expected {num_prefix_tokens} prefix tokens and {height} × {width} patches, "
            f"{num_prefix_tokens + height * width} tokens in all, got {count}: merging needs every patch on the declared grid, "
            f"and tokens of one's own in front, counted in the model's num_prefix_tokens"
        )
    return height, width


def refuse_fx(images: Tensor) -> None:
    """TypeError under torch.fx's symbolic tracing."""
    if isinstance(images, Proxy):
        raise TypeError(
            "torch.fx can't follow a model that merges, which asks for the grid of its images; take features_only=True, "
            "forward_intermediates or forward hooks, export with torch.export, or trace with layer=None"
        )


def unmerge(tokens: Tensor, splits: tuple[Split | SymbolicGrid, ...], matches: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """(B, N, D) from (B, M, D): every original position gets the token that stands for it, through all merges so far."""
    for split, match in zip(reversed(splits[: len(matches)]), reversed(matches), strict=True):
        tokens = bdm_unmerge(tokens, match, **_where(split), num_prefix_tokens=num_prefix_tokens)
    return tokens


def pool_by_size(x: Tensor, size: Tensor, pool_type: str) -> Tensor:
    """timm's "avg", "max" and "avgmax" pooling of (B, M, D) as if each token were there ``size`` (B, M, 1) times."""
    if pool_type == "max":
        return x.amax(dim=1)
    weight = size / size.sum(dim=1, keepdim=True)
    average = (x * weight.to(x.dtype)).sum(dim=1)
    if pool_type == "avg":
        return average
    if pool_type == "avgmax":
        return 0.5 * (x.amax(dim=1) + average)
    raise ValueError(f"pool_type: expected 'avg', 'max' or 'avgmax', got {pool_type!r}")
