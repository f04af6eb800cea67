"""How a method's modules come into a model and out again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..layers.modules import PETModule
from ..vit import block as fpet_block
from ..vit.foreign import refuse_wrapped
from .config import METHODS, AdapterConfig

__all__ = ["ACTS", "add_adapters", "attach", "remove_adapters", "transformer", "transformer_blocks", "transformers_in"]

REDUCTION_SLOTS = ("refinement", "thresholds", "reducer")
"""Names in a block of what the reduction of tokens trains; adapters have others."""
SLOTS = (*REDUCTION_SLOTS, "adapter_mlp", "lora_q", "lora_v")
"""Submodules that a block or its attention calls where it has them."""


def add_adapters(
    model: nn.Module,
    method: str,
    *,
    hidden_dim: int | None = None,
    scale: float | None = None,
    bits: int | None = None,
    dropout: float | None = None,
) -> nn.Module:
    """Puts a parameter-efficient tuning method's modules into a timm vision transformer, in place.

    The backbone's parameters keep their names and values. :func:`fpet.freeze` then leaves only the method's parameters
    and the head trainable. Works before and after :func:`fpet.apply`.

    ===================  ==========  ====  ======================================================================
    method               hidden_dim  bits  what it adds or trains
    ===================  ==========  ====  ======================================================================
    adaptformer          8           32    s · up(dropout(ReLU(down x))) beside the MLP, x un-normed, after merging
    bi-adaptformer       32          1     the same with quantised weights
    lora, bi-lora        8, 32       32,1  s · up(dropout(down x)) on q and on v
    repadapter           8           –     x + s · B(dropout(A x)) on the input of attention and of MLP
    ssf                  –           –     scale and shift after embedding, norms and linear layers
    vpt-shallow, -deep   50          –     prompts as prefix tokens, once or anew for each layer
    fact-tt              16          –     s · V Σ Uᵀ on every matrix, U and V shared by all
    bitfit, linear,      –           –     biases; only the head; everything; only the refinement of the keys (and
    full, none                             the head)
    ===================  ==========  ====  ======================================================================

    Args:
        model: with ``blocks``, or a wrapper of one. Adapters take its first block's device and floating dtype.
        method: see above, or one of :func:`fpet.register_method`. hidden_dim: bottleneck width, rank, or number of prompts.
        scale: s, 1 by default. bits: 1, 2, 4, 8 or 32, for adaptformer, lora and their bi- forms. dropout: 0.1 by default
            where there is one.

    Returns:
        model.

    Raises:
        ValueError: an argument out of range or not of this method, or the model has adapters already.
        TypeError: the model has no place for the method; it is left as it was.
    """
    config = AdapterConfig.resolve(method, hidden_dim, scale, bits, dropout)
    inner = transformer(model)
    refuse_wrapped(model, "fpet.add_adapters")
    present = getattr(inner, "adapter_config", None)
    if present is not None:
        raise ValueError(f"model: has {present.method!r} adapters already: fpet.remove_adapters(model) first")
    inner.adapter_config = config
    try:
        METHODS[method].install(inner, config)
    except Exception:
        remove_adapters(model)
        raise
    return model


def remove_adapters(model: nn.Module) -> nn.Module:
    """Takes out what :func:`add_adapters` put in, in place; merging and its refinement stay. Returns model."""
    inner = transformer(model)
    for parent in list(inner.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PETModule) and name not in REDUCTION_SLOTS:
                _detach(inner, parent, name)
    for block in transformer_blocks(inner):
        fpet_block.restore(block)
    if hasattr(inner, "adapter_config"):
        del inner.adapter_config
    return model


def transformer(model: nn.Module) -> Any:
    """The module in ``model`` that has the blocks: model itself, or the one inside a wrapper such as a compiled model.

    Raises:
        TypeError: there is none, or there are several.
    """
    found = list(transformers_in(model))
    if len(found) != 1:
        held = f" with {len(found)} of them" if found else ""
        raise TypeError(f"model: expected a timm vision transformer with blocks, got {type(model).__name__}{held}")
    return found[0]


def transformers_in(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have ``blocks``."""
    blocks = module._modules.get("blocks")
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks):
        yield module
    else:
        for child in module.children():
            yield from transformers_in(child)


def transformer_blocks(model: nn.Module) -> list[Any]:
    """The blocks of the transformer in ``model`` as a list; TypeError where there are none."""
    return list(transformer(model).blocks)


# --- one module --------------------------------------------------------------------------------------------------------


def attach(
    parent: nn.Module,
    name: str,
    child: PETModule,
    *,
    acts: str | None = None,
    model: nn.Module | None = None,
    like: nn.Module | None = None,
) -> None:
    """Makes ``child`` the submodule ``parent.name``, with the device, floating dtype and mode of its new surroundings.

    Args:
        acts: what it does, by a hook on parent. "input": its output takes the place of parent's first argument. "output": it
            is called with parent's output, and its own takes that place. "beside": it is called with parent's first argument,
            and what it returns is added to parent's output. None: nothing; parent's forward calls it, as blocks call
            ``adapter_mlp`` and attentions ``lora_q`` and ``lora_v``.
        model: has ``num_prefix_tokens``; only for a child that adds tokens (``PETModule.prefix_tokens``).
        like: a module whose first parameter has the device and the dtype; None: parent.
    """
    if acts is not None and acts not in ACTS:
        raise ValueError(f"acts: expected None or one of {', '.join(ACTS)}, got {acts!r}")
    weight = next((parent if like is None else like).parameters(), None)
    if weight is not None:
        child = child.to(weight.device, weight.dtype) if weight.is_floating_point() else child.to(weight.device)
    setattr(parent, name, child.train(parent.training))
    act(parent, name, child, acts, model)


def act(parent: nn.Module, name: str, child: PETModule, acts: str | None, model: nn.Module | None = None) -> None:
    """:func:`attach` for a module that is in its place already: hooks it up."""
    child.acts = acts
    if acts is not None:
        function, register = ACTS[acts]
        child.handle = getattr(parent, register)(partial(function, name))
    if child.prefix_tokens:
        if model is None:
            raise ValueError(f"model: expected the model whose prefix {name!r} makes longer, got None")
        _shift_prefix(model, child.prefix_tokens)
        model.set_input_size = _refuse_set_input_size  # type: ignore[assignment]


def _detach(model: nn.Module, parent: nn.Module, name: str) -> None:
    child: Any = getattr(parent, name)
    if child.handle is not None:
        child.handle.remove()
    if child.prefix_tokens:
        _shift_prefix(model, -child.prefix_tokens)
        del model.set_input_size
    delattr(parent, name)


# Hooks are partials of module-level functions, so that models pickle; each finds its module in its parent, so that a
# copy of the model calls the copy.


def _replace_input(name: str, parent: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(parent, name)(args[0]), *args[1:])


def _replace_output(name: str, parent: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return getattr(parent, name)(output)


def _add_to_output(name: str, parent: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + getattr(parent, name)(args[0])


ACTS: dict[str, tuple[Any, str]] = {
    "input": (_replace_input, "register_forward_pre_hook"),
    "output": (_replace_output, "register_forward_hook"),
    "beside": (_add_to_output, "register_forward_hook"),
}
"""Ways for a module to act on its parent: the hook, and the method of nn.Module that registers it."""


def _shift_prefix(model: Any, by: int) -> None:
    model.num_prefix_tokens += by
    for block in transformer_blocks(model):
        if hasattr(block.attn, "num_prefix_tokens"):  # rotary embeddings leave that many alone
            block.attn.num_prefix_tokens += by


def _refuse_set_input_size(*args: Any, **kwargs: Any) -> None:
    # timm would take the prompts for tokens with a position embedding and resample the wrong ones.
    raise RuntimeError("set_input_size: the model has prompts; call it before fpet.add_adapters")
