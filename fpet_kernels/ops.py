"""The operators below autograd, ``torch.ops.fpet.*``: schemas, fake functions, composite implementations, FLOP formulas.

The native library defines the schemas (csrc/bindings/schemas.h), so that C++ programs without Python have them too; this module
defines those that no library did. Kernels come from the native libraries; elsewhere, and for devices that have no kernel under
these names, the composite implementations below compute with the reference. The operators take plain tensors and numbers:

- ``split_a``/``split_b``: int64 position lists, or ``None`` for the checkerboard of ``grid_h`` × ``grid_w``.
- ``x`` to ``key_delta`` as in :func:`fpet_kernels.bdm_merge`; ``cosine`` False means dot product.
- the forward also returns ``second`` and ``mid``, the second best destination and the mean of the two best scores, which
  the backward needs and nobody else.
- the backward computes only what its ``need_*`` flags ask for; the other results are empty tensors. ``grad_refined`` is the
  gradient at k', the refined key: it serves both key_delta and, with what flows through the refinement added in
  ``grad_key``, a key that is not detached.

Their derivatives are in :mod:`fpet_kernels.autograd`. Under autocast they see their inputs as they are, because every kernel
already computes in float32.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch.library import Library

from . import reference
from .split import Split

__all__ = [
    "LIBRARY",
    "Inputs",
    "Needs",
    "Problem",
    "Results",
    "backward_flops",
    "backward_outputs",
    "forward_flops",
    "forward_outputs",
    "registered",
    "unmerge_backward_output",
    "unmerge_output",
]


# --- arguments: every list of them stands here, and once more in C++ (csrc/bindings/schemas.h) -----------------------------


class Inputs(NamedTuple):
    """What is merged, and by what."""

    x: Tensor
    key: Tensor
    size: Tensor | None
    w_down: Tensor | None
    w_up: Tensor | None
    dropout_mask: Tensor | None
    key_delta: Tensor | None


class Problem(NamedTuple):
    """Where the sources and the destinations are, and how keys are compared. Unmerging takes the first five."""

    split_a: Tensor | None
    split_b: Tensor | None
    grid_h: SymInt
    grid_w: SymInt
    num_prefix_tokens: int
    scale: float
    cosine: bool


class Results(NamedTuple):
    """What the forward returns."""

    tokens: Tensor
    merged_size: Tensor
    match: Tensor
    second: Tensor
    mid: Tensor


class Needs(NamedTuple):
    """Which gradients the backward computes; ``need_weights`` means both."""

    need_x: bool
    need_size: bool
    need_weights: bool
    need_refined: bool
    need_key: bool


class BackwardArguments(NamedTuple):
    """The backward's arguments in groups; :meth:`of` forms them from the flat list."""

    grad_tokens: Tensor
    grad_size: Tensor | None
    inputs: Inputs
    results: Results
    problem: Problem
    needs: Needs

    @classmethod
    def of(cls, grad_tokens: Tensor, grad_size: Tensor | None, *rest: Any) -> BackwardArguments:
        return cls(grad_tokens, grad_size, Inputs(*rest[:7]), Results(*rest[7:12]), Problem(*rest[12:19]), Needs(*rest[19:]))


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", SymInt: "SymInt", int: "int", float: "float", bool: "bool"}


def _fields(*groups: type) -> str:
    return ", ".join(f"{_TYPES[kind]} {name}" for group in groups for name, kind in typing.get_type_hints(group).items())


FORWARD_ARGS = _fields(Inputs, Problem)
_PLACES = ", ".join(_fields(Problem).split(", ")[:5])
FORWARD_RETURNS = f"({_fields(Results)})"
BACKWARD_ARGS = f"Tensor grad_tokens, Tensor? grad_size, {_fields(Inputs, Results, Problem, Needs)}"
BACKWARD_RETURNS = (
    "(Tensor grad_x, Tensor grad_in_size, Tensor grad_w_down, Tensor grad_w_up, Tensor grad_refined, Tensor grad_key)"
)
SCHEMAS = {
    "bdm_forward": f"({FORWARD_ARGS}) -> {FORWARD_RETURNS}",
    "bdm_backward": f"({BACKWARD_ARGS}) -> {BACKWARD_RETURNS}",
    # (B, heads, N, C) -> (B, N, C) in the precision of scores: float32, or float64 where `wide` or the key is float64.
    "average_heads": "(Tensor key, bool wide) -> Tensor",
    "bdm_unmerge": f"(Tensor tokens, Tensor match, {_PLACES}) -> Tensor",
    # The gradient of unmerge: every merged token sums the gradients of the positions it was given back to.
    "bdm_unmerge_backward": f"(Tensor grad, Tensor match, {_PLACES}) -> Tensor",
    # The same with derivatives (autograd.py), for those who record or transform calls.
    "merge": f"({FORWARD_ARGS}, str backend) -> {FORWARD_RETURNS}",
    "merge_backward": f"({BACKWARD_ARGS}, str backend) -> {BACKWARD_RETURNS}",
    "unmerge": f"(Tensor tokens, Tensor match, {_PLACES}) -> Tensor",
    "unmerge_backward": f"(Tensor grad, Tensor match, {_PLACES}) -> Tensor",
}

LIBRARY = Library("fpet", "FRAGMENT")
# A second import, after a purge of sys.modules, finds what the first one registered: PyTorch keeps it, and it still works.
registered: bool = hasattr(torch.ops.fpet, "merge") and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fpet::merge", "Autograd"
)
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.fpet, _name):
        LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _counts(split_a: Tensor | None, split_b: Tensor | None, grid_h: Any, grid_w: Any) -> tuple[int, int]:
    """(N_A, N_B)."""
    if split_a is not None and split_b is not None:
        return split_a.shape[0], split_b.shape[0]
    return (grid_h * grid_w + 1) // 2, grid_h * grid_w // 2


def _split(split_a: Tensor | None, split_b: Tensor | None, grid_h: Any, grid_w: Any) -> Split | tuple[int, int]:
    if split_a is not None and split_b is not None:
        return Split(split_a.numel() + split_b.numel(), split_a, split_b)
    return grid_h, grid_w


# --- shapes --------------------------------------------------------------------------------------------------------


def forward_outputs(*args: Any) -> Results:
    """Empty outputs of ``bdm_forward``: its fake function, and what Python launchers fill."""
    i, p = Inputs(*args[:7]), Problem(*args[7:14])
    num_a, num_b = _counts(*p[:4])
    batch, merged = i.x.shape[0], p.num_prefix_tokens + num_b
    size_dtype = torch.float64 if i.x.dtype == torch.float64 else torch.float32
    return Results(
        tokens=i.x.new_empty(batch, merged, i.x.shape[2]),
        merged_size=i.x.new_empty(batch, merged, 1, dtype=size_dtype),
        match=i.x.new_empty(batch, num_a, dtype=torch.int64),
        second=i.x.new_empty(batch, num_a, dtype=torch.int64),
        mid=i.x.new_empty(batch, num_a, dtype=_score_dtype(i)),
    )


def _score_dtype(i: Inputs) -> torch.dtype:
    return reference.compute_dtype(i.x, i.key, i.size, i.w_down, i.w_up, i.key_delta)


def backward_outputs(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of ``bdm_backward``; (0,) where a gradient is not asked for."""
    _, _, i, _, _, needs = BackwardArguments.of(*args[:26])
    x, key = i.x, i.key
    of_key = (x.shape[0], x.shape[1], key.shape[-1])

    def empty(needed: bool, shape: tuple, like: Tensor | None, otherwise: Tensor) -> Tensor:
        return x.new_empty(shape if needed else (0,), dtype=(otherwise if like is None else like).dtype)

    return (
        empty(needs.need_x, tuple(x.shape), x, x),
        empty(needs.need_size, (x.shape[0], x.shape[1], 1), i.size, x),
        empty(needs.need_weights, () if i.w_down is None else tuple(i.w_down.shape), i.w_down, x),
        empty(needs.need_weights, () if i.w_up is None else tuple(i.w_up.shape), i.w_up, x),
        empty(needs.need_refined, of_key, i.key_delta, key),
        empty(needs.need_key, of_key, key, key),
    )


def _fake_average_heads(key: Tensor, wide: bool) -> Tensor:
    dtype = torch.float64 if wide else reference.compute_dtype(key)
    return key.new_empty(key.shape[0], key.shape[2], key.shape[3], dtype=dtype)


def unmerge_output(tokens: Tensor, match: Tensor, *places: Any) -> Tensor:
    return tokens.new_empty(tokens.shape[0], places[4] + sum(_counts(*places[:4])), tokens.shape[2])


def unmerge_backward_output(grad: Tensor, match: Tensor, *places: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], places[4] + _counts(*places[:4])[1], grad.shape[2])


# --- composite implementations: any device, no binary ----------------------------------------------------------------


def _reference(i: Inputs, p: Problem, **options: Any) -> tuple[Tensor, ...]:
    return reference.bdm_merge_reference(
        **i._asdict(), split=_split(*p[:4]), num_prefix_tokens=p.num_prefix_tokens, scale=p.scale,
        similarity="cosine" if p.cosine else "dot", **options,
    )  # fmt: skip


def _forward(*args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        outputs = _reference(Inputs(*args[:7]), Problem(*args[7:]))
    return tuple(t.contiguous() for t in outputs)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    arguments = BackwardArguments.of(*args)
    needs = arguments.needs
    found = (
        _spread(arguments) if not (needs.need_weights or needs.need_refined or needs.need_key) else _differentiate(arguments)
    )
    return tuple(
        empty if grad is None else grad.to(empty.dtype).contiguous()
        for grad, empty in zip(found, backward_outputs(*args), strict=True)
    )


def _spread(arguments: BackwardArguments) -> tuple[Tensor | None, ...]:
    """Without a gradient on the key path: every position gets the gradient of its merged token (docs/mathematics.md)."""
    grad_tokens, grad_size, i, results, p, needs = arguments
    dtype = reference.compute_dtype(i.x, i.size)
    places = (results.match, *p[:5])
    grad = grad_tokens.to(dtype) / results.merged_size
    spread = _unmerge(grad, *places)
    grad_x = spread if i.size is None else spread * i.size.to(dtype)
    grad_in_size = None
    if needs.need_size:
        of_size = -(grad * results.tokens.to(dtype)).sum(-1, keepdim=True) + (0 if grad_size is None else grad_size)
        grad_in_size = _unmerge(of_size, *places) + (spread * i.x.to(dtype)).sum(-1, keepdim=True)
    return (grad_x if needs.need_x else None, grad_in_size, None, None, None, None)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd switched on, where an operator below it is called."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _differentiate(arguments: BackwardArguments) -> tuple[Tensor | None, ...]:
    """The reference's own gradients."""
    grad_tokens, grad_size, i, _, p, needs = arguments
    dtype = _score_dtype(i)
    heads = i.key.shape[1] if i.key.dim() == 4 else 1
    x, key = i.x.detach(), reference.average_heads(i.key, dtype).detach()
    # The refined key's own gradient is read off an added zero, whether there is a key_delta or not.
    delta = torch.zeros_like(key) if i.key_delta is None else i.key_delta.to(dtype, copy=True).detach()
    size = x.new_ones(*x.shape[:2], 1, dtype=dtype) if i.size is None else i.size.detach()
    down, up = (None if w is None else w.detach() for w in (i.w_down, i.w_up))
    sources = (x, size, down, up, delta, key)
    asked = (needs.need_x, needs.need_size, needs.need_weights, needs.need_weights, needs.need_refined, needs.need_key)
    wanted = [ask and t is not None for ask, t in zip(asked, sources, strict=True)]
    with _autograd():
        leaves = [t.requires_grad_() for t, want in zip(sources, wanted, strict=True) if want and t is not None]
        inputs = Inputs(x, key, size, down, up, i.dropout_mask, delta)
        out, out_size, *_ = _reference(inputs, p, detach_key=not needs.need_key)
        pairs = [(out, grad_tokens), (out_size, grad_size)]
        pairs = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
        grads = iter(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True))
    *found, grad_key = (next(grads) if want else None for want in wanted)
    return (*found, grad_key if grad_key is None else grad_key / heads)


def _average_heads(key: Tensor, wide: bool) -> Tensor:
    return reference.average_heads(key, torch.float64 if wide else reference.compute_dtype(key)).contiguous()


def _unmerge(tokens: Tensor, match: Tensor, *places: Any) -> Tensor:
    return reference.bdm_unmerge_reference(tokens, match, split=_split(*places[:4]), num_prefix_tokens=places[4])


def _unmerge_backward(grad: Tensor, match: Tensor, *places: Any) -> Tensor:
    a, b = reference.positions(_split(*places[:4]), grad.device)
    prefix = torch.arange(places[4], device=grad.device)
    image = torch.arange(grad.shape[0], device=grad.device)[:, None]
    out = grad[:, torch.cat((prefix, b + places[4]))]
    return out.index_put_((image, match), grad[:, a + places[4]], accumulate=True)


# --- FLOPs: multiply and add count as two, as everywhere in torch.utils.flop_counter ---------------------------------


def _problem_flops(i: Any, p: Any) -> tuple[int, int]:
    """(FLOPs of one N_A × N_B product per channel, FLOPs of one N × C × h product); with shapes in place of tensors."""
    if p.split_a is not None and p.split_b is not None:
        num_a, num_b = p.split_a[0], p.split_b[0]
    else:
        num_a, num_b = (p.grid_h * p.grid_w + 1) // 2, p.grid_h * p.grid_w // 2
    hidden = 0 if i.w_down is None else i.w_down[0]
    batch = i.x[0]
    return 2 * batch * num_a * num_b, 2 * batch * (num_a + num_b) * i.key[-1] * hidden


def forward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores, and both layers of the refinement."""
    i: Any = Inputs(*args[:7])
    pair, linear = _problem_flops(i, Problem(*args[7:14]))
    return pair * i.key[-1] + 2 * linear


def backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Without a gradient on the key path the backward is a gather; with one, scores again, dM, dk̂ twice, and the refinement."""
    i: Any
    _, _, i, _, p, needs = BackwardArguments.of(*args[:26])
    if not (needs.need_weights or needs.need_refined or needs.need_key):
        return 0
    pair, linear = _problem_flops(i, p)
    through_refinement = (2 + (3 if needs.need_weights else 0) + (1 if needs.need_key else 0)) * linear
    return pair * (i.x[-1] + 3 * i.key[-1]) + through_refinement


class _FlopFormulas(importlib.abc.MetaPathFinder):
    """Adds the formulas whenever torch.utils.flop_counter is executed: it imports Triton, which this package must not."""

    module = "torch.utils.flop_counter"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.module else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.add_to(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    @staticmethod
    def add_to(flop_counter: ModuleType) -> None:
        for forward in (torch.ops.fpet.bdm_forward, torch.ops.fpet.merge):
            flop_counter.register_flop_formula(forward)(forward_flops)
        for backward in (torch.ops.fpet.bdm_backward, torch.ops.fpet.merge_backward):
            flop_counter.register_flop_formula(backward)(backward_flops)


if not registered:
    for _name, _composite, _fake in (
        ("bdm_forward", _forward, forward_outputs),
        ("bdm_backward", _backward, backward_outputs),
        ("average_heads", _average_heads, _fake_average_heads),
        ("bdm_unmerge", _unmerge, unmerge_output),
        ("bdm_unmerge_backward", _unmerge_backward, unmerge_backward_output),
    ):
        LIBRARY.impl(_name, _composite, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fpet::{_name}", _fake, lib=LIBRARY)
    if _FlopFormulas.module in sys.modules:
        _FlopFormulas.add_to(sys.modules[_FlopFormulas.module])
    sys.meta_path.insert(0, _FlopFormulas())
