"""A timm model that reduces its tokens by any registered reduction: :func:`apply_reduction`, :func:`remove_reduction`.

>>> comparators.apply_reduction(model, "avg-pool", layer=6)      # instead of fpet.apply(model, layer=6)

A *reducer* is called between a block's attention and its MLP. :func:`apply_reduction` gives one to each block that reduces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fpet_kernels import Merged

from ..layers.swapping import ClassSwap
from ..vit import patch
from ..vit.block import FPETBlock
from ..vit.foreign import refuse_wrapped
from ..vit.merging import MergeRecord, SizeBias
from ..vit.models import Encoded, FPETVisionTransformer
from .ltmp import LTMPAttention, flops_ratio, target_ratio
from .reducers import Unreduced
from .registry import REDUCTIONS, Place, Reducer, ReductionConfig, Tokens

__all__ = ["ReducedVisionTransformer", "apply_reduction", "flops_target", "remove_reduction"]


class ReducedVisionTransformer(FPETVisionTransformer):
    """timm's VisionTransformer with a reducer in some of its blocks.

    Attributes: fpet_reduction, the settings. fpet_reducers, by block.
    """

    fpet_reduction: ReductionConfig
    fpet_reducers: dict[int, Reducer]

    def _encode(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        take: tuple[int, ...] | list[int] = (), normed: bool = False, depth: int | None = None,
    ) -> Encoded:  # fmt: skip
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: comparators take none")
        x, grid = self._embedded(images)[:2]
        n, prefix, learned = x.shape[1], self.num_prefix_tokens, self.fpet_reduction.name == "ltmp"
        size, source, weigh = x.new_ones(x.shape[0], n, 1 + learned, dtype=torch.float32), None, False
        intermediates, shares = [], [size[:, :, -1].mean(1)]
        blocks: Any = self.blocks
        for i, block in enumerate(list(blocks)[:depth]):
            reducer = self.fpet_reducers.get(i)

            def run(x: Tensor, size: Tensor, block: Any = block, reducer: Any = reducer, weigh: bool = weigh, first: bool = source is None) -> Any:  # fmt: skip  # noqa: E501
                sizes: Any = size[:, :, 0] if learned else SizeBias(size.squeeze(-1).log()) if weigh else None
                given = {} if sizes is None else {"sizes": sizes}
                if reducer is None:
                    return block(x, **given)
                record: Any = MergeRecord()
                x = block(x, **given, merge=_Step(reducer, size, prefix, grid if first else None), record=record)
                return record.merged._replace(tokens=x)

            out: Any = checkpoint(run, x, size) if self.grad_checkpointing else run(x, size)
            if reducer is None:
                x = out
            else:
                x, size, match = out
                source, weigh = match if source is None else _follow(source, match), reducer.proportional
                shares.append(size[:, :, -1].sum(1) / n)
            if i in take:
                intermediates.append(_restore(self.norm(x) if normed else x, source))  # type: ignore[operator]
        sources = [] if source is None else [source]
        traced = _Traced(x, None if source is None else size[:, :, :1], (), sources, prefix, intermediates)
        if learned:
            traced.flops = flops_ratio(shares, n, x.shape[-1])
        return traced

    def _merges(self) -> bool:
        return True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, with_flops: bool = False) -> Any:
        """timm's; with ``with_flops``, for LTMP, the scores and :func:`fpet.comparators.ltmp.flops_ratio` with gradient."""
        if with_flops and self.fpet_reduction.name != "ltmp":
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
        return self.reducer(Tokens(x, self.size, self.prefix, self.grid), key, refinement)


def _restore(x: Tensor, source: Tensor | None) -> Tensor:
    """Every original position's token; zeros where it was thrown away, so that its index comes out as 0."""
    if source is None:
        return x
    found = x.gather(1, source.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
    return found.masked_fill((source < 0)[:, :, None], 0)


_SWAP = ClassSwap(ReducedVisionTransformer, LTMPAttention)

_SLOTS = ("refinement", "thresholds", "reducer")
"""What a reduction may learn, as submodules of a block; the first is removed by :func:`fpet.remove`."""


class _Traced(Encoded):
    """Its only match says for every original token where it went. flops: of LTMP."""

    flops: Tensor

    def unmerge(self, x: Tensor) -> Tensor:
        return _restore(x, self.matches[0] if self.matches else None)


def apply_reduction(
    model: nn.Module, name: str, layer: int | None = None, *, r: int = 8, refinement: dict[str, Any] | None = None,
    target: float | None = None,
) -> nn.Module:  # fmt: skip
    """Makes a timm vision transformer reduce its tokens the way ``name`` says, in place; its parameters stay as they are.

    Args:
        model: a VisionTransformer, or a wrapper of one; for "fpet" and "none" whatever :func:`fpet.apply` takes.
        name: one of ``REDUCTIONS``. layer: the block that reduces, for those at one layer; None: the middle one.
        r: of ToMe. refinement: arguments of fpet.KeyRefinement, for "fpet", where the block has none, and "fpet-no-stop".
        target: part of the blocks' FLOPs that LTMP learns to spend; None: as much as FPET spends that merges in ``layer``.

    What a reduction learns are modules in the blocks: ``refinement``, ``thresholds`` (LTMP) or ``reducer``. Applying the same
    one again keeps them. Add adapters before it. LTMP's penalty has to be added to the loss: see :func:`flops_target`.

    Raises:
        ValueError: no such name or block. TypeError: not a VisionTransformer, or one that can't be merged.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"name: expected one of {', '.join(REDUCTIONS)}, got {name!r}")
    reduction = REDUCTIONS[name]
    inner: Any = patch.find_model(model)
    native = reduction.reducer is Unreduced
    if not native and type(inner) not in (VisionTransformer, FPETVisionTransformer, ReducedVisionTransformer):
        raise TypeError(f"model: expected timm's VisionTransformer, got {type(inner).__name__}")
    depth = len(inner.blocks)
    layer = depth // 2 if layer is None else layer
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
        raise ValueError(f"layer: expected a block index in range({depth}), got {layer}")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target: expected a part of the FLOPs in (0, 1], got {target}")
    if name == "ltmp" and (
        inner.global_pool in ("max", "avgmax") or any(type(b) not in (Block, FPETBlock) for b in inner.blocks)
    ):
        raise TypeError("model: LTMP takes timm's ordinary blocks, and pooling by class token, average or attention")
    old = getattr(inner, "fpet_reduction", None)
    learned = (
        [{slot: module for slot in _SLOTS if (module := getattr(block, slot, None)) is not None} for block in inner.blocks]
        if old is not None and old.name == name
        else [{} for _ in inner.blocks]
    )
    if name == "ltmp" and target is None:
        n, prefix = inner.patch_embed.num_patches + inner.num_prefix_tokens, inner.num_prefix_tokens
        target = target_ratio(depth, layer, n, prefix, inner.embed_dim)
    config = ReductionConfig(name, layer, r, refinement, target if name == "ltmp" else None)
    if isinstance(inner, ReducedVisionTransformer):
        remove_reduction(model)
    if native:
        if name == "none":
            return patch.apply(model, None, refinement=False)
        has = getattr(inner.blocks[layer], "refinement", None) is not None
        return patch.apply(model, layer, refinement=None if has else refinement or True)
    patch.apply(model, None, refinement=False)
    refuse_wrapped(model, "fpet.comparators.apply_reduction")
    _SWAP.swap(inner)
    inner.fpet_reduction, inner.fpet_reducers = config, {}
    try:
        for i, block in enumerate(inner.blocks):
            if not reduction.everywhere and i != layer:
                continue
            for slot, module in learned[i].items():
                setattr(block, slot, module)
            reducer = learned[i].get("reducer") or reduction.build(Place(inner, block, i, config))
            inner.fpet_reducers[i] = reducer  # type: ignore[assignment]
            block.fpet_layer = i
            if name == "ltmp":
                _SWAP.swap(block.attn)
            if isinstance(reducer, nn.Module):
                block.reducer = reducer
    except Exception:
        remove_reduction(model)
        raise
    return model


def flops_target(model: nn.Module) -> float | None:
    """What LTMP's FLOPs ratio r is to become, None for the other reductions.

    Its loss is ``cross-entropy + fpet.ltmp.PENALTY · (r − target)²``, with ``scores, r = model(images, with_flops=True)``.
    """
    found = (module.fpet_reduction for module in model.modules() if isinstance(module, ReducedVisionTransformer))
    return next((config.target for config in found), None)


def remove_reduction(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply_reduction` and :func:`fpet.apply`; adapters stay. Does nothing to a model without. Returns model."""
    reduced: Any = next((m for m in model.modules() if isinstance(m, ReducedVisionTransformer)), None)
    if reduced is not None:
        del reduced.fpet_reducers, reduced.fpet_reduction
        for block in reduced.blocks:
            for slot in _SLOTS[1:]:
                if hasattr(block, slot):
                    delattr(block, slot)
            _SWAP.restore(block.attn)
        _SWAP.restore(reduced)
    return patch.remove(model)
