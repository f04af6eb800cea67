"""How merged tokens travel through a model: as values, from block to block, never as state of a module."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpet_kernels import Merged, Split, bdm_merge, bdm_unmerge, checkerboard, second_checkerboard
from fpet_kernels.split import real_cpu_tensors

__all__ = ["MergeStep", "SizeBias", "kept_positions", "merge_splits", "pool_by_size", "unmerge"]


class MergeStep(NamedTuple):
    """What a block needs to merge its tokens.

    Attributes:
        split: the patch tokens that come into the block, split into sources and destinations.
        size: (B, N, 1) tokens merged into each so far; None before the first merge.
        similarity: "cosine" or "dot".
        backend: of :func:`fpet_kernels.bdm_merge`; None takes the best.
    """

    split: Split
    size: Tensor | None
    similarity: str = "cosine"
    backend: str | None = None

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
        """Merges (B, N, D) ``x`` by (B, heads, N, C) ``key``; ``refinement`` is the block's KeyRefinement or None."""
        batch, n = x.shape[:2]
        weights = None if refinement is None else refinement.weights(batch, n)
        grid = self.split.grid  # where there is one the kernels need no lists, and tracing no constants
        merged = bdm_merge(
            x, key, grid_size=grid, split=None if grid else self.split, num_prefix_tokens=n - self.split.num_tokens,
            size=self.size, refinement=weights, similarity=self.similarity, backend=self.backend,
        )  # fmt: skip
        learned = weights is not None and (weights.w_down.requires_grad or weights.w_up.requires_grad)
        if learned or (self.size is not None and self.size.requires_grad):
            return merged
        # A gradient at these sizes would reach nothing, and costs attention its fastest kernels.
        return merged._replace(size=merged.size.detach())


class SizeBias(NamedTuple):
    """Proportional attention: log(size) is added to the attention scores of every key.

    Attributes:
        log_size: (B, N), float32 or float64.
        form: "auto", "mask" or "column"; see :func:`fpet.vit.attention.attend`.
    """

    log_size: Tensor
    form: str = "auto"


@functools.lru_cache(maxsize=256)
def _plan(height: int, width: int, count: int) -> tuple[tuple[Split, ...], tuple[Tensor, ...]]:
    """``count`` splits, and after each one the grid positions (int64, CPU) of the patch tokens that are left."""
    with real_cpu_tensors():
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
    with real_cpu_tensors():
        return torch.cat((torch.arange(num_prefix_tokens), patches + num_prefix_tokens)).to(device)


# The tracer takes both tables as constants: they depend on the shape of the grid alone.
@torch.compiler.assume_constant_result
def merge_splits(height: int, width: int, count: int) -> tuple[Split, ...]:
    """The splits of ``count`` merges in a row on a grid of ``height`` × ``width`` patches.

    The first is the paper's checkerboard. What it leaves is a grid turned by 45°, split again by the parity of the row
    (:func:`fpet_kernels.second_checkerboard`); what that leaves is a grid of half the size, and so on.

    Raises:
        ValueError: too few tokens are left to merge again.
    """
    return _plan(height, width, count)[0]


@torch.compiler.assume_constant_result
def kept_positions(height: int, width: int, count: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """(M,) int64 on ``device``: which of the original tokens, prefix tokens first, are left after ``count`` merges."""
    return _kept(height, width, count, num_prefix_tokens, device)


def unmerge(tokens: Tensor, splits: tuple[Split, ...], matches: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """(B, N, D) from (B, M, D): every original position gets the token that stands for it, through all merges so far."""
    for split, match in zip(reversed(splits[: len(matches)]), reversed(matches), strict=True):
        tokens = bdm_unmerge(tokens, match, split=split, num_prefix_tokens=num_prefix_tokens)
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
