"""The layers of a block that methods act on, whatever the model calls them; a TypeError says which one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = [
    "additive_linear", "attention_of", "attentions_of", "called_qkv", "fc1_layers", "linear", "mlp_of", "outer_layers", "qkv",
    "scaled_layers",
]  # fmt: skip


def attention_of(block: nn.Module) -> Any:
    """The block's one attention module."""
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.Module):
        raise TypeError(f"model: expected blocks with an attention module `attn`, got {type(block).__name__}")
    return attention


def attentions_of(block: Any) -> list[Any]:
    """The attention module, or those of a block with several in parallel."""
    return [branch.attn for branch in block.attns] if hasattr(block, "attns") else [attention_of(block)]


def mlp_of(block: nn.Module) -> Any:
    """The block's MLP."""
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"model: expected blocks with a module `mlp`, got {type(block).__name__}")
    return mlp


def qkv(attention: Any) -> list[nn.Linear]:
    """[qkv], or [q_proj, k_proj, v_proj]."""
    fused = getattr(attention, "qkv", None)
    layers: list[Any] = [fused] if fused is not None else [getattr(attention, f"{n}_proj", None) for n in "qkv"]
    if any(not hasattr(layer, "out_features") for layer in layers):
        raise TypeError(f"model: expected attention with qkv, or q_proj, k_proj and v_proj, got {type(attention).__name__}")
    return layers


def called_qkv(attention: Any) -> list[nn.Linear]:
    """As :func:`qkv`, where they are called as modules; EVA adds q_bias and v_bias around the layer's weight instead."""
    if getattr(attention, "q_bias", None) is not None:
        raise TypeError(f"model: expected attention with its biases in qkv, got {type(attention).__name__} with q_bias")
    return qkv(attention)


def linear(layer: Any, where: str) -> nn.Linear:
    """The layer itself, which is an nn.Linear."""
    if isinstance(layer, nn.Linear):
        return layer
    kind = type(layer)
    if kind.__module__.startswith("peft."):
        raise TypeError(
            f"model: expected {where} to be an nn.Linear, got peft's {kind.__module__.split('.')[-2]}.{kind.__name__}, "
            "whose own adapter acts on the same input: merge that first, with model.merge_and_unload()"
        )
    raise TypeError(f"model: expected {where} to be an nn.Linear, got {kind.__module__}.{kind.__name__}")


def additive_linear(layer: Any, where: str) -> nn.Linear:
    """The nn.Linear to add an update to: the layer, or the one inside peft's LoRA, whose own update is added as well."""
    kind = type(layer)
    if f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.layer.Linear" and not any(layer.use_dora.values()):
        layer = layer.get_base_layer()
    return linear(layer, where)


def fc1_layers(mlp: Any) -> list[nn.Linear]:
    """The layers that read the MLP's input: fc1, or the two halves of a SwiGLU."""
    layers = [getattr(mlp, name) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]
    if not layers:
        raise TypeError(f"model: expected an MLP with fc1, got {type(mlp).__name__}")
    return layers


def outer_layers(model: Any) -> Iterator[nn.Module]:
    """Embedding and norms outside the blocks."""
    yield model.patch_embed.proj
    for layer in (getattr(model.patch_embed, "norm", None), model.norm, getattr(model, "fc_norm", None)):
        if layer is not None and not isinstance(layer, nn.Identity):
            yield layer


def scaled_layers(block: nn.Module) -> Iterator[nn.Module]:
    """The layers of a block that SSF scales and shifts."""
    attention, mlp = attention_of(block), mlp_of(block)
    yield from (linear(layer, "qkv") for layer in called_qkv(attention))
    yield linear(getattr(attention, "proj", None), "attn.proj")
    yield from (linear(layer, "mlp.fc1") for layer in fc1_layers(mlp))
    yield linear(getattr(mlp, "fc2", None), "mlp.fc2")
    for name in ("norm1", "norm2"):
        layer = getattr(block, name, None)
        if not isinstance(layer, nn.Module) or getattr(layer, "normalized_shape", None) is None:
            raise TypeError(f"model: expected {name} to be a layer norm, got {type(layer).__name__}")
        yield layer
