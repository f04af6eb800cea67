"""timm's transformer blocks with a place to merge tokens, between the attention residual and the MLP, and slots for modules.

``convert(block)`` swaps the class of a block and of its attention for one of those below; parameters, names and results stay
as they were. A block then honours these optional submodules, which others set:

- ``refinement``: a KeyRefinement; corrects the key that merging matches by.
- ``adapter_mlp``: called with the un-normed tokens after merging; its output joins the MLP's residual.
- ``attn.lora_q``, ``attn.lora_v``: called with the attention's input; their outputs are added to q and v.

In ParallelThings blocks every attention has the LoRA slots. In ParallelScaling blocks attention and MLP are one: merging
comes after the block, by the keys of its attention, ``adapter_mlp`` sees the block's input, and there is no LoRA slot.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from fpet_kernels import Merged

from ..layers.swapping import ClassSwap, Foreign
from .attention import TIMM_ATTENTIONS, attend
from .merging import MergeRecord, MergeStep, SizeBias

__all__ = ["TIMM_BLOCKS", "attention_modules", "convert", "is_converted", "key_channels", "restore", "why_not"]


class _MergingBlock(Foreign):
    """The order of things in a block. Keyword arguments on top of timm's, the same everywhere:

    - sizes, kept: for the attention, see :mod:`fpet.vit.attention`.
    - merge: a :class:`MergeStep`. The block then returns :class:`fpet_kernels.Merged` instead of its tokens alone;
    - record: but with a :class:`MergeRecord` the tokens, and leaves the rest there. So hooks see a tensor.

    Without these and without an adapter, timm's own forward runs.
    """

    fpet_layer: int | None = None  # the number of a block that merges, by which it knows that a call lacks ``merge``

    def _is_timms(self) -> bool:
        if self.fpet_layer is not None:
            raise RuntimeError(
                f"blocks.{self.fpet_layer}: it merges tokens, and was called outside of its model, which keeps account of "
                f"them. Call the model, its forward_intermediates or fpet.merged_features; or give the block a MergeStep "
                f"(fpet.vit.merging), which makes it return a Merged; or switch merging off: fpet.merged(model, None)"
            )
        return getattr(self, "adapter_mlp", None) is None

    def _attention_branch(self, x: Tensor, with_key: bool, **attention: Any) -> tuple[Tensor, Any]:
        """What attention adds to x (B, N, D); and the key, where ``with_key`` asks for it."""
        raise NotImplementedError

    def _mlp_branch(self, x: Tensor) -> Tensor:
        """What the MLP adds to x (B, N, D)."""
        raise NotImplementedError

    def _record(self, x: Tensor, merge: MergeStep | None, record: MergeRecord | None, **attention: Any) -> Any:
        # An argument that is not set is not passed: a forward that somebody replaced may not know it.
        out = self._run(x, merge, **{name: value for name, value in attention.items() if value is not None})
        if record is None or merge is None:
            return out
        record.merged = out
        return out.tokens

    def _run(self, x: Tensor, merge: MergeStep | None, **attention: Any) -> Any:
        branch, key = self._attention_branch(x, merge is not None, **attention)
        x = x + branch
        merged = None
        if merge is not None:
            merged = merge.merge(x, key, getattr(self, "refinement", None))
            x = merged.tokens
        adapter = getattr(self, "adapter_mlp", None)
        out = x + self._mlp_branch(x)
        if adapter is not None:
            out = out + adapter(x)
        return out if merged is None else Merged(out, merged.size, merged.match)


def _attended(attention: nn.Module, x: Tensor, with_key: bool, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    return attention(x, with_key=True, **arguments) if with_key else (attention(x, **arguments), None)


class _MaskedForward(_MergingBlock):
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        sizes: SizeBias | None = None, merge: MergeStep | None = None, record: MergeRecord | None = None,
    ) -> Any:  # fmt: skip
        if merge is None and sizes is None and self._is_timms():
            return super().forward(x, attn_mask, is_causal)
        return self._record(x, merge, record, attn_mask=attn_mask, is_causal=is_causal or None, sizes=sizes)


class _RopeForward(_MergingBlock):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        sizes: SizeBias | None = None, merge: MergeStep | None = None, record: MergeRecord | None = None,
    ) -> Any:  # fmt: skip
        if merge is None and sizes is None and self._is_timms():
            return super().forward(x, rope, attn_mask, is_causal)
        return self._record(x, merge, record, rope=rope, attn_mask=attn_mask, is_causal=is_causal or None, sizes=sizes)


class _RelPosForward(_MergingBlock):
    def forward(
        self, x: Tensor, shared_rel_pos: Tensor | None = None, *, sizes: SizeBias | None = None,
        kept: Tensor | None = None, merge: MergeStep | None = None, record: MergeRecord | None = None,
    ) -> Any:  # fmt: skip
        if merge is None and sizes is None and kept is None and self._is_timms():
            return super().forward(x, shared_rel_pos)
        return self._record(x, merge, record, shared_rel_pos=shared_rel_pos, sizes=sizes, kept=kept)


class _LayerScaleModules(_MergingBlock):
    """Pre-norm, LayerScale as modules ``ls1`` and ``ls2``."""

    def _attention_branch(self, x: Tensor, with_key: bool, **attention: Any) -> tuple[Tensor, Any]:
        out, key = _attended(self.attn, self.norm1(x), with_key, attention)
        return self.drop_path1(self.ls1(out)), key

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _LayerScaleParameters(_MergingBlock):
    """Pre-norm, LayerScale as parameters ``gamma_1`` and ``gamma_2``, either of which may be None."""

    def _attention_branch(self, x: Tensor, with_key: bool, **attention: Any) -> tuple[Tensor, Any]:
        out, key = _attended(self.attn, self.norm1(x), with_key, attention)
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out), key

    def _mlp_branch(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class _PostNorm(_MergingBlock):
    """The norm at the end of each branch."""

    def _attention_branch(self, x: Tensor, with_key: bool, **attention: Any) -> tuple[Tensor, Any]:
        out, key = _attended(self.attn, x, with_key, attention)
        return self.drop_path1(self.norm1(out)), key

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


class FPETBlock(_LayerScaleModules, _MaskedForward, Block):
    """timm's ViT block."""


class FPETResPostBlock(_PostNorm, _MaskedForward, ResPostBlock):
    """timm's post-norm ViT block."""


class FPETEvaBlock(_LayerScaleParameters, _RopeForward, EvaBlock):
    """timm's EVA block."""


class FPETEvaBlockPostNorm(_PostNorm, _RopeForward, EvaBlockPostNorm):
    """timm's post-norm EVA block."""


class FPETRelPosBlock(_LayerScaleModules, _RelPosForward, RelPosBlock):
    """timm's block with relative position bias."""


class FPETResPostRelPosBlock(_PostNorm, _RelPosForward, ResPostRelPosBlock):
    """timm's post-norm block with relative position bias."""


class FPETBeitBlock(_LayerScaleParameters, BeitBlock):
    """timm's BEiT block."""

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, *, sizes: SizeBias | None = None,
        kept: Tensor | None = None, merge: MergeStep | None = None, record: MergeRecord | None = None,
    ) -> Any:  # fmt: skip
        if merge is None and sizes is None and kept is None and self._is_timms():
            return super().forward(x, shared_rel_pos_bias)
        return self._record(x, merge, record, shared_rel_pos_bias=shared_rel_pos_bias, sizes=sizes, kept=kept)


class FPETParallelThingsBlock(_MaskedForward, ParallelThingsBlock):
    """timm's block of parallel attentions, then parallel MLPs. The key is the mean over all attentions and heads."""

    def _attention_branch(self, x: Tensor, with_key: bool, **attention: Any) -> tuple[Tensor, Any]:
        outs, keys = [], list[Any]()
        for branch in self.attns:
            out, key = _attended(branch.attn, branch.norm(x), with_key, attention)
            outs.append(branch.drop_path(branch.ls(out)))
            keys.append(key)
        return torch.stack(outs).sum(dim=0), torch.cat(keys, dim=1) if with_key else None

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)


class _ParallelScaling(_MaskedForward):
    """Attention and MLP side by side on the same input: nothing lies between them, so merging comes after both."""

    def _run(self, x: Tensor, merge: MergeStep | None, **attention: Any) -> Any:
        mlp, q, k, v = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        if self.mlp_bias is not None:
            mlp = mlp + self.mlp_bias
        out, key = self._attention(x, q, k, v, attention)
        mlp = self.mlp_drop(self.mlp_act(mlp))
        if self.out_proj is not None:
            y = self.out_proj(torch.cat((out, mlp), dim=-1))
        else:
            y = self.attn_out_proj(out) + self.mlp_out_proj(mlp)
        adapter = getattr(self, "adapter_mlp", None)
        out = x + self.drop_path(self.ls(y))
        if adapter is not None:
            out = out + adapter(x)
        return out if merge is None else merge.merge(out, key, getattr(self, "refinement", None))

    def _attention(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class FPETParallelScalingBlock(_ParallelScaling, ParallelScalingBlock):
    """timm's block with attention and MLP in parallel."""

    def _attention(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v = (t.view(*x.shape[:2], self.num_heads, self.head_dim) for t in (q, k, v))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        out = attend(q, k, v, scale=self.scale, fused=self.fused_attn, dropout=self.attn_drop, **attention)
        return out.transpose(1, 2).reshape(x.shape), k


class FPETDiffParallelScalingBlock(_ParallelScaling, DiffParallelScalingBlock):
    """timm's block with differential attention and MLP in parallel."""

    def _attention(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
        batch, n, _ = x.shape
        q, k = (t.reshape(batch, n, 2 * self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k))
        v = v.reshape(batch, n, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        first, second = (
            attend(q[:, i::2], k[:, i::2], v, scale=self.scale, fused=self.fused_attn, dropout=self.attn_drop, **attention)
            for i in (0, 1)
        )
        out = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
        return out.transpose(1, 2).reshape(x.shape), k


TIMM_BLOCKS = ClassSwap(
    FPETBlock, FPETResPostBlock, FPETEvaBlock, FPETEvaBlockPostNorm, FPETRelPosBlock, FPETResPostRelPosBlock, FPETBeitBlock,
    FPETParallelThingsBlock, FPETParallelScalingBlock, FPETDiffParallelScalingBlock,
)  # fmt: skip
"""timm's blocks and the classes that take over."""

_SWAP = TIMM_BLOCKS | TIMM_ATTENTIONS


def attention_modules(block: Any) -> list[nn.Module]:
    """The attention modules of a block: one, or several in parallel, or none where the block does it itself."""
    if isinstance(block, ParallelThingsBlock):
        return [branch.attn for branch in block.attns]
    return [block.attn] if isinstance(getattr(block, "attn", None), nn.Module) else []


def is_converted(block: nn.Module) -> bool:
    """Whether :func:`convert` has been here."""
    return isinstance(block, _MergingBlock)


def why_not(block: nn.Module) -> str | None:
    """Why ``block`` can't be converted; None if it can, or has been."""
    if not TIMM_BLOCKS.known(block) and not is_converted(block):
        return f"no knowledge of its block class {_full_name(block)}"
    for attention in attention_modules(block):
        if not TIMM_ATTENTIONS.known(attention):
            return f"no knowledge of its attention class {_full_name(attention)}"
    return None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def convert(block: nn.Module) -> nn.Module:
    """Swaps the class of a timm block and of its attention; does nothing where that was done. Returns ``block``.

    Raises:
        TypeError: the block or its attention is of no class known here; nothing is changed.
    """
    if (reason := why_not(block)) is not None:
        raise TypeError(f"block: {reason}; known are {TIMM_BLOCKS.names()}")
    for module in (block, *attention_modules(block)):
        _SWAP.swap(module)
    return block


def restore(block: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, unless a slot is filled or the block belongs to a model that merges. Returns ``block``."""
    attentions = attention_modules(block)
    in_use = (
        getattr(block, "fpet_merging", False)
        or any(getattr(block, slot, None) is not None for slot in ("refinement", "adapter_mlp"))
        or any(getattr(a, slot, None) is not None for a in attentions for slot in ("lora_q", "lora_v"))
    )
    if not in_use:
        for module in (block, *attentions):
            _SWAP.restore(module)
    return block


def key_channels(block: Any) -> int:
    """Width of the key that ``block`` merges by: that of one head."""
    holder: Any = next(iter(attention_modules(block)), block)
    if isinstance(getattr(holder, "head_dim", None), int):
        return holder.head_dim
    return holder.qkv.out_features // (3 * holder.num_heads)  # BEiT keeps no record of it
