"""Derivatives: the hand-written backward, for every way of asking for it.

An ordinary call with a gradient goes through :class:`BDMMerge` straight to a backend's operator. Calls that are recorded or
transformed (torch.compile, torch.export, torch.jit.trace, torch.func) go by as one operator, ``fpet::merge``, which carries the
same formula: its kernel for autograd, registered here, applies :class:`BDMMerge` too, once for each level of torch.func, and a
rule for vmap folds the mapped dimension into the batch. What a compiler then sees are the operators below autograd, at no cost
at run time.

Only first derivatives, and in reverse mode only: everything else raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import backends
from .ops import (
    LIBRARY,
    BackwardArguments,
    Inputs,
    backward_outputs,
    forward_outputs,
    registered,
    unmerge_backward_output,
    unmerge_output,
)
from .reference import compute_dtype
from .tracing import transformed

__all__ = ["BDMMerge", "BDMUnmerge", "forward_mode"]

MEAN_TOKENS = 1024  # longest input whose mean key over heads is kept for the backward

fpet = torch.ops.fpet


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


class _ReverseMode(_SingleLevelFunction):
    """A function with a backward alone, applied at one level of torch.func; ``apply`` is then called by a kernel below."""

    name = "bdm_merge"
    apply: ClassVar[Callable[..., Any]]

    @classmethod
    def jvp(cls, ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{cls.name}: forward-mode differentiation is not supported (jvp, jacfwd, linearize, hessian, dual tensors); "
            "reverse mode is exact (grad, vjp, jacrev), and backend='reference' has both"
        )


def _watched() -> bool:
    """In a backward: whether its result may be differentiated again, or is transformed."""
    return torch.is_grad_enabled() or transformed() or forward_mode()


class BDMMerge(_ReverseMode):
    """tokens, size, match, second, mid = BDMMerge.apply(run, *arguments, backend); the mathematics is in docs/mathematics.md.

    Gradients reach x, size, the refinement's two weights, key_delta and key: callers detach a key that is to get none. Of the
    inputs and of tokens, only what the backward reads for the gradients asked for is kept. ``run`` computes the forward; None:
    the backend's operator.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable | None, *args: Any) -> tuple[Tensor, ...]:
        i, backend = Inputs(*args[:7]), args[14]
        need_x, need_key, need_size, need_down, need_up, need_mask, need_delta = ctx.needs_input_grad[1:8]
        if need_mask:
            raise ValueError(
                "refinement.dropout_mask: expected a mask that requires no gradient, since none is computed for it"
            )
        keys = need_key or need_down or need_up or need_delta
        values = keys or need_size  # products with tokens
        if run is not None:
            outputs = run(*args)
        elif keys and not need_key and backend in ("cpu", "cuda") and i.key.dim() == 4 and i.key.shape[2] <= MEAN_TOKENS:
            # The mean of the heads is formed once, kept, and read by the backward instead of them. Not on long grids: beside
            # the scores, reading the heads again costs nothing there, and the mean takes memory.
            i = i._replace(key=fpet.average_heads(i.key, compute_dtype(*i[:5], i.key_delta) == torch.float64))
            outputs = backends.forward_op(backend)(*i, *args[7:14])
        else:
            outputs = backends.forward_op(backend)(*args[:14])
        tokens, merged_size, match, second, mid = outputs
        ctx.mark_non_differentiable(match, second, mid)
        ctx.set_materialize_grads(False)  # else autograd fills zeros for every output, match too
        ctx.x_shape, ctx.dtype, ctx.key_shape, ctx.problem, ctx.backend = (
            i.x.shape,
            i.x.dtype,
            args[1].shape,
            args[9:14],
            backend,
        )
        ctx.needs = (need_x, need_size, need_down or need_up, need_delta, need_key)
        ctx.save_for_backward(
            i.x if values else None,
            i.key if keys else None,
            i.size if need_x or values else None,
            *(i[3:] if keys else (None,) * 4),
            tokens if values else None,
            merged_size,
            match,
            second,
            mid,
            *args[7:9],
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor | None, grad_size: Tensor | None, *_: Any) -> tuple:
        x, key, *rest, tokens, merged_size, match, second, mid, split_a, split_b = ctx.saved_tensors
        if grad_tokens is None:
            grad_tokens = merged_size.new_zeros((), dtype=ctx.dtype).expand(*merged_size.shape[:2], ctx.x_shape[2])
        # What was not kept is not read: any tensor with its dimensions stands for it.
        x = grad_tokens.as_strided(ctx.x_shape, (0, 0, 0)) if x is None else x
        tokens = grad_tokens if tokens is None else tokens
        key = x if key is None else key
        arguments = (
            grad_tokens, grad_size, x, key, *rest, tokens, merged_size, match, second, mid, split_a, split_b, *ctx.problem,
            *ctx.needs,
        )  # fmt: skip
        if _watched():
            gradients = fpet.merge_backward(*arguments, ctx.backend)
        else:
            gradients = backends.backward_op(ctx.backend)(*arguments)
        grad_x, grad_in_size, grad_down, grad_up, grad_delta, grad_key = gradients
        need_x, need_key, need_size, need_down, need_up, _, need_delta = ctx.needs_input_grad[1:8]
        if need_key and len(ctx.key_shape) == 4:
            grad_key = grad_key.unsqueeze(1).expand(ctx.key_shape)
        return (
            None,
            grad_x if need_x else None,
            grad_key if need_key else None,
            grad_in_size if need_size else None,
            grad_down if need_down else None,
            grad_up if need_up else None,
            None,
            grad_delta if need_delta else None,
            *(None,) * 8,
        )


class BDMUnmerge(_ReverseMode):
    """Gives every original position its merged token; the gradient sums back over each group, in a fixed order."""

    name = "bdm_unmerge"

    @staticmethod
    def forward(ctx: Any, run: Callable | None, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[1:4])
        ctx.problem = args[4:]
        return (run or fpet.bdm_unmerge)(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        sum_up = fpet.unmerge_backward if _watched() else fpet.bdm_unmerge_backward
        return (None, sum_up(grad, *ctx.saved_tensors, *ctx.problem), *(None,) * 6)


class _Gradient(_ReverseMode):
    """A backward as a function whose own derivative is refused: differentiating again is an error, not a silent zero."""

    @classmethod
    def backward(cls, ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{cls.name}: double backward is not supported; its gradient can be computed once only")


class BDMMergeGradient(_Gradient):
    @staticmethod
    def forward(ctx: Any, run: Callable | None, *args: Any) -> tuple[Tensor, ...]:
        return run(*args) if run else backends.backward_op(args[-1])(*args[:-1])


class BDMUnmergeGradient(_Gradient):
    name = "bdm_unmerge"

    @staticmethod
    def forward(ctx: Any, run: Callable | None, *args: Any) -> Tensor:
        return (run or fpet.bdm_unmerge_backward)(*args)


# --- vmap ------------------------------------------------------------------------------------------------------------


def _one_by_one(op: Any, count: int, dims: tuple, args: tuple) -> tuple[Any, Any]:
    results = [op(*(a if d is None else a.select(d, j) for a, d in zip(args, dims, strict=True))) for j in range(count)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


def _vmap(op: Any, shared: tuple[int, ...], info: Any, dims: tuple, *args: Any) -> tuple[Any, Any]:
    """The mapped dimension becomes part of the batch, except in ``shared``, the places of what all images share.

    Where one of these is mapped, or weights get a gradient for each element, the elements are computed one by one.
    """
    count, backward = info.batch_size, op is fpet.merge_backward.default
    needs = BackwardArguments.of(*args[:26]).needs if backward else None
    if any(dims[place] is not None for place in shared) or (needs is not None and needs.need_weights):
        return _one_by_one(op, count, dims, args)

    def fold(place: int) -> Any:
        arg = args[place]
        if not isinstance(arg, Tensor) or place in shared:
            return arg
        arg = arg.expand(count, *arg.shape) if dims[place] is None else arg.movedim(dims[place], 0)
        return arg.flatten(0, 1)

    results = op(*map(fold, range(len(args))))
    if isinstance(results, Tensor):
        return results.unflatten(0, (count, results.shape[0] // count)), 0
    there = (needs.need_x, needs.need_size, False, False, needs.need_refined, needs.need_key) if needs else (True,) * 5
    split = [r.unflatten(0, (count, r.shape[0] // count)) if yes else r for r, yes in zip(results, there, strict=True)]
    return tuple(split), tuple(0 if yes else None for yes in there)


# --- registration ----------------------------------------------------------------------------------------------------


def _register(name: str, function: type[_ReverseMode], fake: Callable, plain: Callable, shared: tuple[int, ...]) -> None:
    op = getattr(fpet, name).default

    def at_one_level(keyset: Any, *args: Any) -> Any:
        if not transformed():
            return function.apply(None, *args) if torch.is_grad_enabled() or forward_mode() else plain(*args)

        reverse, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

        def run(*inner: Any) -> Any:
            # autograd.Function switches both modes off, but the levels below this one have derivatives of their own.
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(reverse),
                forward_ad._set_fwd_grad_enabled(forward),
            ):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inner)

        with enable_single_level_autograd_function():
            return function.apply(run, *args)

    LIBRARY.impl(name, at_one_level, "Autograd", with_keyset=True)
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpet::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"fpet::{name}", functools.partial(_vmap, op, shared), lib=LIBRARY)


if not registered:
    _register("merge", BDMMerge, forward_outputs, lambda *a: backends.forward_op(a[-1])(*a[:-1]), (3, 4, 7, 8))
    _register(
        "merge_backward", BDMMergeGradient, backward_outputs, lambda *a: backends.backward_op(a[-1])(*a[:-1]), (5, 6, 14, 15)
    )
    _register("unmerge", BDMUnmerge, unmerge_output, fpet.bdm_unmerge, (2, 3))
    _register("unmerge_backward", BDMUnmergeGradient, unmerge_backward_output, fpet.bdm_unmerge_backward, (2, 3))
