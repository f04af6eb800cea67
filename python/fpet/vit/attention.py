"""timm's attention modules with three more things: token sizes, the key that merging needs, and LoRA on q and v.

Each class below takes over from the timm class it derives from on an existing module: same parameters, same names, same
result while nothing is merged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, DiffAttention, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from ..layers.swapping import ClassSwap, Foreign
from .merging import SizeBias

__all__ = ["TIMM_ATTENTIONS", "additive_mask", "attend"]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: attend) as a term to add to the scores; any other mask in ``dtype``."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _causal(n: int, like: Tensor) -> Tensor:
    return like.new_full((n, n), float("-inf")).triu(1)


def _score_bias(q: Tensor, attn_mask: Tensor | None, is_causal: bool, sizes: SizeBias) -> Tensor:
    """log(size) and the caller's mask as one term, broadcastable to (B, heads, N, N), in q's dtype."""
    bias = sizes.log_size[:, None, None, :]
    if attn_mask is not None:
        bias = bias + additive_mask(attn_mask, bias.dtype)
    if is_causal:
        bias = bias + _causal(q.shape[-2], bias)
    return bias.to(q.dtype)


def _with_size_column(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with extra head columns, so that scale · q̃ k̃ᵀ = scale · q kᵀ + log(size) and the flash kernel needs no mask.

    The column of q is c, the power of two next to 1/scale (exact in every dtype), and that of k is log(size) / (scale · c),
    in two parts: what rounding to k's dtype loses goes into a second column. Zeros fill up to a multiple of 8.
    """
    batch, _, n, channels = q.shape
    extra = 2 + (-(channels + 2)) % 8
    c = 2.0 ** round(-math.log2(scale))
    exact = log_size / (scale * c)
    high = exact.to(k.dtype)
    # Detached: as a function of log(size) the two columns together already have the right derivative in the first.
    low = (exact - high.to(exact.dtype)).detach().to(k.dtype)
    k_columns = F.pad(torch.stack((high, low), dim=-1), (0, extra - 2))[:, None]  # (B, 1, M, extra), M keys
    q_columns = F.pad(q.new_full((1, 1, 1, 2), c), (0, extra - 2))
    return (
        torch.cat((q, q_columns.expand(batch, q.shape[1], n, extra)), dim=-1),
        torch.cat((k, k_columns.expand(batch, k.shape[1], k.shape[2], extra)), dim=-1),
        F.pad(v, (0, extra)),  # the flash kernel wants one head width for all three
    )


def _takes_column(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, sizes: SizeBias) -> bool:
    fits = attn_mask is None and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if sizes.form == "auto":
        # Elsewhere the fused kernel takes a mask, as long as no gradient flows to it. A trace is checked without gradients.
        learned = torch.is_grad_enabled() and sizes.log_size.requires_grad and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        return fits and (q.device.type == "cuda" or learned)
    return fits and sizes.form == "column"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    fused: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    sizes: SizeBias | None = None,
    dropout: nn.Dropout | None = None,
) -> Tensor:
    """Attention in which a token that stands for ``size`` tokens counts ``size`` times: softmax(scale · q kᵀ + log size) v.

    Args:
        q, k, v: (B, heads, N, C); v may have another width.
        scale: of the scores.
        fused: through F.scaled_dot_product_attention, as timm's ``fused_attn``; else as separate operations.
        attn_mask: broadcastable to (B, heads, N, N), boolean (True: attend) or added to the scores.
        is_causal: no token sees a later one.
        sizes: None for ordinary attention. Its ``form`` "mask" adds log(size) as an attention mask, which makes GPUs leave
            the flash kernel; "column" writes it into an extra head column, which doesn't (where ``attn_mask`` is None and
            the widths are equal; a mask elsewhere); "auto" takes the column on CUDA and wherever log(size) needs a gradient.
        dropout: on the attention weights.

    Returns:
        (B, heads, N, width of v).
    """
    if not fused:
        scores = (q * scale) @ k.transpose(-2, -1)
        if is_causal:
            scores = scores + _causal(q.shape[-2], scores)
        elif attn_mask is not None:
            scores = scores + additive_mask(attn_mask, scores.dtype)
        if sizes is not None:
            scores = scores + sizes.log_size[:, None, None, :].to(scores.dtype)
        weights = scores.softmax(dim=-1)
        return (weights if dropout is None else dropout(weights)) @ v
    dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
    if sizes is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
    if _takes_column(q, k, v, attn_mask, sizes):
        q, k, padded = _with_size_column(q, k, v, sizes.log_size, scale)
        out = F.scaled_dot_product_attention(q, k, padded, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        return out[..., : v.shape[-1]]
    bias = _score_bias(q, attn_mask, is_causal, sizes)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _heads(t: Tensor, heads: int) -> Tensor:
    """(B, heads, N, C) view of (B, N, heads · C)."""
    return t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)


class _SizedAttention(Foreign):
    """What the classes below share. Keyword arguments on top of timm's, the same everywhere:

    - sizes: :class:`SizeBias` or None.
    - kept: (N,) positions that x's tokens had in the full sequence, for tables of relative positions; None: all of them.
    - with_key: return ``(out, key)``, the key as merging wants it: (B, heads, N, C), after its norm, before any rotation.

    Without these and without LoRA, timm's own forward runs.

    Slots: modules ``lora_q`` and ``lora_v``, applied to the input and added to q and v.
    """

    # Declared for the type checker; timm's constructors set them.
    num_heads: int
    scale: float
    fused_attn: bool
    proj: nn.Module
    proj_drop: nn.Module
    attn_drop: nn.Dropout

    def _is_timms(self) -> bool:
        return getattr(self, "lora_q", None) is None and getattr(self, "lora_v", None) is None

    def _fused_qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _with_lora(self, x: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lora_q, lora_v = getattr(self, "lora_q", None), getattr(self, "lora_v", None)
        if lora_q is not None:
            q = q + _heads(lora_q(x), q.shape[1])
        if lora_v is not None:
            v = v + _heads(lora_v(x), v.shape[1])
        return q, v

    def _qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (B, heads, N, C), normalised where the module does that."""
        batch, n, _ = x.shape
        if getattr(self, "qkv", None) is not None:
            qkv = self._fused_qkv(x).reshape(batch, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            kv_heads = getattr(self, "num_kv_heads", self.num_heads)
            q = _heads(self.q_proj(x), self.num_heads)
            k, v = _heads(self.k_proj(x), kv_heads), _heads(self.v_proj(x), kv_heads)
        q, v = self._with_lora(x, q, v)
        return self.q_norm(q), self.k_norm(k), v

    def _project(self, x: Tensor, out: Tensor) -> Tensor:
        """(B, N, D) from the heads' (B, heads, N, C): norm, gate and projection, each where the module has it."""
        out = out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, sizes: SizeBias | None
    ) -> Tensor:
        out = attend(
            q, k, v, scale=self.scale, fused=self.fused_attn, attn_mask=attn_mask, is_causal=is_causal, sizes=sizes,
            dropout=self.attn_drop,
        )  # fmt: skip
        return self._project(x, out)


class FPETAttention(_SizedAttention, Attention):
    """timm's ViT attention."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        sizes: SizeBias | None = None, with_key: bool = False,
    ) -> Any:  # fmt: skip
        if sizes is None and not with_key and self._is_timms():
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self._qkv_heads(x)
        out = self._attend(x, q, k, v, attn_mask, is_causal, sizes)
        return (out, k) if with_key else out


class _RotaryAttention(_SizedAttention):
    """``rope`` covers the tokens of x, no others."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        sizes: SizeBias | None = None, with_key: bool = False,
    ) -> Any:  # fmt: skip
        if sizes is None and not with_key and self._is_timms():
            return super().forward(x, rope, attn_mask, is_causal)
        q, k, v = self._qkv_heads(x)
        key = k
        if rope is not None:
            p, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
            q = torch.cat((q[:, :, :p], apply_rot_embed_cat(q[:, :, p:], rope, half=half)), dim=2).type_as(v)
            k = torch.cat((k[:, :, :p], apply_rot_embed_cat(k[:, :, p:], rope, half=half)), dim=2).type_as(v)
        if (groups := self.num_heads // k.shape[1]) > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = self._attend(x, q, k, v, attn_mask, is_causal, sizes)
        return (out, key) if with_key else out


class FPETAttentionRope(_RotaryAttention, AttentionRope):
    """timm's rotary attention: DINOv3, PE and others; grouped queries too."""


class _SeparateBias(_SizedAttention):
    """EVA's and BEiT's fused qkv keeps q's and v's bias apart from the weight; the key has none."""

    def _is_timms(self) -> bool:
        # timm looks into the linear layer, which somebody may have put another one in the place of.
        return super()._is_timms() and (self.qkv is None or type(self.qkv) is nn.Linear)

    def _fused_qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        # A layer that somebody put in the place of the linear one has to be called, not looked into.
        if self.qkv_bias_separate or type(self.qkv) is not nn.Linear:
            return self.qkv(x) + bias
        return F.linear(x, weight=self.qkv.weight, bias=bias)


class FPETEvaAttention(_SeparateBias, _RotaryAttention, EvaAttention):
    """timm's EVA and EVA02 attention."""


class FPETDiffAttention(_SizedAttention, DiffAttention):
    """timm's differential attention: 2 · heads queries and keys of half the width; each token's key is their mean."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        sizes: SizeBias | None = None, with_key: bool = False,
    ) -> Any:  # fmt: skip
        if sizes is None and not with_key and self._is_timms():
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q, k, v = _heads(q, 2 * self.num_heads), _heads(k, 2 * self.num_heads), _heads(v, self.num_heads)
        q, v = self._with_lora(x, q, v)
        q, k = self.q_norm(q), self.k_norm(k)
        first, second = (
            attend(
                q[:, i::2], k[:, i::2], v, scale=self.scale, fused=self.fused_attn, attn_mask=attn_mask, is_causal=is_causal,
                sizes=sizes, dropout=self.attn_drop,
            )
            for i in (0, 1)
        )  # fmt: skip
        out = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
        out = self._project(x, out)
        return (out, k) if with_key else out


def _biased(own: Tensor | None, shared: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """Sum of two relative position biases (…, N, N) over the full sequence, rows and columns of ``kept`` tokens."""
    bias = shared if own is None else own if shared is None else own + shared
    if bias is None or kept is None:
        return bias
    return bias.index_select(-2, kept).index_select(-1, kept)


class FPETBeitAttention(_SeparateBias, BeitAttention):
    """timm's BEiT attention, with its relative position bias."""

    def _qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._fused_qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, v = self._with_lora(x, q, v)
        return q, k, v

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, *,
        sizes: SizeBias | None = None, kept: Tensor | None = None, with_key: bool = False,
    ) -> Any:  # fmt: skip
        if sizes is None and kept is None and not with_key and self._is_timms():
            return super().forward(x, shared_rel_pos_bias)
        q, k, v = self._qkv_heads(x)
        own = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        out = self._attend(x, q, k, v, _biased(own, shared_rel_pos_bias, kept), False, sizes)
        return (out, k) if with_key else out


class FPETRelPosAttention(_SizedAttention, RelPosAttention):
    """timm's attention with relative position bias."""

    def forward(
        self, x: Tensor, shared_rel_pos: Tensor | None = None, *,
        sizes: SizeBias | None = None, kept: Tensor | None = None, with_key: bool = False,
    ) -> Any:  # fmt: skip
        if sizes is None and kept is None and not with_key and self._is_timms():
            return super().forward(x, shared_rel_pos)
        q, k, v = self._qkv_heads(x)
        # As in timm, a bias of the block's own replaces the shared one.
        own = None if self.rel_pos is None else self.rel_pos.get_bias()
        out = self._attend(x, q, k, v, _biased(own, shared_rel_pos if own is None else None, kept), False, sizes)
        return (out, k) if with_key else out


TIMM_ATTENTIONS = ClassSwap(
    FPETAttention, FPETAttentionRope, FPETEvaAttention, FPETDiffAttention, FPETBeitAttention, FPETRelPosAttention
)
"""timm's attentions and the classes that take over."""
