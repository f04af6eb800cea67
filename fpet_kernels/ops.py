"""The operators ``torch.ops.fpet.*``: the one place where schemas, fake functions and FLOP formulas are registered.

The schemas exist wherever torch does. Their CPU kernels come from the native library (csrc/bindings/ops.cpp), which
:mod:`fpet_kernels.backends` loads where it was built; elsewhere, and for devices that have no kernel under these names, the
composite implementations below compute with the reference. Both operators take plain tensors and numbers:

- ``split_a``/``split_b``: int64 position lists, or ``None`` for the checkerboard of ``grid_h`` × ``grid_w``.
- ``key_a``-``delta`` as in :func:`fpet_kernels.bdm_merge`; ``cosine`` False means dot product.
- the forward also returns ``second`` and ``mid``, the second best destination and the mean of the two best scores, which
  the backward needs and nobody else.
- the backward computes only what its ``need_*`` flags ask for; the other results are empty tensors. ``grad_refined`` is the
  gradient at k', the refined key: it serves both key_delta and, with what flows through the refinement added in
  ``grad_key``, a key that is not detached.

They are below autograd: :class:`fpet_kernels.autograd.BDMMerge` wraps them. Under autocast they see their inputs as they are,
because every kernel already computes in float32.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import reference
from .split import Split

__all__ = ["LIBRARY", "backward_flops", "backward_outputs", "forward_flops", "forward_outputs"]

_SPLIT = "Tensor? split_a, Tensor? split_b, SymInt grid_h, SymInt grid_w, int num_prefix_tokens"
_PROBLEM = f"{_SPLIT}, float scale, bool cosine"
_INPUTS = "Tensor x, Tensor key, Tensor? size, Tensor? w_down, Tensor? w_up, Tensor? dropout_mask, Tensor? key_delta"

FORWARD_ARGS = f"{_INPUTS}, {_PROBLEM}"
FORWARD_RETURNS = "(Tensor tokens, Tensor merged_size, Tensor match, Tensor second, Tensor mid)"
BACKWARD_ARGS = (
    f"Tensor grad_tokens, Tensor? grad_size, {_INPUTS}, Tensor tokens, Tensor merged_size, Tensor match, Tensor second, "
    f"Tensor mid, {_PROBLEM}, bool need_x, bool need_size, bool need_weights, bool need_refined, bool need_key"
)
BACKWARD_RETURNS = (
    "(Tensor grad_x, Tensor grad_in_size, Tensor grad_w_down, Tensor grad_w_up, Tensor grad_refined, Tensor grad_key)"
)
UNMERGE_ARGS = f"Tensor tokens, Tensor match, {_SPLIT}"

LIBRARY = Library("fpet", "DEF")
LIBRARY.define(f"bdm_forward({FORWARD_ARGS}) -> {FORWARD_RETURNS}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"bdm_backward({BACKWARD_ARGS}) -> {BACKWARD_RETURNS}", tags=(torch.Tag.pt2_compliant_tag,))
# (B, heads, N, C) -> (B, N, C) in the precision of scores: float32, or float64 where `wide` or the key is float64.
LIBRARY.define("average_heads(Tensor key, bool wide) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"bdm_unmerge({UNMERGE_ARGS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# The gradient of unmerge: every merged token sums the gradients of the positions it was given back to.
LIBRARY.define(f"bdm_unmerge_backward(Tensor grad, Tensor match, {_SPLIT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _counts(split_a: Tensor | None, split_b: Tensor | None, grid_h: int, grid_w: int) -> tuple[int, int]:
    """(N_A, N_B)."""
    if split_a is not None and split_b is not None:
        return split_a.shape[0], split_b.shape[0]
    return (grid_h * grid_w + 1) // 2, grid_h * grid_w // 2


def _split(split_a: Tensor | None, split_b: Tensor | None, grid_h: int, grid_w: int) -> Split | tuple[int, int]:
    if split_a is not None and split_b is not None:
        return Split(split_a.numel() + split_b.numel(), split_a, split_b)
    return grid_h, grid_w


# --- shapes --------------------------------------------------------------------------------------------------------


def forward_outputs(
    x, key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b, grid_h, grid_w, num_prefix_tokens, scale, cosine
):  # type: ignore[no-untyped-def]
    """Empty outputs of ``bdm_forward``: its fake function, and what Python launchers fill."""
    num_a, num_b = _counts(split_a, split_b, grid_h, grid_w)
    batch, merged = x.shape[0], num_prefix_tokens + num_b
    size_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    score_dtype = reference.compute_dtype(x, key, size, w_down, w_up, key_delta)
    return (
        x.new_empty(batch, merged, x.shape[2]),
        x.new_empty(batch, merged, 1, dtype=size_dtype),
        x.new_empty(batch, num_a, dtype=torch.int64),
        x.new_empty(batch, num_a, dtype=torch.int64),
        x.new_empty(batch, num_a, dtype=score_dtype),
    )


def backward_outputs(
    grad_tokens, grad_size, x, key, size, w_down, w_up, dropout_mask, key_delta, tokens, merged_size, match, second, mid,
    split_a, split_b, grid_h, grid_w, num_prefix_tokens, scale, cosine, need_x, need_size, need_weights, need_refined, need_key,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Empty outputs of ``bdm_backward``; (0,) where a gradient is not asked for."""
    batch, n, dim = x.shape
    channels = key.shape[-1]
    none = (0,)
    size_dtype = x.dtype if size is None else size.dtype
    return (
        x.new_empty((batch, n, dim) if need_x else none),
        x.new_empty((batch, n, 1) if need_size else none, dtype=size_dtype),
        x.new_empty(tuple(w_down.shape) if need_weights else none, dtype=x.dtype if w_down is None else w_down.dtype),
        x.new_empty(tuple(w_up.shape) if need_weights else none, dtype=x.dtype if w_up is None else w_up.dtype),
        x.new_empty((batch, n, channels) if need_refined else none, dtype=key.dtype if key_delta is None else key_delta.dtype),
        x.new_empty((batch, n, channels) if need_key else none, dtype=key.dtype),
    )


def _fake_average_heads(key, wide):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if wide else reference.compute_dtype(key)
    return key.new_empty(key.shape[0], key.shape[2], key.shape[3], dtype=dtype)


def _fake_unmerge(tokens, match, split_a, split_b, grid_h, grid_w, num_prefix_tokens):  # type: ignore[no-untyped-def]
    num_a, num_b = _counts(split_a, split_b, grid_h, grid_w)
    return tokens.new_empty(tokens.shape[0], num_prefix_tokens + num_a + num_b, tokens.shape[2])


def _fake_unmerge_backward(grad, match, split_a, split_b, grid_h, grid_w, num_prefix_tokens):  # type: ignore[no-untyped-def]
    _, num_b = _counts(split_a, split_b, grid_h, grid_w)
    return grad.new_empty(grad.shape[0], num_prefix_tokens + num_b, grad.shape[2])


# --- composite implementations: any device, no binary ----------------------------------------------------------------


def _forward(x, key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b, grid_h, grid_w, p, scale, cosine):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        outputs = reference.bdm_merge_reference(
            x, key, split=_split(split_a, split_b, grid_h, grid_w), num_prefix_tokens=p, size=size, w_down=w_down, w_up=w_up,
            scale=scale, dropout_mask=dropout_mask, key_delta=key_delta, similarity="cosine" if cosine else "dot",
        )  # fmt: skip
    return tuple(t.contiguous() for t in outputs)


def _backward(
    grad_tokens, grad_size, x, key, size, w_down, w_up, dropout_mask, key_delta, tokens, merged_size, match, second, mid,
    split_a, split_b, grid_h, grid_w, p, scale, cosine, need_x, need_size, need_weights, need_refined, need_key,
):  # type: ignore[no-untyped-def]  # fmt: skip
    with torch.enable_grad():

        def leaf(t: Tensor | None, wanted: bool) -> Tensor | None:
            return None if t is None else t.detach().requires_grad_(wanted)

        dtype = reference.compute_dtype(x, key, size, w_down, w_up, key_delta)
        x_, key_ = leaf(x, need_x), leaf(reference.average_heads(key, dtype), need_key)
        assert x_ is not None and key_ is not None
        size_ = leaf(x.new_ones(x.shape[0], x.shape[1], 1, dtype=dtype) if size is None else size, need_size)
        down, up = leaf(w_down, need_weights), leaf(w_up, need_weights)
        # The refined key's own gradient is read off an added zero, whether there is a key_delta or not.
        delta = torch.zeros_like(key_, requires_grad=need_refined) if key_delta is None else key_delta.to(dtype, copy=True)
        delta = delta.detach().requires_grad_(need_refined)
        out, out_size, *_ = reference.bdm_merge_reference(
            x_, key_, split=_split(split_a, split_b, grid_h, grid_w), num_prefix_tokens=p, size=size_, w_down=down, w_up=up,
            scale=scale, dropout_mask=dropout_mask, key_delta=delta, similarity="cosine" if cosine else "dot",
            detach_key=not need_key,
        )  # fmt: skip
        wanted = [t for t in (x_, size_, down, up, delta, key_) if t is not None and t.requires_grad]
        grads = {}
        if wanted:
            pairs = [(out, grad_tokens)] if grad_size is None else [(out, grad_tokens), (out_size, grad_size)]
            pairs = [(o, g) for o, g in pairs if o.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            grads = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)}

    empty = backward_outputs(
        grad_tokens, grad_size, x, key, size, w_down, w_up, dropout_mask, key_delta, tokens, merged_size, match, second, mid,
        split_a, split_b, grid_h, grid_w, p, scale, cosine, need_x, need_size, need_weights, need_refined, need_key,
    )  # fmt: skip
    heads = key.shape[1] if key.dim() == 4 else 1
    results = []
    for t, out in zip((x_, size_, down, up, delta, key_), empty, strict=True):
        grad = None if t is None else grads.get(id(t))
        if grad is not None and t is key_:
            grad = grad / heads
        results.append(out if grad is None else grad.to(out.dtype).contiguous())
    return tuple(results)


def _average_heads(key, wide):  # type: ignore[no-untyped-def]
    return reference.average_heads(key, torch.float64 if wide else reference.compute_dtype(key)).contiguous()


def _unmerge(tokens, match, split_a, split_b, grid_h, grid_w, p):  # type: ignore[no-untyped-def]
    split = _split(split_a, split_b, grid_h, grid_w)
    return reference.bdm_unmerge_reference(tokens, match, split=split, num_prefix_tokens=p)


def _unmerge_backward(grad, match, split_a, split_b, grid_h, grid_w, p):  # type: ignore[no-untyped-def]
    split = _split(split_a, split_b, grid_h, grid_w)
    leaf = _fake_unmerge_backward(grad, match, split_a, split_b, grid_h, grid_w, p).zero_().requires_grad_()
    with torch.enable_grad():
        out = reference.bdm_unmerge_reference(leaf, match, split=split, num_prefix_tokens=p)
    return torch.autograd.grad(out, leaf, grad)[0]


for _name, _composite, _fake in (
    ("bdm_forward", _forward, forward_outputs),
    ("bdm_backward", _backward, backward_outputs),
    ("average_heads", _average_heads, _fake_average_heads),
    ("bdm_unmerge", _unmerge, _fake_unmerge),
    ("bdm_unmerge_backward", _unmerge_backward, _fake_unmerge_backward),
):
    LIBRARY.impl(_name, _composite, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpet::{_name}", _fake, lib=LIBRARY)


# --- FLOPs: multiply and add count as two, as everywhere in torch.utils.flop_counter ---------------------------------


def _problem_flops(x_shape, key_shape, w_down_shape, split_a_shape, split_b_shape, grid_h, grid_w):  # type: ignore[no-untyped-def]
    """(FLOPs of one N_A × N_B product per channel, FLOPs of one N × C × h product)."""
    if split_a_shape is not None and split_b_shape is not None:
        num_a, num_b = split_a_shape[0], split_b_shape[0]
    else:
        num_a, num_b = (grid_h * grid_w + 1) // 2, grid_h * grid_w // 2
    hidden = 0 if w_down_shape is None else w_down_shape[0]
    batch = x_shape[0]
    return 2 * batch * num_a * num_b, 2 * batch * (num_a + num_b) * key_shape[-1] * hidden


def forward_flops(
    x_shape, key_shape, size_shape, w_down_shape, w_up_shape, dropout_mask_shape, key_delta_shape, split_a_shape,
    split_b_shape, grid_h, grid_w, *args, out_shape=None, **kwargs,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Scores, and both layers of the refinement."""
    pair, linear = _problem_flops(x_shape, key_shape, w_down_shape, split_a_shape, split_b_shape, grid_h, grid_w)
    return pair * key_shape[-1] + 2 * linear


def backward_flops(
    grad_tokens_shape, grad_size_shape, x_shape, key_shape, size_shape, w_down_shape, w_up_shape, dropout_mask_shape,
    key_delta_shape, tokens_shape, merged_size_shape, match_shape, second_shape, mid_shape, split_a_shape, split_b_shape,
    grid_h, grid_w, num_prefix_tokens, scale, cosine, need_x, need_size, need_weights, need_refined, need_key,
    *args, out_shape=None, **kwargs,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Without a gradient on the key path the backward is a gather; with one, scores again, dM, dk̂ twice, and the refinement."""
    if not (need_weights or need_refined or need_key):
        return 0
    pair, linear = _problem_flops(x_shape, key_shape, w_down_shape, split_a_shape, split_b_shape, grid_h, grid_w)
    through_refinement = (2 + (3 if need_weights else 0) + (1 if need_key else 0)) * linear
    return pair * (x_shape[-1] + 3 * key_shape[-1]) + through_refinement


class _FlopCounterFinder(importlib.abc.MetaPathFinder):
    """Registers the formulas once somebody imports torch.utils.flop_counter: it imports Triton, which this package must not."""

    module = "torch.utils.flop_counter"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register_flop_formulas(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_flop_formulas(flop_counter: ModuleType) -> None:
    flop_counter.register_flop_formula(torch.ops.fpet.bdm_forward)(forward_flops)
    flop_counter.register_flop_formula(torch.ops.fpet.bdm_backward)(backward_flops)


if _FlopCounterFinder.module in sys.modules:
    _register_flop_formulas(sys.modules[_FlopCounterFinder.module])
else:
    sys.meta_path.insert(0, _FlopCounterFinder())
