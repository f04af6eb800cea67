"""UniAdapter (Lu et al., ICLR 2024, arXiv 2302.06605) in BLIP: one bottleneck per layer for image, text and their crossing.

The adapter of layer i serves vision layer i and text layer i. They share its way down; each has a way up of its own, and the
crossing adds that of the text to its own::

    h = dropout(ReLU(down(norm(x))))
    vision: s · up_vision(h)      text: s · up_text(h)      cross: s · norm_cross(up_cross(h) + up_text(h))

In a vision layer it runs beside the MLP, on the un-normed tokens, after merging. In a text layer the attention's output x
gives ``layer(x) + text(x)``; with an image, the cross-attention's output c gives ``layer(c) + text(x) + cross(c)``: the
query keeps a path of its own. Two more adapters correct what cross-attention makes of the image tokens z in every text layer,
``key(z) + s_k · up_k(down_k(z))`` and the same of the value: the published code has them for retrieval as for video.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..huggingface import convert, restore, vision_layers  # first: it says what to install where transformers is missing
from ..layers.modules import PETModule
from ..layers.swapping import ClassSwap

# isort: split
from transformers.models.blip import modeling_blip, modeling_blip_text

__all__ = ["KeyValueAdapter", "UniAdapter", "add_uniadapters", "remove_uniadapters"]


class UniAdapter(PETModule):
    """What one vision layer and one text layer share.

    Initialised as the published training does it: ``down`` Kaiming-uniform, ``up_text`` zero, ``up_vision`` and ``up_cross``
    normal with standard deviation 0.02 (BERT's initialisation goes over them), every bias zero.

    Args:
        dim: D, of both encoders. hidden_dim: of the bottleneck. scale: s. dropout: probability on the hidden units.
    """

    def __init__(self, dim: int, hidden_dim: int = 512, *, scale: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim: expected at least 1, got {hidden_dim}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.hidden_dim, self.scale, self.dropout = hidden_dim, float(scale), float(dropout)
        self.norm, self.norm_cross = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.down = nn.Linear(dim, hidden_dim)
        self.up_vision, self.up_text, self.up_cross = (nn.Linear(hidden_dim, dim) for _ in range(3))
        for layer in (self.down, self.up_vision, self.up_text, self.up_cross):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up_text.weight)
        for layer in (self.up_vision, self.up_cross):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor, modality: str) -> Tensor:
        """(…, D) → (…, D), for ``modality`` "vision", "text" or "cross"."""
        hidden = F.dropout(F.relu(self.down(self.norm(x))), self.dropout, self.training)
        if modality == "vision":
            up = self.up_vision(hidden)
        elif modality == "text":
            up = self.up_text(hidden)
        elif modality == "cross":
            up = self.norm_cross(self.up_cross(hidden) + self.up_text(hidden))
        else:
            raise ValueError(f"modality: expected 'vision', 'text' or 'cross', got {modality!r}")
        return up * self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"


class KeyValueAdapter(PETModule):
    """What is added to the keys, or to the values, of cross-attention: s · up(down(z)), s learnt.

    Initialised as the published training does it: weights normal with standard deviation 0.02, biases zero, s one.

    Args:
        dim: of the image tokens. hidden_dim: of the bottleneck. out_dim: of the keys.
    """

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, out_dim)
        self.scale = nn.Parameter(torch.ones(()))
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        """(…, dim) → (…, out_dim)."""
        return self.scale * self.up(self.down(z))


class _AdaptedProjection(nn.Linear):
    """Cross-attention's key or value with what an adapter, held by reference, adds."""

    adapter: tuple[KeyValueAdapter]

    def forward(self, z: Tensor) -> Tensor:
        (adapter,) = self.adapter
        return super().forward(z) + adapter(z)


class _QueryKeeper(modeling_blip_text.BlipTextAttention):
    """Cross-attention that hands on its input beside its output, (B, L, 2D): the adapter needs both."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, *rest = super().forward(hidden_states, *args, **kwargs)
        return (torch.cat((out, hidden_states), dim=-1), *rest)


class _AdaptedTextLayer(modeling_blip_text.BlipTextLayer):
    """BLIP's text layer with a UniAdapter, held by reference, beside its feed-forward."""

    uniadapter: tuple[UniAdapter]

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        (adapter,) = self.uniadapter
        width = self.output.dense.out_features
        if attention_output.shape[-1] == width:  # no image
            return super().feed_forward_chunk(attention_output) + adapter(attention_output, "text")
        crossed, query = attention_output.split(width, dim=-1)
        return super().feed_forward_chunk(crossed) + adapter(query, "text") + adapter(crossed, "cross")


_SWAP = ClassSwap(_AdaptedProjection, _QueryKeeper, _AdaptedTextLayer)


def add_uniadapters(
    model: nn.Module, hidden_dim: int = 512, *, scale: float = 0.1, dropout: float = 0.0, key_value_dim: int = 64
) -> nn.Module:
    """Gives every layer of a BlipForImageTextRetrieval its UniAdapter: ``model.uniadapters``. Returns ``model``.

    It merges or doesn't as before; classes of its layers are swapped, on this model alone. :func:`fpet.freeze` leaves the
    adapters trainable.

    Args:
        hidden_dim, scale, dropout: see :class:`UniAdapter`. key_value_dim: of the bottlenecks of the two adapters of
            cross-attention, ``model.key_value_adapters``; 0: there are none.

    Raises:
        TypeError: another model. ValueError: its encoders differ in width or depth, so that nothing can be shared; or it has
            adapters. Nothing is changed then.
    """
    vision, text = _encoders(model)
    if getattr(model, "uniadapters", None) is not None:
        raise ValueError("model: it has UniAdapters; call remove_uniadapters first")
    if key_value_dim < 0:
        raise ValueError(f"key_value_dim: expected at least 0, got {key_value_dim}")
    images, texts = vision_layers(vision), list(text.encoder.layer)
    widths, depths = (vision.config.hidden_size, text.config.hidden_size), (len(images), len(texts))
    if widths[0] != widths[1] or depths[0] != depths[1]:
        raise ValueError(
            f"model: expected a vision and a text encoder of one width and depth, layers i of which share an adapter, got "
            f"widths {widths[0]} and {widths[1]}, depths {depths[0]} and {depths[1]}, for which UniAdapter defines nothing"
        )
    adapters = nn.ModuleList(
        _placed(UniAdapter(widths[0], hidden_dim, scale=scale, dropout=dropout), layer.output.dense).train(layer.training)
        for layer in texts
    )
    crossing = [layer.crossattention for layer in texts if hasattr(layer, "crossattention")]
    convert(vision)
    for image_layer, text_layer, adapter in zip(images, texts, adapters, strict=True):
        image_layer.adapter = (adapter, "vision")
        text_layer.uniadapter = (adapter,)
        _SWAP.swap(text_layer)
    for attention in crossing:
        _SWAP.swap(attention)
    model.uniadapters = adapters
    if key_value_dim and crossing:
        first = crossing[0].self.key
        model.key_value_adapters = nn.ModuleDict(
            {n: _placed(KeyValueAdapter(first.in_features, key_value_dim, first.out_features), first) for n in ("key", "value")}
        )
        for name, adapter in model.key_value_adapters.items():
            for projection in (getattr(attention.self, name) for attention in crossing):
                _SWAP.swap(projection)
                projection.adapter = (adapter,)
    return model


def _placed(adapter: Any, beside: nn.Linear) -> Any:
    like = beside.weight
    return adapter.to(like.device, like.dtype if like.dtype.is_floating_point else None)


def remove_uniadapters(model: nn.Module) -> nn.Module:
    """Undoes :func:`add_uniadapters`; a model that merges goes on merging. Returns ``model``."""
    vision, text = _encoders(model)
    if getattr(model, "uniadapters", None) is None:
        return model
    del model.uniadapters
    if hasattr(model, "key_value_adapters"):
        del model.key_value_adapters
    for image_layer, text_layer in zip(vision_layers(vision), text.encoder.layer, strict=True):
        del image_layer.adapter
        del text_layer.uniadapter
        _SWAP.restore(text_layer)
        if hasattr(text_layer, "crossattention"):
            _SWAP.restore(text_layer.crossattention)
            for projection in (text_layer.crossattention.self.key, text_layer.crossattention.self.value):
                _SWAP.restore(projection)
                projection.__dict__.pop("adapter", None)
    restore(vision)
    return model


def _encoders(model: Any) -> tuple[Any, Any]:
    if not isinstance(model, modeling_blip.BlipForImageTextRetrieval):
        raise TypeError(f"model: expected a BlipForImageTextRetrieval, got {type(model).__name__}")
    return model.vision_model, model.text_encoder
