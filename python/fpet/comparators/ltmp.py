"""LTMP, learned thresholds for merging and pruning (Bonnaerens and Dambre, TMLR 2023): it learns how many tokens to keep.

In every block, between attention and MLP: of the tokens that are left, the class token being number 0, those with even numbers
are sources; a source whose key is more similar to that of its best destination than θ_merge is merged into it, and a merged
token is as important as its most important part; then patches less important than θ_prune go. Sources that are left come
before the destinations. Numbers, order and importance are those of the published code in evaluation.
Importance is the attention that a token gets, relative to the mean over the tokens that are left, so that θ_prune and
AdamW's steps have one scale for all numbers of tokens (the paper's is not relative).

A threshold's mask is hard, [value > θ], with the gradient of σ((value − θ) / τ): straight-through. In training every token
stays in its place and a mask says which are there; in evaluation those that are not are taken out. Both compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpet_kernels import Merged

from ..layers.modules import PETModule
from ..vit.attention import FPETAttention

__all__ = ["PENALTY", "LTMPAttention", "Thresholds", "flops_ratio", "target_ratio"]

TAU = 0.1
PENALTY = 10.0
"""λ of the loss, cross-entropy + λ (FLOPs ratio − target)²."""


class Thresholds(PETModule):
    """The two learned numbers of a block. Parameters: merge (1,), starts at 0.9; prune (1,), starts at 0: none is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Parameter(torch.tensor([0.9]))
        self.prune = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x: Tensor, state: Tensor, key: Tensor, importance: Tensor, prefix: int) -> Merged:
        """One reduction.

        Args:
            x: (B, N, D). state: (B, N, 2): how many tokens each stands for, and whether it is there (1) or not (0).
            key: (B, heads, N, C). importance: (B, N). prefix: tokens in front that always stay.

        Returns:
            tokens (B, M, D), state (B, M, 2), match (B, N): where each token went, −1 for pruned ones and those that were not
            there. M is N in training, else the most that an image has left; what others lack has size 0.
        """
        batch, n, _ = x.shape
        size, there = state.unbind(-1)
        present = there > 0
        source, destination = _sides(present, prefix)
        gone, choice = self._merge(key.detach(), source, destination)
        moved = torch.zeros_like(size).scatter_add(1, choice, size * gone)
        weight = torch.where(present, size, 1.0)  # what is not there keeps its value: nobody sees it
        sums = torch.zeros_like(x).scatter_add(1, choice[:, :, None].expand_as(x), (size * gone)[:, :, None].to(x.dtype) * x)
        tokens = (weight[:, :, None].to(x.dtype) * x + sums) / (weight + moved)[:, :, None].to(x.dtype)

        # A merged token is as important as the most important of its parts.
        importance = importance.detach()
        importance = importance.scatter_reduce(1, choice, importance * (gone > 0), "amax")
        kept = _mask(importance - self.prune)
        if not prefix:  # somebody has to be left
            standing = importance.masked_fill(~present | (gone > 0), -torch.inf)
            kept = torch.where(standing == standing.amax(1, keepdim=True), 1.0, kept)
        kept = torch.cat((torch.ones_like(kept[:, :prefix]), kept[:, prefix:]), 1)
        state = torch.stack(((size * (1 - gone) + moved) * kept, there * (1 - gone) * kept), -1)

        match = torch.where(gone > 0, choice, torch.arange(n, device=x.device).expand(batch, n))
        left = state[:, :, 1] > 0
        match = torch.where(present & left.gather(1, match), match, -1)
        # The order that the next block counts in: prefix, sources, destinations; at the end what was not there before.
        side = torch.where(source, 1, torch.where(destination, 2, 3))
        side[:, :prefix] = 0
        order = torch.argsort(side, dim=1, stable=True)
        place, left = torch.argsort(order, dim=1), left.gather(1, order)
        if not self.training:
            first = torch.argsort(~left, dim=1, stable=True)[:, : int(left.sum(1).max())]
            place, order = (left.cumsum(1) - 1).gather(1, place), order.gather(1, first)
        rows = torch.arange(batch, device=x.device)[:, None]
        match = torch.where(match < 0, match, place.gather(1, match.clamp(min=0)))
        return Merged(tokens[rows, order], state[rows, order], match)

    def _merge(self, key: Tensor, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N): 1 for the sources that are merged, with the gradient of θ; and their destinations."""
        unit = F.normalize(key.mean(1).float(), dim=-1)
        score = (unit @ unit.transpose(1, 2)).masked_fill(~destination[:, None, :], -torch.inf)
        best, choice = score.max(-1)
        able = source & (best > -torch.inf)
        return torch.where(able, _mask(best.masked_fill(~able, 0.0) - self.merge), 0.0), choice

    def extra_repr(self) -> str:
        return f"merge={self.merge.item():.3f}, prune={self.prune.item():.3f}"


def _sides(present: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """(B, N) each: the sources and the destinations among the patches that are there, numbered behind the prefix, as ToMe's."""
    number = prefix - 1 + present[:, prefix:].cumsum(1)
    source, destination = (present[:, prefix:] & (number % 2 == side) for side in (0, 1))
    return F.pad(source, (prefix, 0)), F.pad(destination, (prefix, 0))


def _mask(difference: Tensor) -> Tensor:
    """[difference > 0], with the gradient of σ(difference / τ)."""
    soft = torch.sigmoid(difference / TAU)
    return (difference > 0).to(soft.dtype) + (soft - soft.detach())


class LTMPAttention(FPETAttention):
    """timm's attention over tokens of which some are not there, or there several times; ``sizes`` is (B, N), or None for ones.

    With ``with_key`` its key is the pair (key, importance (B, N)).
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        sizes: Any = None, kept: Tensor | None = None, with_key: bool = False,
    ) -> Any:  # fmt: skip
        q, k, v = self._qkv_heads(x)
        scores = (q.float() * self.scale) @ k.float().transpose(-2, -1)
        weight = scores.new_ones(x.shape[:2]) if sizes is None else sizes
        there = (weight > 0)[:, None, None, :]
        most = scores.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
        # exp(A) · n / Σ exp(A) · n, not exp(A + log n): a token that is not there has a gradient too, to come back by.
        e = (scores - most.detach()).clamp(max=20).exp() * weight[:, None, None, :]
        attention = e / e.sum(-1, keepdim=True)
        out = self._project(x, self.attn_drop(attention).to(v.dtype) @ v)
        if not with_key:
            return out
        importance = (attention.mean(1) * (weight > 0)[:, :, None]).sum(1)  # a mean of 1 over the tokens that are there
        return out, (k, importance)


def flops_ratio(shares: Sequence[Tensor], n: int, dim: int) -> Tensor:
    """FLOPs of the blocks, as a part of those without reduction: a number, the mean over the images.

    Args:
        shares: (B,) for each block, and one more: how much of the ``n`` tokens of width ``dim`` comes into it, or comes out.
    """
    # Per token and block 4 D² for q, k, v and projection, 2 N D for attention, 8 D² for the MLP; all halved.
    blocks = [2 * i * dim + (i * i) * n + 4 * o * dim for i, o in pairwise(shares)]
    return torch.stack(blocks).mean() / (6 * dim + n)


def target_ratio(depth: int, layer: int, n: int, prefix: int, dim: int) -> float:
    """:func:`flops_ratio` of FPET's merging in block ``layer`` of ``depth``: what LTMP is given to spend."""
    half = (prefix + (n - prefix) // 2) / n
    return flops_ratio([torch.tensor([1.0 if i <= layer else half]) for i in range(depth + 1)], n, dim).item()
