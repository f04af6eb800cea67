"""Methods that are linear in their input, added to the backbone's weights: :func:`fold`, and what each adds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.modules import RepAdapter
from .attaching import remove_adapters, transformer, transformer_blocks
from .config import METHODS, Update
from .places import (
    additive_linear,
    attention_of,
    attentions_of,
    called_qkv,
    fc1_layers,
    linear,
    mlp_of,
    outer_layers,
    qkv,
    scaled_layers,
)

__all__ = ["fold", "folds"]


def folds(method: str) -> bool:
    """Whether :func:`fold` can take the method up."""
    return METHODS[method].fold is not None


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Folds LoRA (quantised too), RepAdapter, SSF or FacT-TT into the backbone's weights, in place: no cost at inference.

    What is computed in evaluation mode stays the same up to rounding; the sums are made in float64. Save before folding:
    the backbone is another one afterwards. In a model that peft has put LoRA into, LoRA and FacT-TT go into the layers
    inside peft's, which stay.

    Returns:
        model, without adapters.

    Raises:
        ValueError: no adapters, or the method is not linear. TypeError: a layer that can't take it up. The model is then
            as it was.
    """
    inner = transformer(model)
    config = getattr(inner, "adapter_config", None)
    folded_by = None if config is None else METHODS[config.method].fold
    if folded_by is None:
        got = "no adapters" if config is None else repr(config.method)
        known = ", ".join(name for name in METHODS if folds(name))
        raise ValueError(f"model: expected adapters of one of {known}, which are linear, got {got}")
    for layer, weight, bias in list(folded_by(inner)):
        reference = layer.weight if layer.weight is not None else next(inner.parameters())
        for name, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            old = getattr(layer, name)
            if old is not None:
                old.copy_(value)
            else:
                value = value.to(reference.device, reference.dtype)
                setattr(layer, name, nn.Parameter(value, requires_grad=reference.requires_grad))
    return remove_adapters(model)


def fold_lora(model: Any) -> Iterator[Update]:
    """W_q + s · up · down, and W_v likewise."""
    for attention in (a for block in transformer_blocks(model) for a in attentions_of(block)):
        layers = [additive_linear(layer, "qkv") for layer in qkv(attention)]
        q, v = (a.up_weight().double() @ a.down_weight().double() * a.scale for a in (attention.lora_q, attention.lora_v))
        if len(layers) == 1:
            weight = layers[0].weight.double()
            none = weight.new_zeros(weight.shape[0] - q.shape[0] - v.shape[0], weight.shape[1])
            yield layers[0], weight + torch.cat([q, none, v]), None
        else:
            yield layers[0], layers[0].weight.double() + q, None
            yield layers[2], layers[2].weight.double() + v, None


def fold_repadapter(model: Any) -> Iterator[Update]:
    """W (I + s · B A), and b + s · W (B b_A + b_B), of every layer that reads the adapted input."""
    for block in transformer_blocks(model):
        attention, mlp = attention_of(block), mlp_of(block)
        gate = getattr(attention, "gate", None)
        readers = [*called_qkv(attention), *([] if gate is None else [gate])]
        for parent, layers, where in ((attention, readers, "qkv"), (mlp, fc1_layers(mlp), "mlp.fc1")):
            for layer in layers:
                yield _folded_reader(linear(layer, where), parent.rep_adapter)


def _folded_reader(layer: nn.Linear, a: RepAdapter) -> Update:
    # W (x + s B (A x + b_A) + s b_B) + b = W (I + s B A) x + b + s W (B b_A + b_B)
    weight, up = layer.weight.double(), a.dense_up().double()
    bias = weight @ (up @ a.down.bias.double() + a.up_bias.double()) * a.scale
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    return layer, weight + (weight @ up) @ a.down.weight.double() * a.scale, bias


def fold_ssf(model: Any) -> Iterator[Update]:
    """diag(scale) · W, and scale · b + shift."""
    layers = [layer for block in transformer_blocks(model) for layer in scaled_layers(block)]
    for layer in (*layers, *outer_layers(model)):
        if hasattr(layer, "ssf"):
            yield _folded_scale_shift(layer)


def _folded_scale_shift(layer: Any) -> Update:
    if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
        raise TypeError(f"model: expected nn.Linear, nn.Conv2d or nn.LayerNorm to fold into, got {type(layer).__name__}")
    ssf: Any = layer.ssf
    scale, shift = ssf.scale.double(), ssf.shift.double()
    if layer.weight is None:
        return layer, scale, shift
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    bias: Tensor | None = layer.bias
    return layer, weight, shift if bias is None else bias.double() * scale + shift


def fold_fact(model: Any) -> Iterator[Update]:
    """W + s · V Σ Uᵀ."""
    for block in transformer_blocks(model):
        attention, mlp = attention_of(block), mlp_of(block)
        for layer in (*called_qkv(attention), attention.proj, *fc1_layers(mlp), mlp.fc2):
            base = additive_linear(layer, "a layer with FacT")
            yield base, base.weight.double() + layer.fact.delta().double(), None
