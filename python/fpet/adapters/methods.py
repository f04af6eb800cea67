"""The methods of the package, each a function that puts its modules into a model. Of several names the lowest comes first."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..layers.modules import BottleneckAdapter, FacT, FacTFactors, Prompts, RepAdapter, ScaleShift
from ..vit.block import convert
from .attaching import attach
from .config import AdapterConfig, register_method
from .folding import fold_fact, fold_lora, fold_repadapter, fold_ssf
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


@register_method("bitfit", trains=lambda name: name.rpartition(".")[2].endswith("bias"))
@register_method("full", trains=lambda name: True)
@register_method("linear")
@register_method("none")
def add_nothing(model: Any, config: AdapterConfig) -> None:
    """These differ in what :func:`fpet.freeze` leaves trainable."""


@register_method("bi-adaptformer", hidden_dim=32, scale=1.0, bits=1, dropout=0.1)
@register_method("adaptformer", hidden_dim=8, scale=1.0, bits=32, dropout=0.1)
def add_adaptformer(model: Any, config: AdapterConfig) -> None:
    """Chen et al., NeurIPS 2022; Jie et al., ICCV 2023 for the binary form."""
    width = model.embed_dim
    for block in model.blocks:
        convert(block)
        adapter = BottleneckAdapter(
            width, width, config.hidden_dim, activation="relu", bits=config.bits, dropout=config.dropout, scale=config.scale
        )
        attach(block, "adapter_mlp", adapter)


@register_method("bi-lora", hidden_dim=32, scale=1.0, bits=1, dropout=0.1, fold=fold_lora)
@register_method("lora", hidden_dim=8, scale=1.0, bits=32, dropout=0.1, fold=fold_lora)
def add_lora(model: Any, config: AdapterConfig) -> None:
    """Hu et al., ICLR 2022; Jie et al., ICCV 2023 for the binary form."""
    for block in model.blocks:
        convert(block)
    for attention in (a for block in model.blocks for a in attentions_of(block)):
        layers = qkv(attention)
        widths = [layers[0].out_features // 3] * 2 if len(layers) == 1 else [layers[0].out_features, layers[2].out_features]
        for name, width in zip(("lora_q", "lora_v"), widths, strict=True):
            adapter = BottleneckAdapter(
                layers[0].in_features, width, config.hidden_dim, activation="identity", bits=config.bits,
                dropout=config.dropout, scale=config.scale,
            )  # fmt: skip
            attach(attention, name, adapter)


@register_method("repadapter", hidden_dim=8, scale=1.0, dropout=0.1, fold=fold_repadapter)
def add_repadapter(model: Any, config: AdapterConfig) -> None:
    """Luo et al., 2023."""
    for block in model.blocks:
        attention, mlp = attention_of(block), mlp_of(block)
        readers = [linear(layer, "qkv") for layer in called_qkv(attention)], [linear(x, "mlp.fc1") for x in fc1_layers(mlp)]
        for parent, layers in zip((attention, mlp), readers, strict=True):
            adapter = RepAdapter(layers[0].in_features, config.hidden_dim, dropout=config.dropout, scale=config.scale)
            attach(parent, "rep_adapter", adapter, acts="input")


@register_method("ssf", fold=fold_ssf)
def add_ssf(model: Any, config: AdapterConfig) -> None:
    """Lian et al., NeurIPS 2022."""
    layers: list[Any] = [*outer_layers(model), *(layer for block in model.blocks for layer in scaled_layers(block))]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            ssf = ScaleShift(layer.out_channels, channel_dim=1)
        else:
            ssf = ScaleShift(layer.out_features if isinstance(layer, nn.Linear) else layer.normalized_shape[-1])
        attach(layer, "ssf", ssf, acts="output", like=model.blocks)


@register_method("vpt-deep", hidden_dim=50, dropout=0.1)
@register_method("vpt-shallow", hidden_dim=50, dropout=0.1)
def add_prompts(model: Any, config: AdapterConfig) -> None:
    """Jia et al., ECCV 2022."""
    if not hasattr(model, "norm_pre") or not hasattr(model, "num_prefix_tokens"):
        raise TypeError(f"model: expected norm_pre and num_prefix_tokens, behind which prompts go, got {type(model).__name__}")
    if getattr(model, "dynamic_img_size", False):
        raise TypeError(
            "model: prompts need a fixed image size: timm takes them for position-embedded tokens, got dynamic_img_size"
        )
    position, width = model.num_prefix_tokens, model.embed_dim
    bound = math.sqrt(6.0 / (3 * math.prod(model.patch_embed.patch_size) + width))
    options: dict[str, Any] = {"bound": bound, "dropout": config.dropout}
    prompts = Prompts(config.hidden_dim, width, position, insert=True, **options)
    attach(model.norm_pre, "prompts", prompts, acts="output", model=model, like=model.blocks)
    for block in model.blocks[1:] if config.method == "vpt-deep" else ():
        attach(block, "prompts", Prompts(config.hidden_dim, width, position, insert=False, **options), acts="input")


@register_method("fact-tt", hidden_dim=16, scale=1.0, dropout=0.1, fold=fold_fact)
def add_fact(model: Any, config: AdapterConfig) -> None:
    """Jie and Deng, AAAI 2023."""
    width = model.embed_dim
    factors = FacTFactors(width, config.hidden_dim)
    attach(model, "fact_factors", factors, like=model.blocks)
    for block in model.blocks:
        attention, mlp = attention_of(block), mlp_of(block)
        proj, fc2 = getattr(attention, "proj", None), getattr(mlp, "fc2", None)
        layers: list[Any] = [*called_qkv(attention), proj, *fc1_layers(mlp), fc2]
        for layer in layers:
            additive_linear(layer, "qkv, proj, fc1 and fc2")
            if layer.in_features % width or layer.out_features % width:
                expected = f"expected layers whose widths are multiples of {width}"
                raise TypeError(f"model: {expected}, got {layer.in_features} → {layer.out_features}")
            fact = FacT(
                factors, layer.in_features // width, layer.out_features // width, dropout=config.dropout, scale=config.scale
            )
            attach(layer, "fact", fact, acts="beside")
