"""The reducers of the package: the comparators of Tables 3 and A3, and :mod:`fpet.vit` itself as "fpet" and "none"."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpet_kernels import KeyRefinement as RefinementWeights
from fpet_kernels import Merged, bdm_merge, checkerboard

from ..layers.refinement import KeyRefinement
from ..vit.block import key_channels
from .ltmp import Thresholds
from .registry import Place, Reducer, Tokens, register_reduction

__all__ = [
    "LTMP", "AveragePooling", "FPETWithoutStop", "Matching", "MaximumPooling", "Pooling", "SoftMatching", "ToMe", "Unreduced",
]  # fmt: skip


@register_reduction("none", "every token stays")
@register_reduction("fpet", "bipartite differentiable matching with refined keys at one layer")
class Unreduced(Reducer):
    """What needs no reducer: :func:`fpet.apply` itself, with or without a layer."""


@register_reduction("bsm-checkerboard", "hard bipartite matching at one layer on the checkerboard, without refinement")
class Matching(Reducer):
    """Bipartite matching at one layer: every source of the checkerboard is merged into the destination of the most similar key.

    Args:
        refined: by refined keys, which makes it FPET. detach_key: FPET's gradient stopping.
    """

    def __init__(self, refined: bool = False, detach_key: bool = True) -> None:
        self.refined, self.detach_key = refined, detach_key

    def __call__(self, tokens: Tokens, key: Tensor, refinement: Any) -> Merged:
        x, size, prefix, grid = tokens
        batch, n = x.shape[:2]
        if grid is None:
            raise ValueError("layer: a checkerboard needs the whole grid, and tokens were reduced before")
        weights: RefinementWeights | None = refinement.weights(batch, n) if self.refined else None
        merged = bdm_merge(
            x, key, grid_size=grid, num_prefix_tokens=prefix, size=size, refinement=weights, detach_key=self.detach_key
        )
        split = checkerboard(*grid)
        a, b = split.a.to(x.device), split.b.to(x.device)
        match = torch.arange(n, device=x.device).expand(batch, -1).clone()
        match[:, prefix + b] = prefix + torch.arange(len(b), device=x.device)
        match[:, prefix + a] = merged.match
        return Merged(merged.tokens, merged.size, match)


@register_reduction("fpet-no-stop", "fpet without gradient stopping: gradients also reach the backbone's keys")
class FPETWithoutStop(Matching):
    """FPET whose gradients go on into the backbone's keys. The block gets a refinement where it has none."""

    def __init__(self) -> None:
        super().__init__(refined=True, detach_key=False)

    @classmethod
    def build(cls, place: Place) -> Reducer:
        if getattr(place.block, "refinement", None) is None:
            like = next(place.block.parameters())
            refinement = KeyRefinement(key_channels(place.block), **(place.config.refinement or {}))
            place.block.refinement = refinement.to(like.device, like.dtype).train(place.block.training)
        return cls()


@register_reduction("tome", "ToMe: the r most similar pairs at every layer", everywhere=True)
class ToMe(Reducer):
    """Token merging (Bolya et al., ICLR 2023): of all pairs of a source and its best destination, the r most similar merge.

    Tokens are numbered with the class token, which is 0: those with even numbers are sources, those with odd numbers
    destinations. Behind the prefix, which is never merged, come the sources that are left, then the destinations. Sources that
    are left are in order of position; without a class token in order of falling similarity, as published.

    Args:
        r: pairs; None: all.
    """

    def __init__(self, r: int | None) -> None:
        if r is not None and r < 1:
            raise ValueError(f"r: expected at least 1, got {r}")
        self.r = r

    @classmethod
    def build(cls, place: Place) -> Reducer:
        return cls(place.config.r)

    def __call__(self, tokens: Tokens, key: Tensor, refinement: Any) -> Merged:
        x, size, prefix, _ = tokens
        batch, n = x.shape[:2]
        position = torch.arange(prefix, n, device=x.device)
        a, b = position[position % 2 == 0], position[position % 2 == 1]
        r = (n - prefix) // 2 if self.r is None else min(self.r, (n - prefix) // 2)
        kept = len(a) - r
        unit = F.normalize(key.detach().mean(1), dim=-1)
        best, choice = (unit[:, a] @ unit[:, b].transpose(1, 2)).max(-1)  # (B, N_A)
        left = torch.argsort(best, dim=-1, descending=True, stable=True)[:, r:]
        if prefix:
            left = left.sort(dim=1).values
        new = prefix + torch.arange(kept + len(b), device=x.device)  # places behind the prefix
        match = torch.arange(n, device=x.device).repeat(batch, 1)
        match[:, a] = new[kept:][choice].scatter(1, left, new[:kept].expand(batch, -1))
        match[:, b] = new[kept:]
        new_size = _sum_into(size, match, n - r)
        return Merged(_sum_into(x * size.to(x.dtype), match, n - r) / new_size.to(x.dtype), new_size, match)


@register_reduction("bsm", "ToMe's hard bipartite matching at one layer: every second token is merged")
class SoftMatching(ToMe):
    """Bipartite soft matching at one layer: ToMe that merges every source at once."""

    @classmethod
    def build(cls, place: Place) -> Reducer:
        return cls(None)


class Pooling(Reducer):
    """Mean or maximum of patches 2i and 2i + 1 in raster order; an odd one at the end stays as it is."""

    proportional = False
    maximum: bool

    def __call__(self, tokens: Tokens, key: Tensor, refinement: Any) -> Merged:
        x, size, prefix, _ = tokens
        n = x.shape[1]
        pairs = (n - prefix) // 2
        first, second = (x[:, prefix + i : prefix + i + 2 * pairs - 1 : 2] for i in (0, 1))
        pooled = torch.maximum(first, second) if self.maximum else (first + second) / 2
        kept = x[:, prefix + 2 * pairs :]
        match = torch.cat((torch.arange(prefix), prefix + torch.arange(n - prefix) // 2)).to(x.device).expand(len(x), -1)
        out = torch.cat((x[:, :prefix], pooled, kept), 1)
        return Merged(out, _sum_into(size, match, out.shape[1]), match)


@register_reduction("avg-pool", "mean of two neighbours at one layer")
class AveragePooling(Pooling):
    """The mean."""

    maximum = False


@register_reduction("max-pool", "maximum of two neighbours at one layer")
class MaximumPooling(Pooling):
    """The maximum."""

    maximum = True


@register_reduction(
    "ltmp", "LTMP: merging and pruning by learned thresholds in every layer, with the FLOPs of fpet", everywhere=True
)
class LTMP(Reducer):
    """Learned thresholds on merging and pruning: see :class:`Thresholds`. Its sizes are (B, N, 2): size, and present or not."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds

    @classmethod
    def build(cls, place: Place) -> Reducer:
        block = place.block
        if getattr(block, "thresholds", None) is None:
            block.thresholds = Thresholds().to(next(block.parameters()).device).train(block.training)
        return cls(block.thresholds)

    def __call__(self, tokens: Tokens, key: Any, refinement: Any) -> Merged:
        return self.thresholds(tokens.x, tokens.size, *key, tokens.prefix)


def _sum_into(values: Tensor, match: Tensor, count: int) -> Tensor:
    """(B, count, …): the sum of the values (B, N, …) that went to each place."""
    index = match[:, :, None].expand_as(values)
    return values.new_zeros(values.shape[0], count, values.shape[2]).scatter_add(1, index, values)
