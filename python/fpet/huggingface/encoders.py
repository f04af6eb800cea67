"""The layers of transformers' vision encoders with a place to merge, and the loop over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip import modeling_blip
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip
from transformers.models.vit import modeling_vit

from fpet_kernels import Split

from ..layers.swapping import Foreign
from ..vit.config import MergeConfig
from ..vit.merging import MergeStep, SizeBias, merge_splits, unmerge

__all__ = ["MergedOutput", "VisionMergeConfig", "vision_layers"]


@dataclass(frozen=True)
class VisionMergeConfig(MergeConfig):
    """Where and how an encoder merges; on a patched one as ``encoder.fpet_config``.

    Attributes:
        attention: "eager" or "sdpa" for all its layers; None follows the model's own setting.
    """

    attention: str | None = None


@dataclass
class MergedOutput(BaseModelOutputWithPooling):
    """An encoder's output with its tokens left merged (``keep_merged=True``).

    Attributes, besides those of transformers' output, in which ``last_hidden_state`` is (B, M, D) here:
        size: (B, M, 1) how many of the original tokens each one stands for.
        source: (B, N) int64: for every original token the index of the one that stands for it.
    """

    size: Tensor | None = None
    source: Tensor | None = None


# --- layers -----------------------------------------------------------------------------------------------------------


class _LayerCall(NamedTuple):
    """What a layer is called with besides tensors: how to merge, if it does, and how to attend."""

    split: Split | None
    config: VisionMergeConfig


class _MergingLayer(Foreign):
    """A pre-norm layer that merges between its attention's residual and its MLP.

    It honours two slots that others set: ``refinement``, a KeyRefinement that corrects the key; ``adapter``, a pair of a
    module and a word, called as ``module(x, word)`` with the un-normed tokens after merging, its output joining the MLP's.
    """

    adapter: tuple[nn.Module, str] | None = None

    def forward(
        self, hidden_states: Tensor, log_size: Tensor | None = None, size: Tensor | None = None, *, call: _LayerCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(B, N, D) → tokens (B, M, D), their sizes and matches where this layer merges, attention weights where eager."""
        split, config = call
        sizes = None if log_size is None else SizeBias(log_size, config.proportional_attention or "auto")
        branch, weights, key = self._attention_branch(hidden_states, sizes, split is not None, config.attention)
        x = hidden_states + branch
        match = None
        if split is not None:
            assert key is not None
            step = MergeStep(split, size, config.similarity, config.backend)
            x, size, match = step.merge(x, key, getattr(self, "refinement", None))
        out = x + self._mlp_branch(x)
        if self.adapter is not None:
            module, word = self.adapter
            out = out + module(x, word)
        return out, size, match, weights

    def _attention_branch(
        self, x: Tensor, sizes: SizeBias | None, with_key: bool, how: str | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What attention adds to x; its weights and its key, where there are any."""
        out, weights, *key = self.self_attn(self.layer_norm1(x), sizes=sizes, with_key=with_key, attention=how)
        return out, weights, key[0] if key else None

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.layer_norm2(x))


class FPETBlipEncoderLayer(_MergingLayer, modeling_blip.BlipEncoderLayer):
    """BLIP's vision layer."""


class FPETCLIPEncoderLayer(_MergingLayer, modeling_clip.CLIPEncoderLayer):
    """CLIP's layer."""


class FPETSiglipEncoderLayer(_MergingLayer, modeling_siglip.SiglipEncoderLayer):
    """SigLIP's layer."""


class FPETViTLayer(_MergingLayer, modeling_vit.ViTLayer):
    """ViT's layer, as transformers 4 and as transformers 5 have it."""

    def _attention_branch(
        self, x: Tensor, sizes: SizeBias | None, with_key: bool, how: str | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        attention: Any = attention_of(self)
        out, weights, *key = attention(self.layernorm_before(x), sizes=sizes, with_key=with_key, attention=how)
        out = self.dropout(out) if attention is self.attention else self.attention.output(out, out)
        return out, weights, key[0] if key else None

    def _mlp_branch(self, x: Tensor) -> Tensor:
        x = self.layernorm_after(x)
        if hasattr(self, "intermediate"):
            return self.output.dropout(self.output.dense(self.intermediate(x)))
        return self.dropout(self.mlp(x))


# --- encoders ---------------------------------------------------------------------------------------------------------


class _Encoded(NamedTuple):
    """What the layers leave: tokens (B, M, D) before the final norm, their sizes, how to undo the merging, and a trace."""

    x: Tensor
    size: Tensor | None
    splits: tuple[Split, ...]
    matches: list[Tensor]
    num_prefix_tokens: int
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, N, ...) from (B, M, ...)."""
        return unmerge(x, self.splits, self.matches, self.num_prefix_tokens)


class MergingEncoder(Foreign):
    """The loop over the layers of a vision encoder, and what becomes of merged tokens after it."""

    fpet_config: VisionMergeConfig

    def forward(
        self, pixel_values: Tensor | None = None, *, interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None, return_dict: bool | None = None,
        keep_merged: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """transformers' forward.

        ``last_hidden_state`` and ``hidden_states`` have every original position, (B, N, D). ``attentions`` are over the
        tokens there were; asking for them takes the eager form. ``keep_merged`` returns a :class:`MergedOutput`.
        """
        if pixel_values is None:
            raise ValueError("pixel_values: expected a tensor (B, 3, H, W), got None")
        options = {name: value for name, value in options.items() if value is not None}
        if unknown := options.keys() - self._options:
            raise TypeError(f"{type(self).__name__}: merging does not support the arguments {sorted(unknown)}")
        trace = asked_for(output_hidden_states, self.config, "output_hidden_states")
        attentions = asked_for(output_attentions, self.config, "output_attentions")
        options["interpolate_pos_encoding"] = bool(interpolate_pos_encoding)
        encoded = self._encode(pixel_values, trace, attentions, options)
        tokens = self._final_norm(encoded.x)
        output: Any
        if keep_merged:
            positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
            source = encoded.unmerge(positions.expand(len(tokens), -1)[..., None]).squeeze(-1).long()
            size = encoded.size if encoded.size is not None else tokens.new_ones(*tokens.shape[:2], 1, dtype=_exact(tokens))
            output = MergedOutput(tokens, self._pool(tokens, encoded.size), size=size, source=source)
        else:
            output = BaseModelOutputWithPooling(encoded.unmerge(tokens), self._pool(tokens, encoded.size))
        output.hidden_states, output.attentions = encoded.hidden_states, encoded.attentions
        return output if asked_for(return_dict, self.config, "return_dict", True) else output.to_tuple()

    def _encode(self, pixel_values: Tensor, trace: bool, attentions: bool, options: dict[str, Any]) -> _Encoded:
        config, layers = self.fpet_config, vision_layers(self)
        if attentions:
            config = VisionMergeConfig(**{**vars(config), "attention": "eager"})
        x = self._embed(pixel_values, **options)
        height, width = self._grid(pixel_values)
        prefix = x.shape[1] - height * width
        splits = merge_splits(height, width, len(config.layers))
        size = log_size = None
        matches: list[Tensor] = []
        states, weights = [x], []
        for i, layer in enumerate(layers):
            split = splits[len(matches)] if i in config.layers else None
            # Whatever needs a gradient is a positional argument, so that re-entrant checkpointing sees it.
            x, size, match, weight = layer(x, log_size, size, call=_LayerCall(split, config))
            if match is not None:
                matches.append(match)
                if config.proportional_attention is not None:
                    log_size = size.squeeze(-1).log()
            if trace:
                states.append(unmerge(x, splits, matches, prefix))
            weights.append(weight)
        return _Encoded(
            x, size, splits, matches, prefix, tuple(states) if trace else None, tuple(weights) if attentions else None
        )  # fmt: skip

    _options: frozenset[str] = frozenset()

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """transformers' own steps up to the first layer: (B, N, D)."""
        return self.embeddings(pixel_values, **options)

    def _patch_convolution(self) -> nn.Conv2d:
        return self.embeddings.patch_embedding

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in these images."""
        kernel, stride = (self._patch_convolution().kernel_size, self._patch_convolution().stride)
        height, width = ((side - k) // s + 1 for side, k, s in zip(pixel_values.shape[-2:], kernel, stride, strict=True))
        return height, width

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.post_layernorm(x)

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor | None:
        """transformers' pooled output, each token counted as often as it stands for an original one."""
        raise NotImplementedError


class FPETBlipVisionModel(MergingEncoder, modeling_blip.BlipVisionModel):
    """BLIP's vision encoder."""

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        return self.post_layernorm(tokens[:, 0])  # once more, as transformers does


# In transformers 5 a CLIPVisionModel is the encoder; before, it holds one. So it is with SigLIP.
_CLIP_VISION: Any = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)
_SIGLIP_VISION: Any = getattr(modeling_siglip, "SiglipVisionTransformer", modeling_siglip.SiglipVisionModel)


class FPETCLIPVisionModel(MergingEncoder, _CLIP_VISION):
    """CLIP's vision encoder; ``last_hidden_state`` is not normed, as in transformers."""

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixel_values, **options))

    def _final_norm(self, x: Tensor) -> Tensor:
        return x

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        return self.post_layernorm(tokens[:, 0])


class FPETSiglipVisionModel(MergingEncoder, _SIGLIP_VISION):
    """SigLIP's vision encoder: no class token, pooled by attention."""

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor | None:
        if not self.use_head:
            return None
        head = self.head
        if size is None or self.fpet_config.proportional_attention is None:
            return head(tokens)
        mask = size.squeeze(-1).log().to(tokens.dtype)[:, None].repeat_interleave(head.attention.num_heads, dim=0)
        probe = head.probe.expand(len(tokens), -1, -1)
        pooled = head.attention(probe, tokens, tokens, attn_mask=mask)[0]
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


class FPETViTModel(MergingEncoder, modeling_vit.ViTModel):
    """ViT."""

    _options = frozenset({"bool_masked_pos"})

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        return self.embeddings(pixel_values.to(self._patch_convolution().weight.dtype), **options)

    def _patch_convolution(self) -> nn.Conv2d:
        return self.embeddings.patch_embeddings.projection

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.layernorm(x)

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor | None:
        return None if self.pooler is None else self.pooler(tokens)  # reads the class token


if _SIGLIP_VISION is not modeling_siglip.SiglipVisionModel:

    class FPETSiglipVisionShell(modeling_siglip.SiglipVisionModel):
        """transformers 4's model around SigLIP's encoder, without its own recorder, which would record merged tokens."""

        def forward(self, pixel_values: Tensor | None = None, **options: Any) -> Any:
            return self.vision_model(pixel_values, **options)


def asked_for(value: Any, config: Any, name: str, default: bool = False) -> bool:
    """What was asked for, or the model's setting; a list of layers, which transformers 5 allows, asks for all."""
    value = getattr(config, name, default) if value is None else value
    return value is not None and value is not False


def _exact(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def vision_layers(encoder: Any) -> list[Any]:
    """The layers of a vision encoder."""
    if hasattr(encoder, "layers"):  # ViT in transformers 5
        return list(encoder.layers)
    return list(encoder.encoder.layer if hasattr(encoder.encoder, "layer") else encoder.encoder.layers)


def attention_of(layer: Any) -> Any:
    """The module that has q, k and v."""
    if hasattr(layer, "self_attn"):
        return layer.self_attn
    return getattr(layer.attention, "attention", layer.attention)
