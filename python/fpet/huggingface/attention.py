"""The attentions of transformers' vision encoders with two more things: token sizes, and the key that merging needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip import modeling_blip
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip
from transformers.models.vit import modeling_vit

from ..layers.swapping import Foreign
from ..vit.attention import additive_mask, attend
from ..vit.merging import SizeBias


def weighed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sizes: SizeBias | None, how: str, dropout: nn.Dropout | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """softmax(scale · q kᵀ + mask + log size) v, (B, heads, N, C); and the weights, where ``how`` is "eager"."""
    if how == "sdpa":
        return attend(q, k, v, scale=scale, fused=True, attn_mask=mask, sizes=sizes, dropout=dropout), None
    scores = (q @ k.transpose(-2, -1)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores + additive_mask(mask, scores.dtype)
    if sizes is not None:
        scores = scores + sizes.log_size[:, None, None, :]
    weights = scores.softmax(dim=-1).to(q.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v, weights


def split_heads(t: Tensor, width: int) -> Tensor:
    """(B, heads, N, width) view of (B, N, heads · width)."""
    return t.unflatten(-1, (-1, width)).transpose(1, 2)


class _Sized(Foreign):
    """transformers' attention, which does its own work where nothing is asked for that it can't do.

    Keyword arguments on top: sizes, for proportional attention; with_key, to return the key too; attention, "eager" or
    "sdpa" in place of the model's setting; mask, as transformers makes it of an attention_mask, for where one of these is set.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, sizes: SizeBias | None = None, with_key: bool = False,
        attention: str | None = None, mask: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if sizes is None and not with_key and attention is None and mask is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        how = attention or self.config._attn_implementation
        q, k, v = self._qkv(hidden_states)
        out, weights = weighed_attention(
            q, k, v, scale=q.shape[-1] ** -0.5, sizes=sizes, how=how, dropout=self._dropout(), mask=mask
        )
        out = self._project(out.transpose(1, 2).flatten(2))
        return (out, weights, k) if with_key else (out, weights)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (B, heads, N, C)."""
        q, k, v = (split_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _project(self, x: Tensor) -> Tensor:
        return self.out_proj(x)

    def _dropout(self) -> nn.Dropout | None:
        return _dropout(self.dropout, self.training)


def _dropout(p: float, training: bool) -> nn.Dropout | None:
    return nn.Dropout(p) if training and p > 0 else None


class FPETBlipAttention(_Sized, modeling_blip.BlipAttention):
    """BLIP's attention over image patches; transformers has it in eager form only."""

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _project(self, x: Tensor) -> Tensor:
        return self.projection(x)

    def _dropout(self) -> nn.Dropout | None:
        return self.dropout


class FPETCLIPAttention(_Sized, modeling_clip.CLIPAttention):
    """CLIP's attention."""


class FPETSiglipAttention(_Sized, modeling_siglip.SiglipAttention):
    """SigLIP's attention."""


# transformers 5 has ViT's attention in one module; before, a projection followed one of another class.
_VIT_ATTENTION: Any = getattr(modeling_vit, "ViTSelfAttention", modeling_vit.ViTAttention)


class FPETViTAttention(_Sized, _VIT_ATTENTION):
    """ViT's attention."""

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if hasattr(self, "query"):
            q, k, v = (split_heads(layer(x), self.attention_head_size) for layer in (self.query, self.key, self.value))
            return q, k, v
        return super()._qkv(x)

    def _project(self, x: Tensor) -> Tensor:
        return self.o_proj(x) if hasattr(self, "o_proj") else x

    def _dropout(self) -> nn.Dropout | None:
        return _dropout(self.dropout_prob if hasattr(self, "dropout_prob") else self.attention_dropout, self.training)
