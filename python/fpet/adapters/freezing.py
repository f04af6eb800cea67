"""Which parameters are trained, and how many there are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..layers.modules import PETModule
from ..layers.quantize import QuantizedLinear, packed_size
from .attaching import REDUCTION_SLOTS, SLOTS, transformers_in
from .config import METHODS

__all__ = ["ParameterCount", "count_parameters", "freeze", "head_modules", "parameter_roles"]


class ParameterCount(NamedTuple):
    """What :func:`count_parameters` returns: numbers of parameters; ``adapter_bytes`` in bytes.

    Attributes:
        total: all of them. trainable: those with requires_grad. adapters: the tuning method's own (the biases with bitfit,
            the whole backbone with full), and peft's. refinement: of the keys that merging goes by, or what else a reduction
            of tokens learns. head: the classifier.
        adapter_bytes: what adapters and refinement take in a file: quantised weights packed, others in their dtype.
    """

    total: int
    trainable: int
    adapters: int
    refinement: int
    head: int
    adapter_bytes: int


def parameter_roles(model: nn.Module, method: str | None = None) -> dict[str, str]:
    """What each parameter is for, by name.

    "backbone": of the pre-trained transformer. "adapter": of the tuning method, or of a module that somebody put into one of
    a block's slots. "refinement": of the reduction of tokens. "head": of timm's classifier, or of a transformers model's.
    "peft": of the peft library, which decides itself what is trained. "outside": of a wrapper around the transformer.

    Args:
        method: as if that method's adapters were in the model; None takes the model's own, without any: "none".
    """
    inners = list(_transformers(model)) or [model]
    if method is None:
        config = next((c for m in inners if (c := getattr(m, "adapter_config", None)) is not None), None)
        method = "none" if config is None else config.method
    trains = METHODS[method].trains if method in METHODS else None
    inside = {id(p): name for inner in inners for name, p in inner.named_parameters()}
    head = {id(p) for module in head_modules(model) for p in module.parameters()}
    peft = set(_peft_parameters(model))
    refinement: set[int] = set()
    adapter: set[int] = set()
    for path, module in model.named_modules():
        slot = path.rpartition(".")[2]
        if slot in REDUCTION_SLOTS:
            refinement.update(id(p) for p in module.parameters())
        elif isinstance(module, PETModule) or slot in SLOTS:
            adapter.update(id(p) for p in module.parameters())

    def role(key: int) -> str:
        if key in peft:
            return "peft"
        if key in head:
            return "head"
        if key in refinement:
            return "refinement"
        if key not in inside:
            return "outside"
        return "adapter" if key in adapter or (trains is not None and trains(inside[key])) else "backbone"

    return {name: role(id(p)) for name, p in model.named_parameters()}


def head_modules(model: Any) -> list[nn.Module]:
    """The classifiers in ``model``: of a timm model one, two with distillation, or none; of a transformers model its own."""
    found: list[Any] = []
    for inner in _transformers(model) or [model]:
        if hasattr(inner, "get_classifier"):
            classifier: Any = inner.get_classifier()  # type: ignore[operator]
            found += classifier if isinstance(classifier, (tuple, list)) else [classifier]
        elif _is_transformers(inner):
            found += [m for name, m in inner.named_children() if name == "classifier" or name.endswith("_classifier")]
    return [m for m in found if isinstance(m, nn.Module)]


def _transformers(model: nn.Module) -> list[nn.Module]:
    """The pre-trained transformers in ``model``: timm's, or where there are none those of the library transformers."""
    return list(transformers_in(model)) or list(_pretrained_models(model))


def _pretrained_models(module: nn.Module) -> Iterator[nn.Module]:
    if _is_transformers(module):
        yield module
    else:
        for child in module.children():
            yield from _pretrained_models(child)


def _is_transformers(module: nn.Module) -> bool:
    library = sys.modules.get("transformers")  # not imported: nothing is one of its models
    return library is not None and isinstance(module, library.PreTrainedModel)


def _peft_parameters(model: nn.Module) -> Iterator[int]:
    """Those that peft added or took charge of: what its layers hold besides the layer they wrap."""
    for module in model.modules() if "peft" in sys.modules else ():
        if not type(module).__module__.startswith("peft."):
            continue
        base = module._modules.get("base_layer")
        if base is not None:
            below = {id(p) for p in base.parameters()}
            yield from (id(p) for p in module.parameters() if id(p) not in below)
        elif "original_module" in module._modules:  # a module of modules_to_save
            yield from (id(p) for p in module.parameters())


def freeze(model: nn.Module) -> nn.Module:
    """Leaves only the tuning method's parameters, the refinement and the head trainable, in place. Returns model.

    Without :func:`fpet.add_adapters` or with its methods "linear" and "none" that is head and refinement; with "bitfit" the
    biases too; with "full" everything. Call it after :func:`fpet.apply` and ``reset_classifier``. What the peft library put
    into the model, and what a wrapper has besides the transformer, stays as it is.
    """
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] not in ("peft", "outside"):
            parameter.requires_grad_(roles[name] != "backbone")
    return model


def count_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters there are, of which kind, and what the tuned ones take to store."""
    roles = parameter_roles(model)
    packed = {id(m.weight): m.bits for m in model.modules() if isinstance(m, QuantizedLinear)}
    numbers = dict.fromkeys(("head", "refinement", "adapter", "backbone", "peft", "outside"), 0)
    trainable = stored = 0
    for name, p in model.named_parameters():
        numbers[roles[name]] += p.numel()
        trainable += p.numel() if p.requires_grad else 0
        if roles[name] in ("adapter", "refinement", "peft"):
            bits = packed.get(id(p))
            stored += p.numel() * p.element_size() if bits is None else packed_size(p.numel(), bits)
    adapters = numbers["adapter"] + numbers["peft"]
    return ParameterCount(sum(numbers.values()), trainable, adapters, numbers["refinement"], numbers["head"], stored)
