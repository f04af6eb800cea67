"""The public functions: :func:`bdm_merge` and :func:`bdm_unmerge`."""

from __future__ import annotations

import numbers
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .autograd import BDMMerge, BDMUnmerge, forward_mode
from .reference import bdm_merge_reference, bdm_unmerge_reference
from .split import Split, as_integer, check_sides, rebuild_split
from .tracing import observed, requires_gradient

__all__ = ["KeyRefinement", "Merged", "bdm_merge", "bdm_unmerge"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class KeyRefinement(NamedTuple):
    """The tiny adapter that learns the matching: ``scale · (ReLU(key W_downᵀ) ⊙ dropout_mask) W_upᵀ`` is added to the key.

    Equation 10. Plain tensors for one call; ``fpet.KeyRefinement`` is the module that holds such weights.

    Attributes:
        w_down: (h, C), any floating dtype. w_up: (C, h), the same dtype. Both without bias.
        scale: a number.
        dropout_mask: (B, N, h), floating (scaled by 1 / (1 − p) already) or bool; None for no dropout.
    """

    w_down: Tensor
    w_up: Tensor
    scale: float = 1.0
    dropout_mask: Tensor | None = None


class Merged(NamedTuple):
    """What :func:`bdm_merge` returns.

    Attributes:
        tokens: (B, M, D) in x's dtype; M = num_prefix_tokens + N_B: the prefix tokens, then set B in raster order.
        size: (B, M, 1), float32 (float64 for float64 x): how many original tokens each one stands for.
        match: (B, N_A) int64: for every source, the index in ``tokens`` that it was merged into.
    """

    tokens: Tensor
    size: Tensor
    match: Tensor


def bdm_merge(
    x: Tensor,
    key: Tensor,
    *,
    grid_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    split: Split | None = None,
    size: Tensor | None = None,
    refinement: KeyRefinement | None = None,
    key_delta: Tensor | None = None,
    similarity: str = "cosine",
    detach_key: bool = True,
    backend: str | None = None,
) -> Merged:
    r"""Merges half of the tokens: bipartite differentiable matching of FPET (CVPR 2025, section 4.2), in one fused operator.

    The patches whose row + column is even (set A) are each merged into the patch with odd row + column (set B) whose key is
    most similar:

    .. math::
        k' &= \mathrm{key} + \mathrm{key\_delta} + s\,\mathrm{ReLU}(\mathrm{key}\,W_{down}^T)\,W_{up}^T \\
        S_{ij} &= \langle k'_i, k'_j\rangle / (\|k'_i\| \|k'_j\|) \qquad i \in A, j \in B \\
        \mathrm{soft}_{ij} &= \sigma(S_{ij} - m_i), \quad m_i = \text{mean of the two largest } S_{i\cdot} \\
        \mathrm{tokens}_j &= (n_j x_j + \sum_{i \to j} n_i x_i) / n'_j, \quad n'_j = n_j + \sum_{i \to j} n_i

    Every source is matched, always; equal scores go to the lowest index. The gradient takes soft in place of the hard match
    (eq. 14, straight-through). Scores, normalisation and sums are float32 in every reduced precision (float64 where an
    input is float64), whatever autocast says. The result is bitwise reproducible, for an image whatever batch it is in.

    Args:
        x: (B, N, D) tokens, float32, bfloat16, float16 or float64, any strides.
        key: (B, N, C), or (B, heads, N, C), averaged over heads without a copy; any strides, any of the dtypes.
        grid_size: (H, W) of the patch grid in raster order; N = num_prefix_tokens + H·W. Any H and W, odd ones too.
        num_prefix_tokens: class, distillation and register tokens, first in N; kept as they are, never a destination.
        split: a :class:`Split` instead of the checkerboard of ``grid_size``; give one of the two.
        size: (B, N, 1) how many tokens each token stands for already; None means one each.
        refinement: see :class:`KeyRefinement`.
        key_delta: (B, N, C) any other learned correction of the key.
        similarity: "cosine", as the authors' code computes; or "dot", as the paper prints (eq. 11).
        detach_key: no gradient to ``key``. False is the paper's ablation without gradient stopping (Table 3).
        backend: None for the best one available (see :func:`explain`), or the name of one.

    Returns:
        :class:`Merged`: ``tokens``, ``size``, ``match``. Gradients flow from tokens and size to x, size, the refinement's
        weights and key_delta. Double backward is not supported and says so.

    Raises:
        ValueError: a shape, grid, device or option does not fit; TypeError: a dtype or type does not; RuntimeError: the
            backend asked for can't run here. The message names the argument, what was expected and what came.
    """
    batch, n, channels = _check_tokens(x, key)
    num_prefix_tokens = _check_prefix(num_prefix_tokens)
    where, num_patches, _ = _resolve_split(grid_size, split, num_prefix_tokens)
    if n != num_prefix_tokens + num_patches:
        raise ValueError(
            f"x: expected N = {num_prefix_tokens} prefix tokens + {num_patches} of {_name(where)} "
            f"= {num_prefix_tokens + num_patches}, got N = {n}"
        )
    if similarity != "cosine" and similarity != "dot":
        raise ValueError(f"similarity: expected 'cosine' or 'dot', got {similarity!r}")
    if size is not None:
        _check("size", size, (batch, n, 1), x)
    if key_delta is not None:
        _check("key_delta", key_delta, (batch, n, channels), x)
    w_down = w_up = dropout_mask = None
    scale = 1.0
    if refinement is not None:
        w_down, w_up, scale, dropout_mask = _check_refinement(refinement, batch, n, channels, x)

    name = backends.select(x, backend)
    if name == "reference":
        tokens, merged_size, match, _, _ = bdm_merge_reference(
            x, key, split=where, num_prefix_tokens=num_prefix_tokens, size=size, w_down=w_down, w_up=w_up, scale=scale,
            dropout_mask=dropout_mask, key_delta=key_delta, similarity=similarity, detach_key=detach_key,
        )  # fmt: skip
        return Merged(tokens, merged_size, match)

    watched = observed()
    if detach_key and (watched or key.requires_grad or forward_mode()):
        key = key.detach()
    args = (
        x, key, size, w_down, w_up, dropout_mask, key_delta, *_split_args(where, x), num_prefix_tokens, scale,
        similarity == "cosine",
    )  # fmt: skip
    if watched:
        outputs = torch.ops.fpet.merge(*args, name)
    elif forward_mode() or (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or key.requires_grad
            or (size is not None and size.requires_grad)
            or (key_delta is not None and key_delta.requires_grad)
            or (w_down is not None and w_down.requires_grad)
            or (w_up is not None and w_up.requires_grad)
        )
    ):
        outputs = BDMMerge.apply(None, *args, name)
    else:
        outputs = backends.forward_op(name)(*args)
    return Merged(*outputs[:3])


def bdm_unmerge(
    tokens: Tensor,
    match: Tensor,
    *,
    grid_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    split: Split | None = None,
    backend: str | None = None,
) -> Tensor:
    """Undoes the change of shape: every original position gets the merged token that stands for it.

    Args:
        tokens: (B, M, D), as :func:`bdm_merge` returned them or transformed since.
        match: (B, N_A) int64, from the same call. grid_size, num_prefix_tokens, split: as in that call.
        backend: None, "cuda", "cpu" or "reference"; "triton" has no kernel of its own here and computes as the reference.

    Returns:
        (B, N, D), with gradient: each merged token gets the sum over the positions it was given back to.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`bdm_merge`; IndexError or RuntimeError: a match outside ``[0, M)``.
    """
    for name, value in (("tokens", tokens), ("match", match)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        _check_dense(name, value)
    if tokens.dim() != 3:
        raise ValueError(f"tokens: expected (B, M, D), got shape {tuple(tokens.shape)}")
    if tokens.dtype not in _DTYPES:
        raise TypeError(f"tokens: expected float32, bfloat16, float16 or float64, got {tokens.dtype}")
    if match.dtype != torch.int64:
        raise TypeError(f"match: expected int64, got {match.dtype}")
    if match.device != tokens.device:
        raise ValueError(f"match: expected device {tokens.device}, as tokens, got {match.device}")
    num_prefix_tokens = _check_prefix(num_prefix_tokens)
    where, num_patches, num_a = _resolve_split(grid_size, split, num_prefix_tokens)
    batch, merged = tokens.shape[0], num_prefix_tokens + num_patches - num_a
    if tokens.shape[1] != merged:
        raise ValueError(
            f"tokens: expected M = {num_prefix_tokens} prefix tokens + {num_patches - num_a} destinations of {_name(where)} "
            f"= {merged}, got M = {tokens.shape[1]}"
        )
    if match.shape != (batch, num_a):
        raise ValueError(f"match: expected shape {(batch, num_a)}, got {tuple(match.shape)}")
    if backend is not None:
        backends.select(tokens, backend)
    elif backends.cuda_kernels_fail(tokens):
        backend = "reference"
    if backend in ("reference", "triton"):
        return bdm_unmerge_reference(tokens, match, split=where, num_prefix_tokens=num_prefix_tokens)
    args = (tokens, match, *_split_args(where, tokens), num_prefix_tokens)
    if observed():
        return torch.ops.fpet.unmerge(*args)
    if forward_mode() or (tokens.requires_grad and torch.is_grad_enabled()):
        return BDMUnmerge.apply(None, *args)
    return torch.ops.fpet.bdm_unmerge(*args)


def _check_tokens(x: Tensor, key: Tensor) -> tuple[int, int, int]:
    if not isinstance(x, Tensor) or not isinstance(key, Tensor):
        name, got = ("key", key) if isinstance(x, Tensor) else ("x", x)
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(got).__name__}")
    if x.layout is not torch.strided or key.layout is not torch.strided or x.is_nested or key.is_nested:
        _check_dense("x", x)
        _check_dense("key", key)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, N, D), got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES or key.dtype not in _DTYPES:
        name, got = ("key", key.dtype) if x.dtype in _DTYPES else ("x", x.dtype)
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {got}")
    shape = key.shape
    if not (len(shape) == 3 or len(shape) == 4):
        raise ValueError(f"key: expected (B, N, C) or (B, heads, N, C), got shape {tuple(shape)}")
    batch, n, channels = x.shape[0], x.shape[1], shape[-1]
    if shape[0] != batch or shape[-2] != n:
        raise ValueError(f"key: expected B = {batch} and N = {n}, as x, got shape {tuple(shape)}")
    if channels < 1 or x.shape[2] < 1 or (len(shape) == 4 and shape[1] < 1):
        raise ValueError(f"x, key: expected D, C and heads of at least 1, got x {tuple(x.shape)} and key {tuple(shape)}")
    if key.device != x.device:
        raise ValueError(f"key: expected device {x.device}, as x, got {key.device}")
    return batch, n, channels


def _check_dense(name: str, t: Tensor) -> None:
    if t.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one ({t.layout}): torch.nested.to_padded_tensor, or one by one"
        )
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}: use {name}.to_dense()")


def _check_prefix(num_prefix_tokens: Any) -> Any:
    checked = as_integer(num_prefix_tokens)
    if checked is None:
        raise TypeError(f"num_prefix_tokens: expected an int, got {num_prefix_tokens!r}")
    return checked


def _resolve_split(
    grid_size: tuple[int, int] | None, split: Split | None, num_prefix_tokens: int
) -> tuple[Split | tuple[int, int], int, int]:
    """The split, or the (H, W) of its checkerboard; how many patches it has, and how many of them are sources."""
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens: expected at least 0, got {num_prefix_tokens}")
    if (grid_size is None) == (split is None):
        got = "neither" if split is None else "both"
        raise ValueError(f"grid_size, split: expected exactly one of them, got {got}")
    if split is not None:
        if not isinstance(split, Split):
            raise TypeError(f"split: expected a fpet_kernels.Split, got {type(split).__name__}")
        if split.grid is not None:  # by numbers alone: a compiler need not look at the lists
            return split.grid, split.num_tokens, (split.num_tokens + 1) // 2
        return split, split.num_tokens, split.a.shape[0]
    try:
        height, width = grid_size  # type: ignore[misc]
    except (TypeError, ValueError):
        raise ValueError(f"grid_size: expected (H, W), got {grid_size!r}") from None
    # The usual case, at once. isinstance, as Dynamo can't compare the types of values that it was told are constant.
    usual = isinstance(height, int) and isinstance(width, int) and height > 1 and width > 1
    if not usual:
        height, width = check_sides(height=height, width=width)
    if height * width < 4:
        raise ValueError(f"grid_size: {height}×{width} has fewer than two destinations; expected at least 4 patches")
    return (height, width), height * width, (height * width + 1) // 2


def _split_args(split: Split | tuple[int, int], x: Tensor) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What the operators take: position lists, or the sides of a checkerboard."""
    if not isinstance(split, Split):
        return (None, None, *split)
    with (None if type(x) is Tensor else getattr(x, "fake_mode", None)) or nullcontext():
        return (*split.on(x.device), 0, 0)


def _name(split: Split | tuple[int, int]) -> str:
    return "the split" if isinstance(split, Split) else f"a {split[0]}×{split[1]} grid"


def _check(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, *, allow_bool: bool = False) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    _check_dense(name, t)
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype not in _DTYPES and not (allow_bool and t.dtype == torch.bool):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, as x, got {t.device}")


def _check_refinement(
    refinement: KeyRefinement, batch: int, n: int, channels: int, x: Tensor
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    if not isinstance(refinement, KeyRefinement):
        raise TypeError(f"refinement: expected a fpet_kernels.KeyRefinement, got {type(refinement).__name__}")
    w_down, w_up, scale, mask = refinement
    if not isinstance(scale, int | float):
        if not isinstance(scale, numbers.Real | torch.SymFloat):
            raise TypeError(f"refinement.scale: expected a number, got {scale!r}")
        scale = scale if isinstance(scale, torch.SymFloat) else float(scale)  # NumPy's
    if isinstance(w_down, Tensor):
        _check_dense("refinement.w_down", w_down)
    if not isinstance(w_down, Tensor) or w_down.dim() != 2 or w_down.shape[0] < 1:
        got = tuple(w_down.shape) if isinstance(w_down, Tensor) else type(w_down).__name__
        raise ValueError(f"refinement.w_down: expected shape (h, {channels}) with h of at least 1, got {got}")
    hidden = w_down.shape[0]
    _check("refinement.w_down", w_down, (hidden, channels), x)
    _check("refinement.w_up", w_up, (channels, hidden), x)
    if w_up.dtype != w_down.dtype:
        raise TypeError(f"refinement.w_up: expected {w_down.dtype}, as w_down, got {w_up.dtype}")
    if mask is not None:
        _check("refinement.dropout_mask", mask, (batch, n, hidden), x, allow_bool=True)
        if torch.is_grad_enabled() and requires_gradient(mask):
            raise ValueError(
                "refinement.dropout_mask: expected a mask that requires no gradient, since none is computed for it, "
                "got one that does: detach it"
            )
    return w_down, w_up, scale, mask


# torch.load(..., weights_only=True) gives these back, where fpet_kernels has been imported.
torch.serialization.add_safe_globals([KeyRefinement, Merged, Split, rebuild_split])
