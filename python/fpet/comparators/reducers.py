"""What FPET is compared with (Table 3): other ways to have fewer tokens, on the same models, adapters and blocks.

>>> comparators.apply(model, "avg-pool", layer=6)      # instead of fpet.apply(model, layer=6)

A *reducer* is called between a block's attention and its MLP. :func:`apply` gives one to each block that reduces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fpet_kernels import KeyRefinement as RefinementWeights
from fpet_kernels import Merged, alternating, bdm_merge, checkerboard

from ..layers.refinement import KeyRefinement
from ..vit import patch
from ..vit.attention import FPETAttention
from ..vit.block import FPETBlock, key_channels
from ..vit.merging import SizeBias
from ..vit.models import Encoded, FPETVisionTransformer
from .ltmp import LTMPAttention, Thresholds, flops_ratio, target_ratio

__all__ = ["COMPARATORS", "Reducer", "apply", "flops_target", "remove"]


class Reducer:
    """Makes fewer tokens of some.

    Attributes:
        proportional: whether later attention counts a token as often as its size says.
    """

    proportional = True

    def __call__(self, tokens: _Tokens, key: Tensor, refinement: Any) -> Merged:
        """``key`` (B, heads, N, C). Returns tokens (B, M, D), size (B, M, 1), and match (B, N): where each token went, −1 for
        one that was thrown away."""
        raise NotImplementedError


class _Tokens(NamedTuple):
    """Attributes: x (B, N, D); size (B, N, 1); prefix, how many of them stay; grid of the patches, None after a reduction."""

    x: Tensor
    size: Tensor
    prefix: int
    grid: tuple[int, int] | None


class Matching(Reducer):
    """Bipartite matching at one layer: every source is merged into the destination of the most similar key.

    Args:
        checkerboard: sources and destinations as in FPET; otherwise every second token is a source, as in ToMe.
        refined: by refined keys, which makes the checkerboard's form FPET. detach_key: FPET's gradient stopping.
    """

    def __init__(self, checkerboard: bool, refined: bool = False, detach_key: bool = True) -> None:
        self.checkerboard, self.refined, self.detach_key = checkerboard, refined, detach_key

    def __call__(self, tokens: _Tokens, key: Tensor, refinement: Any) -> Merged:
        x, size, prefix, grid = tokens
        batch, n = x.shape[:2]
        weights: RefinementWeights | None = refinement.weights(batch, n) if self.refined else None
        if self.checkerboard:
            if grid is None:
                raise ValueError("layer: a checkerboard needs the whole grid, and tokens were reduced before")
            merged = bdm_merge(
                x, key, grid_size=grid, num_prefix_tokens=prefix, size=size, refinement=weights, detach_key=self.detach_key
            )
            split = checkerboard(*grid)
        else:
            split = alternating(n - prefix)
            merged = bdm_merge(x, key, split=split, num_prefix_tokens=prefix, size=size, refinement=weights)
        a, b = split.a.to(x.device), split.b.to(x.device)
        match = torch.arange(n, device=x.device).expand(batch, -1).clone()
        match[:, prefix + b] = prefix + torch.arange(len(b), device=x.device)
        match[:, prefix + a] = merged.match
        return Merged(merged.tokens, merged.size, match)


class Pooling(Reducer):
    """Mean or maximum of patches 2i and 2i + 1 in raster order; an odd one at the end stays as it is."""

    proportional = False

    def __init__(self, maximum: bool) -> None:
        self.maximum = maximum

    def __call__(self, tokens: _Tokens, key: Tensor, refinement: Any) -> Merged:
        x, size, prefix, _ = tokens
        n = x.shape[1]
        pairs = (n - prefix) // 2
        first, second = (x[:, prefix + i : prefix + i + 2 * pairs - 1 : 2] for i in (0, 1))
        pooled = torch.maximum(first, second) if self.maximum else (first + second) / 2
        kept = x[:, prefix + 2 * pairs :]
        match = torch.cat((torch.arange(prefix), prefix + torch.arange(n - prefix) // 2)).to(x.device).expand(len(x), -1)
        out = torch.cat((x[:, :prefix], pooled, kept), 1)
        return Merged(out, _sum_into(size, match, out.shape[1]), match)


class ToMe(Reducer):
    """Token merging (Bolya et al., ICLR 2023): of all pairs of a source and its best destination, the r most similar merge."""

    def __init__(self, r: int) -> None:
        self.r = r

    def __call__(self, tokens: _Tokens, key: Tensor, refinement: Any) -> Merged:
        x, size, prefix, _ = tokens
        batch, n = x.shape[:2]
        patches = torch.arange(prefix, n, device=x.device)
        a, b = patches[::2], patches[1::2]
        r = min(self.r, len(b))
        unit = F.normalize(key.detach().mean(1), dim=-1)
        best, choice = (unit[:, a] @ unit[:, b].transpose(1, 2)).max(-1)  # (B, N_A)
        order = torch.argsort(best, dim=-1, descending=True, stable=True)
        merged = torch.zeros_like(best, dtype=torch.bool).scatter(1, order[:, :r], True)
        # Where each token goes: kept ones move up, in order; a merged source goes where its destination does.
        gone = torch.zeros(batch, n, dtype=torch.bool, device=x.device)
        gone[:, a] = merged
        match = (~gone).cumsum(1) - 1
        match[:, a] = torch.where(merged, match.gather(1, b[choice]), match[:, a])
        new_size = _sum_into(size, match, n - r)
        return Merged(_sum_into(x * size.to(x.dtype), match, n - r) / new_size.to(x.dtype), new_size, match)


class LTMP(Reducer):
    """Learned thresholds on merging and pruning: see :class:`Thresholds`. Its sizes are (B, N, 2): size, and present or not."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds

    def __call__(self, tokens: _Tokens, key: Any, refinement: Any) -> Merged:
        return self.thresholds(tokens.x, tokens.size, *key, tokens.prefix)


def _sum_into(values: Tensor, match: Tensor, count: int) -> Tensor:
    """(B, count, …): the sum of the values (B, N, …) that went to each place."""
    index = match[:, :, None].expand_as(values)
    return values.new_zeros(values.shape[0], count, values.shape[2]).scatter_add(1, index, values)


class ReducedVisionTransformer(FPETVisionTransformer):
    """timm's VisionTransformer with a reducer in some of its blocks."""

    def _encode(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        take: tuple[int, ...] | list[int] = (), normed: bool = False, depth: int | None = None,
    ) -> Encoded:  # fmt: skip
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: comparators take none")
        x, grid = self._embed(images)[:2]
        n, prefix, learned = x.shape[1], x.shape[1] - grid[0] * grid[1], self.fpet_target is not None
        size, source, weigh = x.new_ones(x.shape[0], n, 1 + learned, dtype=torch.float32), None, False
        intermediates, shares = [], [size[:, :, -1].mean(1)]
        for i, block in enumerate(list(self.blocks)[:depth]):
            reducer = self.fpet_reducers.get(i)

            def run(x: Tensor, size: Tensor, block: Any = block, reducer: Any = reducer, weigh: bool = weigh, first: bool = source is None) -> Any:  # fmt: skip  # noqa: E501
                step = None if reducer is None else _Step(reducer, size, prefix, grid if first else None)
                sizes: Any = size[:, :, 0] if learned else SizeBias(size.squeeze(-1).log()) if weigh else None
                return block(x, sizes=sizes, merge=step)

            out = checkpoint(run, x, size) if self.grad_checkpointing else run(x, size)
            if reducer is None:
                x = out
            else:
                x, size, match = out
                source, weigh = match if source is None else _follow(source, match), reducer.proportional
                shares.append(size[:, :, -1].sum(1) / n)
            if i in take:
                intermediates.append(_restore(self.norm(x) if normed else x, source))
        sources = [] if source is None else [source]
        traced = _Traced(x, None if source is None else size[:, :, :1], (), sources, prefix, intermediates)
        if learned:
            traced.flops = flops_ratio(shares, n, x.shape[-1])
        return traced

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, with_flops: bool = False) -> Any:
        """timm's; with ``with_flops``, for LTMP, the scores and :func:`fpet.comparators.ltmp.flops_ratio` with gradient."""
        if with_flops and self.fpet_target is None:
            raise ValueError("with_flops: expected LTMP, got another comparator")
        encoded: Any = self._encode(x, attn_mask, is_causal)
        scores = self._classify(encoded)
        return (scores, encoded.flops) if with_flops else scores


def _follow(source: Tensor, match: Tensor) -> Tensor:
    """Where the original tokens are after one more step; −1 for those that were thrown away."""
    return torch.where(source < 0, -1, match.gather(1, source.clamp(min=0)))


class _Step(NamedTuple):
    """Stands in for :class:`fpet.vit.merging.MergeStep` in a block."""

    reducer: Reducer
    size: Tensor
    prefix: int
    grid: tuple[int, int] | None

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
        return self.reducer(_Tokens(x, self.size, self.prefix, self.grid), key, refinement)


def _restore(x: Tensor, source: Tensor | None) -> Tensor:
    """Every original position's token; zeros where it was thrown away, so that its index comes out as 0."""
    if source is None:
        return x
    found = x.gather(1, source.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
    return found.masked_fill((source < 0)[:, :, None], 0)


class _Traced(Encoded):
    """Its only match says for every original token where it went. flops: of LTMP."""

    flops: Tensor

    def unmerge(self, x: Tensor) -> Tensor:
        return _restore(x, self.matches[0] if self.matches else None)


COMPARATORS = ("none", "bsm", "bsm-checkerboard", "fpet-no-stop", "avg-pool", "max-pool", "tome", "ltmp")
"""Tables 3 and A3 of the paper, FPET itself left out."""


def apply(
    model: nn.Module, name: str, layer: int | None = None, *, r: int = 8, refinement: dict[str, Any] | None = None,
    target: float | None = None,
) -> nn.Module:  # fmt: skip
    """Makes a timm VisionTransformer reduce its tokens the way ``name`` says, in place; its parameters stay as they are.

    Args:
        name: one of COMPARATORS. layer: the block that reduces, for those at one layer; None: the middle one.
        r: of ToMe. refinement: arguments of fpet.KeyRefinement, for "fpet-no-stop".
        target: part of the blocks' FLOPs that LTMP learns to spend; None: as much as FPET spends that merges in ``layer``.

    LTMP's thresholds are modules ``thresholds`` in the blocks; those that are there stay. Add adapters before it. Its penalty
    has to be added to the loss: see :func:`flops_target`.

    Raises:
        ValueError: no such name or block. TypeError: not a VisionTransformer, or one that can't be merged.
    """
    if name not in COMPARATORS:
        raise ValueError(f"name: expected one of {', '.join(COMPARATORS)}, got {name!r}")
    inner: Any = patch.find_model(model)
    if type(inner) not in (VisionTransformer, FPETVisionTransformer, ReducedVisionTransformer):
        raise TypeError(f"model: expected timm's VisionTransformer, got {type(inner).__name__}")
    depth = len(inner.blocks)
    layer = depth // 2 if layer is None else layer
    if not 0 <= layer < depth:
        raise ValueError(f"layer: expected a block index in range({depth}), got {layer}")
    if name == "tome" and r < 1:
        raise ValueError(f"r: expected at least 1, got {r}")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target: expected a part of the FLOPs in (0, 1], got {target}")
    if name == "ltmp" and (
        inner.global_pool in ("max", "avgmax") or any(type(b) not in (Block, FPETBlock) for b in inner.blocks)
    ):
        raise TypeError("model: LTMP takes timm's ordinary blocks, and pooling by class token, average or attention")
    kept = [getattr(block, "thresholds", None) for block in inner.blocks]
    if isinstance(inner, ReducedVisionTransformer):
        remove(model)
    choices: dict[str, Callable[[], dict[int, Reducer]]] = {
        "none": lambda: {},
        "bsm": lambda: {layer: Matching(checkerboard=False)},
        "bsm-checkerboard": lambda: {layer: Matching(checkerboard=True)},
        "fpet-no-stop": lambda: {layer: Matching(checkerboard=True, refined=True, detach_key=False)},
        "avg-pool": lambda: {layer: Pooling(maximum=False)},
        "max-pool": lambda: {layer: Pooling(maximum=True)},
        "tome": lambda: {i: ToMe(r) for i in range(depth)},
        "ltmp": lambda: {i: LTMP(block.thresholds) for i, block in enumerate(inner.blocks)},
    }
    patch.apply(model, None, refinement=False)
    inner.__class__ = ReducedVisionTransformer
    inner.fpet_target = None
    if name == "ltmp":
        n, prefix = inner.patch_embed.num_patches + inner.num_prefix_tokens, inner.num_prefix_tokens
        inner.fpet_target = target_ratio(depth, layer, n, prefix, inner.embed_dim) if target is None else target
        for block, old in zip(inner.blocks, kept, strict=True):
            block.thresholds = Thresholds().to(next(block.parameters()).device) if old is None else old
            block.thresholds.train(block.training)
            block.attn.__class__ = LTMPAttention
    inner.fpet_reducers = choices[name]()
    if name == "fpet-no-stop":
        block = inner.blocks[layer]
        like = next(block.parameters())
        block.refinement = KeyRefinement(key_channels(block), **(refinement or {})).to(like.device, like.dtype)
        block.refinement.train(block.training)
    return model


def flops_target(model: nn.Module) -> float | None:
    """What LTMP's FLOPs ratio r is to become, None for the other comparators.

    Its loss is ``cross-entropy + fpet.ltmp.PENALTY · (r − target)²``, with ``scores, r = model(images, with_flops=True)``.
    """
    return next((getattr(module, "fpet_target", None) for module in model.modules() if hasattr(module, "fpet_target")), None)


def remove(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply`; adapters stay. Does nothing to a model without a comparator. Returns model."""
    for module in model.modules():
        if isinstance(module, ReducedVisionTransformer):
            del module.fpet_reducers, module.fpet_target
            for block in module.blocks:
                if hasattr(block, "thresholds"):
                    del block.thresholds
                    block.attn.__class__ = FPETAttention
            module.__class__ = FPETVisionTransformer
            patch.remove(model)
            break
    return model
