"""What the fused kernels are compared with: token merging written in PyTorch, as a careful user would.

- :func:`paper`: the dense formulation of the paper, equation by equation, differentiable by autograd. Run as it is and under
  ``torch.compile``. It computes in the dtype of its inputs, as the published code does under autocast, and so loses tokens
  in reduced precision; ``fpet_kernels.reference`` repairs that, and is slower for it.
- :class:`Indexed`: no matching matrix; gather, argmax, and a sum into the destinations, with the straight-through gradient
  written out by hand. Under ``torch.compile`` it is the fastest PyTorch we found. Two ways to sum, since neither wins
  everywhere: ``scatter`` (scatter_add, the division folded into its source) and ``lists`` (sort by destination, then
  embedding_bag). Also tried on the CPU, and slower in every setting: index_add, index_put, scatter_add along dim 1, a one-hot
  matmul, segment_reduce, a sparse CSR product.

All get the same :class:`harness.cases.Problem`: per-head keys in place; averaging over heads and refining are their own work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpet_kernels.reference import compute_dtype
from harness.cases import Problem

__all__ = ["BEST_VARIANTS", "Indexed", "paper", "paper_of"]


def paper(
    x: Tensor, key: Tensor, w_down: Tensor | None, w_up: Tensor | None, a: Tensor, b: Tensor, p: int
) -> tuple[Tensor, Tensor]:
    """Section 4.2 as printed: tokens (B, M, D), size (B, M, 1). ``a``, ``b``: positions in N; ``p`` prefix tokens."""
    key = key.detach()
    if key.dim() == 4:
        key = key.mean(1)
    if w_down is not None and w_up is not None:
        key = key + F.relu(key @ w_down.mT) @ w_up.mT  # eq. 10
    key = F.normalize(key, dim=-1)
    scores = key[:, a] @ key[:, b].mT  # eq. 11
    mid = scores.topk(2, dim=-1).values.mean(-1, keepdim=True)  # eq. 12
    soft = torch.sigmoid(scores - mid)  # eq. 12
    hard = (soft > 0.5).to(soft.dtype)
    matching = hard - soft.detach() + soft
    size = 1 + matching.sum(1).unsqueeze(-1)
    merged = (x[:, b] + matching.mT @ x[:, a]) / size  # eq. 13
    return torch.cat((x[:, :p], merged), 1), torch.cat((size.new_ones(x.shape[0], p, 1), size), 1)


def paper_of(problem: Problem) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple]:
    """:func:`paper` and the arguments that make it solve ``problem``."""
    p, split = problem.case.num_prefix_tokens, problem.case.split
    a, b = (index.to(problem.x.device) + p for index in (split.a, split.b))
    return paper, (problem.x, problem.key, problem.w_down, problem.w_up, a, b, p)


def _refined(
    key: Tensor, w_down: Tensor | None, w_up: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The averaged key (B, N, C), the hidden units (B, N, h) and the refined key (B, N, C)."""
    key = key.to(dtype)
    if key.dim() == 4:
        key = key.mean(1)
    if w_down is None or w_up is None:
        return key, None, key
    hidden = F.relu(key @ w_down.to(dtype).mT)
    return key, hidden, key + hidden @ w_up.to(dtype).mT


def _sum_by_scatter(x: Tensor, match: Tensor, a: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, M, D) and sizes (B, M, 1) by scatter_add over rows; dividing its source saves a pass over the result."""
    (batch, _, dim), merged, dtype = x.shape, kept.numel(), compute_dtype(x)
    row = (match + torch.arange(batch, device=x.device)[:, None] * merged).flatten()  # [B·N_A]
    size = torch.ones(batch * merged, dtype=dtype, device=x.device).scatter_add(0, row, row.new_ones(row.shape, dtype=dtype))
    source = x.index_select(1, a).to(dtype).reshape(-1, dim) / size[row][:, None]
    base = x.index_select(1, kept).to(dtype).reshape(-1, dim) / size[:, None]
    tokens = base.scatter_add(0, row[:, None].expand(-1, dim), source)
    return tokens.view(batch, merged, dim).to(x.dtype), size.view(batch, merged, 1)


def _sum_by_lists(x: Tensor, match: Tensor, a: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one list of rows per destination, found by sorting, and embedding_bag over the lists."""
    (batch, n, dim), merged = x.shape, kept.numel()
    destination = torch.cat((torch.arange(merged, device=x.device).expand(batch, merged), match), 1)  # [B, N]
    order = destination.argsort(1)
    rows = (torch.cat((kept, a))[order] + torch.arange(batch, device=x.device)[:, None] * n).flatten()
    count = torch.ones_like(destination[:, :merged]).scatter_add(1, match, torch.ones_like(match)).flatten()
    begin = count.cumsum(0) - count
    table = x.reshape(batch * n, dim)
    if x.dtype in (torch.float32, torch.float64):  # weights have the table's dtype: too coarse in half precision
        weights = torch.repeat_interleave(1 / count.to(x.dtype), count, output_size=batch * n)
        tokens = F.embedding_bag(rows, table, begin, mode="sum", per_sample_weights=weights)
    else:
        tokens = F.embedding_bag(rows, table, begin, mode="mean")
    return tokens.view(batch, merged, dim), count.view(batch, merged, 1).to(compute_dtype(x))


_SUMS = {"scatter": _sum_by_scatter, "lists": _sum_by_lists}
BEST_VARIANTS = tuple(_SUMS)


def _scores(refined: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse norms (B, N, 1), unit keys (B, N, C), and their products (B, N_A, N_B)."""
    inverse = 1 / refined.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    unit = refined * inverse
    return inverse, unit, unit.index_select(1, a) @ unit.index_select(1, b).mT


class _StraightThrough(torch.autograd.Function):
    """The merge of :class:`Indexed` with its gradient (docs/mathematics.md), all of it in tensors that PyTorch compiles."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, key: Tensor, w_down: Tensor, w_up: Tensor, a: Tensor, b: Tensor, p: int, variant: str
    ) -> tuple:
        key, hidden, refined = _refined(key, w_down, w_up, compute_dtype(x, key))
        inverse, unit, scores = _scores(refined, a, b)
        best_score, best = scores.max(-1, keepdim=True)
        column = torch.arange(b.numel(), device=x.device)
        second_score, second = scores.masked_fill(column == best, float("-inf")).max(-1, keepdim=True)
        tokens, size = _SUMS[variant](x, best.squeeze(-1) + p, a, torch.cat((torch.arange(p, device=x.device), b)))
        soft = torch.sigmoid(scores - (best_score + second_score) / 2)
        ctx.save_for_backward(x, key, hidden, inverse, unit, soft, best, second, tokens, size, w_down, w_up, a, b)
        ctx.p = p
        match, runner_up = best.squeeze(-1) + p, second.squeeze(-1) + p
        ctx.mark_non_differentiable(match, runner_up)
        return tokens, size, match, runner_up

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor, grad_size: Tensor, *_: Any) -> tuple:
        x, key, hidden, inverse, unit, soft, best, second, tokens, size, w_down, w_up, a, b = ctx.saved_tensors
        (batch, n, _), p, dtype = x.shape, ctx.p, key.dtype
        g = (grad_tokens / size).to(x.dtype)  # g_j: gradient of the sum before dividing
        g_size = grad_size - (grad_tokens.to(dtype) * tokens).sum(-1, keepdim=True) / size
        origin = match_origin(best.squeeze(-1) + p, a, b, p, n)
        row = (origin + torch.arange(batch, device=x.device)[:, None] * g.shape[1]).flatten()
        grad_x = g.reshape(-1, g.shape[-1]).index_select(0, row).view(x.shape)

        # PyTorch's float16 product on a CPU takes several times as long as float32's; bfloat16's takes half as long.
        operand = dtype if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
        d_matching = x.index_select(1, a).to(operand) @ g[:, p:].to(operand).mT  # [B, N_A, N_B]
        d_matching = d_matching.to(dtype) + g_size[:, p:].mT
        d_scores = d_matching * soft * (1 - soft)
        column = torch.arange(b.numel(), device=x.device)
        top_two = (column == best) | (column == second)
        d_scores = d_scores - 0.5 * d_scores.sum(-1, keepdim=True) * top_two
        d_a, d_b = d_scores @ unit.index_select(1, b), d_scores.mT @ unit.index_select(1, a)
        back = torch.empty(n - p, dtype=torch.int64, device=x.device)
        back = back.scatter(0, torch.cat((a, b)) - p, torch.arange(n - p, device=x.device))
        d_unit = F.pad(torch.cat((d_a, d_b), 1).index_select(1, back), (0, 0, p, 0))
        d_refined = (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True)) * inverse

        d_flat, hidden, key = d_refined.flatten(0, 1), hidden.flatten(0, 1), key.flatten(0, 1)
        grad_up = d_flat.mT @ hidden
        d_hidden = (d_flat @ w_up.to(dtype)) * (hidden > 0)
        grad_down = d_hidden.mT @ key
        return grad_x, None, grad_down.to(w_down.dtype), grad_up.to(w_up.dtype), None, None, None, None


def match_origin(match: Tensor, a: Tensor, b: Tensor, p: int, n: int) -> Tensor:
    """(B, N): index of the merged token that stands for each position."""
    device = match.device
    merged = torch.arange(p + b.numel(), device=device).expand(match.shape[0], -1)
    position = torch.cat((torch.arange(p, device=device), b, a))
    back = torch.empty(n, dtype=torch.int64, device=device).scatter(0, position, torch.arange(n, device=device))
    return torch.cat((merged, match), 1).index_select(1, back)


class _GatherBackward(torch.autograd.Function):
    """Without refinement nothing flows into the scores: the backward is a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, match: Tensor, a: Tensor, b: Tensor, p: int, variant: str) -> tuple[Tensor, Tensor]:
        tokens, size = _SUMS[variant](x, match, a, torch.cat((torch.arange(p, device=x.device), b)))
        ctx.save_for_backward(size, match, a, b)
        ctx.p, ctx.shape = p, x.shape
        ctx.mark_non_differentiable(size)
        return tokens, size

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor, _grad_size: Tensor) -> tuple:
        size, match, a, b = ctx.saved_tensors
        origin = match_origin(match, a, b, ctx.p, ctx.shape[1])
        g = (grad_tokens / size).to(grad_tokens.dtype)
        row = (origin + torch.arange(g.shape[0], device=g.device)[:, None] * g.shape[1]).flatten()
        return g.reshape(-1, g.shape[-1]).index_select(0, row).view(ctx.shape), None, None, None, None, None


class Indexed:
    """Merging by indices; ``variant`` is one of :data:`BEST_VARIANTS`."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def of(self, problem: Problem) -> tuple[Callable[..., tuple], tuple]:
        """A function and the arguments that make it solve ``problem``; it returns (tokens, size, match[, second])."""
        variant, p, split = self.variant, problem.case.num_prefix_tokens, problem.case.split
        a, b = (index.to(problem.x.device) + p for index in (split.a, split.b))
        learns = problem.x.requires_grad

        def merge(x: Tensor, key: Tensor, w_down: Tensor | None, w_up: Tensor | None, a: Tensor, b: Tensor) -> tuple:
            key = key.detach()
            if learns and w_down is not None and w_up is not None:
                return _StraightThrough.apply(x, key, w_down, w_up, a, b, p, variant)
            _, _, refined = _refined(key, w_down, w_up, compute_dtype(x, key))
            # The length of a source's key doesn't change which destination is nearest.
            target = refined.index_select(1, b)
            target = target / target.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
            match = (refined.index_select(1, a) @ target.mT).argmax(-1) + p
            if learns:
                return *_GatherBackward.apply(x, match, a, b, p, variant), match
            return *_SUMS[variant](x, match, a, torch.cat((torch.arange(p, device=x.device), b))), match

        return merge, (problem.x, problem.key, problem.w_down, problem.w_up, a, b)
