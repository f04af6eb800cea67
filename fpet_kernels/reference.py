"""Bipartite differentiable matching in plain PyTorch: the paper's formulas, line by line, differentiable by autograd alone.

Every fused backend is tested against this file. It keeps the dense (N_A, M) matching matrix that the kernels never make,
so it is slow and takes memory quadratic in the number of tokens. Equations: *Faster Parameter-Efficient Tuning with Token
Redundancy Reduction*, CVPR 2025 (arXiv 2503.20282), section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .split import Split, checkerboard_positions
from .tracing import observed

__all__ = [
    "average_heads",
    "bdm_merge_reference",
    "bdm_unmerge_reference",
    "compute_dtype",
    "match_scores",
    "positions",
    "refine_key",
]

NORM_EPS = 1e-12  # as torch.nn.functional.normalize, which the authors' code calls


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is, else float32: half precision never decides a match."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def positions(split: Split | tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the sources and the destinations; ``split`` is a Split, or the (H, W) of a checkerboard."""
    return split.on(device) if isinstance(split, Split) else checkerboard_positions(*split, device)


def average_heads(key: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, C) key in ``dtype``: (B, heads, N, C) input is averaged over its heads."""
    key = key.to(dtype)
    return key.mean(dim=1) if key.dim() == 4 else key


def refine_key(
    key: Tensor,
    w_down: Tensor | None,
    w_up: Tensor | None,
    scale: float,
    dropout_mask: Tensor | None,
    key_delta: Tensor | None,
) -> Tensor:
    """k' = key + key_delta + scale · (ReLU(key W_downᵀ) ⊙ mask) W_upᵀ (eq. 10); key is (B, N, C)."""
    refined = key
    if w_down is not None and w_up is not None:
        hidden = F.relu(key @ w_down.to(key.dtype).mT)
        if dropout_mask is not None:
            hidden = hidden * dropout_mask.to(key.dtype)
        refined = refined + scale * (hidden @ w_up.to(key.dtype).mT)
    if key_delta is not None:
        refined = refined + key_delta.to(key.dtype)
    return refined


def match_scores(refined: Tensor, a: Tensor, b: Tensor, num_prefix_tokens: int, similarity: str) -> Tensor:
    """(B, N_A, N_B) similarity of every source with every destination (eq. 11)."""
    if similarity == "cosine":
        refined = F.normalize(refined, dim=-1, eps=NORM_EPS)
    return refined[:, a + num_prefix_tokens] @ refined[:, b + num_prefix_tokens].mT


def bdm_merge_reference(
    x: Tensor,
    key: Tensor,
    *,
    split: Split | tuple[int, int],
    num_prefix_tokens: int = 1,
    size: Tensor | None = None,
    w_down: Tensor | None = None,
    w_up: Tensor | None = None,
    scale: float = 1.0,
    dropout_mask: Tensor | None = None,
    key_delta: Tensor | None = None,
    similarity: str = "cosine",
    detach_key: bool = True,
    rule: str = "argmax",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator of :func:`fpet_kernels.bdm_merge` as the paper writes it, with no kernels and no custom gradient.

    Args:
        split: a Split, or the (H, W) of a checkerboard.
        rule: ``"argmax"`` matches every source with its best destination, ties to the lowest index. ``"threshold"`` is the
            published ``σ(s − m) > 0.5``, which matches *nothing* where the two best scores round to the same value: that
            source is then silently lost.
        dtype: precision of everything inside; by default float32, or float64 where an input is float64. The published
            code under autocast corresponds to ``rule="threshold"`` with the reduced precision given here.
        The rest as in :func:`fpet_kernels.bdm_merge`, with the refinement spelled out.

    Returns:
        ``tokens (B, M, D)``, ``size (B, M, 1)``, ``match (B, N_A)`` (−1 for a source that the threshold rule lost),
        ``second (B, N_A)`` the second best destination, and ``mid (B, N_A)`` the mean of the two best scores.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        dtype = dtype or compute_dtype(x, key, size, w_down, w_up, key_delta)
        a, b = positions(split, x.device)
        p = num_prefix_tokens
        batch, tokens_in = x.shape[:2]

        keys = average_heads(key.detach() if detach_key else key, dtype)
        refined = refine_key(keys, w_down, w_up, scale, dropout_mask, key_delta)
        scores = match_scores(refined, a, b, p, similarity)

        # Ranking treats NaN as the smallest score, so that match is valid on any input.
        ranked = torch.where(scores.isnan(), float("-inf"), scores).detach()
        best = ranked.argmax(dim=-1, keepdim=True)
        second = ranked.scatter(-1, best, float("-inf"))
        # The best may itself be −inf (all scores NaN); the second is then the lowest index that is not the best.
        second = torch.where(
            second.amax(-1, keepdim=True) == float("-inf"), (best == 0).to(best.dtype), second.argmax(-1, keepdim=True)
        )
        mid = (scores.gather(-1, best) + scores.gather(-1, second)) / 2  # m_i, eq. 12
        soft = torch.sigmoid(scores - mid)  # eq. 12
        if rule == "threshold":
            hard = (soft > 0.5).to(dtype)
        elif rule == "argmax":
            hard = torch.zeros_like(soft).scatter(-1, best, 1.0)
        else:
            raise ValueError(f"rule: expected 'argmax' or 'threshold', got {rule!r}")
        matching = hard + (soft - soft.detach())  # straight-through estimator, eq. 14: hard forward, soft backward
        # A NaN score must not reach a token through 0 · NaN: in the forward the matching is exactly the hard one.
        matching = torch.where(soft.isnan(), hard, matching)

        sizes = torch.ones(batch, tokens_in, 1, dtype=dtype, device=x.device) if size is None else size.to(dtype)
        weighted = x.to(dtype) * sizes
        kept = torch.cat((torch.arange(p, device=x.device), b + p))
        src = a + p
        merged_size, merged = sizes[:, kept], weighted[:, kept]
        pad = (p, 0)  # prefix tokens are never a destination: their columns are zero
        matching = F.pad(matching, pad)
        merged_size = merged_size + matching.mT @ sizes[:, src]
        merged = (merged + matching.mT @ weighted[:, src]) / merged_size  # eq. 13

        match = best.squeeze(-1) + p
        if rule == "threshold":
            match = torch.where(hard.sum(-1) > 0, match, -1)
        size_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (
            merged.to(x.dtype),
            merged_size.to(size_dtype),
            match,
            second.squeeze(-1) + p,
            mid.squeeze(-1).detach(),
        )


def bdm_unmerge_reference(
    tokens: Tensor, match: Tensor, *, split: Split | tuple[int, int], num_prefix_tokens: int = 1
) -> Tensor:
    """(B, N, D): every original position gets the token it was merged into. IndexError, on the CPU: a match out of range."""
    watched = observed() or type(match) is not Tensor or torch._C._len_torch_dispatch_stack()
    if match.device.type == "cpu" and not watched and match.numel():
        low, high = int(match.min()), int(match.max())
        if low < 0 or high >= tokens.shape[1]:  # an index below zero would count from the end
            raise IndexError(f"match: index out of range: expected [0, {tokens.shape[1]}), got [{low}, {high}]")
    a, b = positions(split, tokens.device)
    p = num_prefix_tokens
    batch, merged = tokens.shape[:2]
    image, index = torch.arange(batch, device=tokens.device), torch.arange(merged, device=tokens.device)
    # (B, N) index into the merged tokens, in the order prefix, B, A; then in that of the positions.
    origin = torch.cat((index.expand(batch, merged), match), dim=1)
    origin = origin[:, torch.cat((index[:p], b + p, a + p)).argsort()]
    return tokens[image[:, None], origin]
