"""The hand-written backward, as ``torch.autograd.Function``s over the operators of a backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .reference import compute_dtype

__all__ = ["BDMMerge", "BDMMergeTransformed", "BDMUnmerge"]

MEAN_TOKENS = 1024  # longest input whose mean key over heads is kept for the backward


class _NoDoubleBackward(torch.autograd.Function):
    """Passes first gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(f"{ctx.name}: double backward is not supported; its gradient can be computed once only")


def _once(name: str, results: tuple[Tensor, ...], sources: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """``results`` of a backward over ``sources``, such that differentiating them again is an error, not a silent zero."""
    if not torch.is_grad_enabled():
        return results
    differentiable = [t for t in sources if t is not None and t.requires_grad]
    return _NoDoubleBackward.apply(name, len(results), *results, *differentiable) if differentiable else results


def _merge(
    x: Tensor,
    key: Tensor,
    size: Tensor | None,
    w_down: Tensor | None,
    w_up: Tensor | None,
    dropout_mask: Tensor | None,
    key_delta: Tensor | None,
    split_a: Tensor | None,
    split_b: Tensor | None,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
    scale: float,
    cosine: bool,
    detach_key: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    kept_key = key
    if key.dim() == 4 and _saves_mean(key, w_down, w_up, key_delta, detach_key, backend):
        wide = compute_dtype(x, key, size, w_down, w_up, key_delta) == torch.float64
        kept_key = torch.ops.fpet.average_heads(key, wide)
    outputs = backends.forward_op(backend)(
        x, kept_key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b, grid_h, grid_w, num_prefix_tokens, scale,
        cosine,
    )  # fmt: skip
    return outputs if kept_key is key else (*outputs, kept_key)


def _saves_mean(
    key: Tensor, w_down: Tensor | None, w_up: Tensor | None, key_delta: Tensor | None, detach_key: bool, backend: str
) -> bool:
    """Whether the backward will read the detached key: then its mean is formed once, kept, and read instead.

    Not on long grids: beside the scores, reading the heads again costs nothing there, and the mean takes memory.
    """
    if backend != "cpu" or not detach_key or key.shape[2] > MEAN_TOKENS:
        return False
    return any(t is not None and t.requires_grad for t in (key_delta, w_down, w_up))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.problem, ctx.detach_key, ctx.backend = inputs[:9], inputs[9:14], inputs[14], inputs[15]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for every output, match and mean key too
    if len(output) == 6:
        tensors = (tensors[0], output[5], *tensors[2:])
    ctx.save_for_backward(*tensors, *output[:5])


class BDMMerge(torch.autograd.Function):
    """tokens, size, match, second, mid[, mean key] = BDMMerge.apply(...); the mathematics is in docs/mathematics.md.

    Gradients reach x, size, the refinement's two weights and key_delta, and the key itself unless it is detached.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _merge(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor | None, grad_size: Tensor | None, *_: Any) -> tuple:
        *inputs, split_a, split_b, tokens, merged_size, match, second, mid = ctx.saved_tensors
        key = inputs[1]
        if grad_tokens is None:
            grad_tokens = torch.zeros_like(tokens)
        need_x, need_key, need_size, need_down, need_up, _, need_delta = ctx.needs_input_grad[:7]
        need_key = need_key and not ctx.detach_key
        with torch.no_grad():
            results = backends.backward_op(ctx.backend)(
                grad_tokens, grad_size, *inputs, tokens, merged_size, match, second, mid, split_a, split_b, *ctx.problem,
                need_x, need_size, need_down or need_up, need_delta, need_key,
            )  # fmt: skip
        grad_x, grad_in_size, grad_down, grad_up, grad_delta, grad_key = _once(
            "bdm_merge", results, (grad_tokens, grad_size, *inputs)
        )
        if need_key and key.dim() == 4:
            grad_key = grad_key.unsqueeze(1).expand_as(key)
        return (
            grad_x if need_x else None,
            grad_key if need_key else None,
            grad_in_size if need_size else None,
            grad_down if need_down else None,
            grad_up if need_up else None,
            None,
            grad_delta if need_delta else None,
            *(None,) * 9,
        )


class BDMMergeTransformed(BDMMerge):
    """The same in the form that ``torch.func`` transforms need, which costs three times as much to call."""

    forward = staticmethod(_merge)  # type: ignore[assignment]
    setup_context = staticmethod(_keep)


class BDMUnmerge(torch.autograd.Function):
    """Gives every original position its merged token; the gradient sums back over each group, in a fixed order."""

    @staticmethod
    def forward(
        tokens: Tensor,
        match: Tensor,
        split_a: Tensor | None,
        split_b: Tensor | None,
        grid_h: int,
        grid_w: int,
        num_prefix_tokens: int,
    ) -> Tensor:
        return torch.ops.fpet.bdm_unmerge(tokens, match, split_a, split_b, grid_h, grid_w, num_prefix_tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.problem = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        match, split_a, split_b = ctx.saved_tensors
        with torch.no_grad():
            result = torch.ops.fpet.bdm_unmerge_backward(grad, match, split_a, split_b, *ctx.problem)
        return (*_once("bdm_unmerge", (result,), (grad,)), *(None,) * 6)
