"""Which parameters are trained, and how many there are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..layers.modules import PETModule
from ..layers.quantize import QuantizedLinear, packed_size

__all__ = ["ParameterCount", "count_parameters", "freeze", "head_modules", "parameter_roles"]


class ParameterCount(NamedTuple):
    """What :func:`count_parameters` returns: numbers of parameters; ``adapter_bytes`` in bytes.

    Attributes:
        total: all of them. trainable: those with requires_grad. adapters: the tuning method's own (the biases with bitfit,
            the whole backbone with full). refinement: of the keys that merging goes by, or LTMP's thresholds. head: the
            classifier.
        adapter_bytes: what adapters and refinement take in a file: quantised weights packed, others in their dtype.
    """

    total: int
    trainable: int
    adapters: int
    refinement: int
    head: int
    adapter_bytes: int


def parameter_roles(model: nn.Module, method: str | None = None) -> dict[str, str]:
    """What each parameter is for: "head", "refinement", "adapter" or "backbone", by name.

    Args:
        method: as if that method's adapters were in the model; None takes the model's own, without any: "none".
    """
    if method is None:
        config = getattr(model, "adapter_config", None)
        method = "none" if config is None else config.method
    head = {id(p) for module in head_modules(model) for p in module.parameters()}
    refinement: set[int] = set()
    adapter: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, PETModule):
            reduces = path.rpartition(".")[2] in ("refinement", "thresholds")
            (refinement if reduces else adapter).update(id(p) for p in module.parameters())

    def role(name: str, key: int) -> str:
        if key in head:
            return "head"
        if key in refinement:
            return "refinement"
        if key in adapter or method == "full" or (method == "bitfit" and name.rpartition(".")[2].endswith("bias")):
            return "adapter"
        return "backbone"

    return {name: role(name, id(p)) for name, p in model.named_parameters()}


def head_modules(model: Any) -> list[nn.Module]:
    """timm's classifier: one module, two with distillation, or none."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    found = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [m for m in found if isinstance(m, nn.Module)]


def freeze(model: nn.Module) -> nn.Module:
    """Leaves only the tuning method's parameters, the refinement and the head trainable, in place. Returns model.

    Without :func:`fpet.add_adapters` or with its methods "linear" and "none" that is head and refinement; with "bitfit" the
    biases too; with "full" everything. Call it after :func:`fpet.apply` and ``reset_classifier``.
    """
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(roles[name] != "backbone")
    return model


def count_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters there are, of which kind, and what the tuned ones take to store."""
    roles = parameter_roles(model)
    packed = {id(m.weight): m.bits for m in model.modules() if isinstance(m, QuantizedLinear)}
    numbers = dict.fromkeys(("head", "refinement", "adapter", "backbone"), 0)
    trainable = stored = 0
    for name, p in model.named_parameters():
        numbers[roles[name]] += p.numel()
        trainable += p.numel() if p.requires_grad else 0
        if roles[name] in ("adapter", "refinement"):
            bits = packed.get(id(p))
            stored += p.numel() * p.element_size() if bits is None else packed_size(p.numel(), bits)
    return ParameterCount(
        sum(numbers.values()), trainable, numbers["adapter"], numbers["refinement"], numbers["head"], stored
    )  # fmt: skip
