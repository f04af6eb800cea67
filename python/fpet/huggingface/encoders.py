"""Token merging in the vision encoders of Hugging Face transformers: BLIP, CLIP, SigLIP and ViT.

>>> model = BlipForImageTextRetrieval.from_pretrained("Salesforce/blip-itm-base-flickr")
>>> fpet.huggingface.apply(model, layer=6, refinement=True)

As in :mod:`fpet.vit.patch`, the classes of one model's encoder, layers and attentions are swapped for subclasses of their own;
parameters, names and hooks stay, no class of transformers is changed, and token sizes travel as values. Whoever reads
``last_hidden_state`` gets every original position, so language models, captioners and pooling heads go on working: attending
to a merged token at each position it stands for is the same as adding the logarithm of its size to its score. BLIP's
image-text retrieval takes the short way: its cross-attention sees the merged tokens and their sizes.

Needs transformers from 4.57 on, which ``import fpet`` does not import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fpet_kernels import Split

from ..vit.attention import attend
from ..vit.merging import MergeStep, SizeBias, merge_splits, unmerge
from ..vit.models import MergeConfig, MergedFeatures
from ..vit.patch import _check_layers, _check_refinement

try:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.blip import modeling_blip, modeling_blip_text
    from transformers.models.clip import modeling_clip
    from transformers.models.siglip import modeling_siglip
    from transformers.models.vit import modeling_vit
except ImportError as error:
    raise ImportError(
        f"fpet.huggingface needs transformers 4.57 or later: pip install 'transformers>=4.57' ({error})"
    ) from error

__all__ = [
    "ImageTokens",
    "MergedOutput",
    "VisionMergeConfig",
    "apply",
    "encode_image",
    "encode_text",
    "find_vision_encoder",
    "match_logits",
    "merged_features",
    "remove",
    "vision_layers",
]

_FORMS = ("auto", "mask", "column")
_ATTENTIONS = ("eager", "sdpa")


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


# --- attention --------------------------------------------------------------------------------------------------------


def _weighed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sizes: SizeBias | None, how: str, dropout: nn.Dropout | None
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale · q kᵀ + log size) v, (B, heads, N, C); and the weights, where ``how`` is "eager"."""
    if how == "sdpa":
        return attend(q, k, v, scale=scale, fused=True, sizes=sizes, dropout=dropout), None
    scores = (q @ k.transpose(-2, -1)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sizes is not None:
        scores = scores + sizes.log_size[:, None, None, :]
    weights = scores.softmax(dim=-1).to(q.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v, weights


def _heads(t: Tensor, width: int) -> Tensor:
    """(B, heads, N, width) view of (B, N, heads · width)."""
    return t.unflatten(-1, (-1, width)).transpose(1, 2)


class _Sized(nn.Module):
    """transformers' attention, which does its own work where nothing is asked for that it can't do.

    Keyword arguments on top: sizes, for proportional attention; with_key, to return the key too; attention, "eager" or
    "sdpa" in place of the model's setting.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, sizes: SizeBias | None = None, with_key: bool = False,
        attention: str | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if sizes is None and not with_key and attention is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        how = attention or self.config._attn_implementation
        q, k, v = self._qkv(hidden_states)
        out, weights = _weighed_attention(
            q, k, v, scale=q.shape[-1] ** -0.5, sizes=sizes, how=how, dropout=self._dropout()
        )  # fmt: skip
        out = self._project(out.transpose(1, 2).flatten(2))
        return (out, weights, k) if with_key else (out, weights)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (B, heads, N, C)."""
        return tuple(_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))

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
            return tuple(_heads(layer(x), self.attention_head_size) for layer in (self.query, self.key, self.value))
        return super()._qkv(x)

    def _project(self, x: Tensor) -> Tensor:
        return self.o_proj(x) if hasattr(self, "o_proj") else x

    def _dropout(self) -> nn.Dropout | None:
        return _dropout(self.dropout_prob if hasattr(self, "dropout_prob") else self.attention_dropout, self.training)


# --- layers -----------------------------------------------------------------------------------------------------------


class _LayerCall(NamedTuple):
    """What a layer is called with besides tensors: how to merge, if it does, and how to attend."""

    split: Split | None
    config: VisionMergeConfig


class _MergingLayer(nn.Module):
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
        attention: Any = _attention_of(self)
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


class _MergingEncoder(nn.Module):
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
        trace = _flag(output_hidden_states, self.config, "output_hidden_states")
        attentions = _flag(output_attentions, self.config, "output_attentions")
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
        return output if _flag(return_dict, self.config, "return_dict", True) else output.to_tuple()

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


class FPETBlipVisionModel(_MergingEncoder, modeling_blip.BlipVisionModel):
    """BLIP's vision encoder."""

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        return self.post_layernorm(tokens[:, 0])  # once more, as transformers does


# In transformers 5 a CLIPVisionModel is the encoder; before, it holds one. So it is with SigLIP.
_CLIP_VISION: Any = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)
_SIGLIP_VISION: Any = getattr(modeling_siglip, "SiglipVisionTransformer", modeling_siglip.SiglipVisionModel)


class FPETCLIPVisionModel(_MergingEncoder, _CLIP_VISION):
    """CLIP's vision encoder; ``last_hidden_state`` is not normed, as in transformers."""

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixel_values, **options))

    def _final_norm(self, x: Tensor) -> Tensor:
        return x

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        return self.post_layernorm(tokens[:, 0])


class FPETSiglipVisionModel(_MergingEncoder, _SIGLIP_VISION):
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


class FPETViTModel(_MergingEncoder, modeling_vit.ViTModel):
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


def _flag(value: Any, config: Any, name: str, default: bool = False) -> bool:
    """What was asked for, or the model's setting; a list of layers, which transformers 5 allows, asks for all."""
    value = getattr(config, name, default) if value is None else value
    return value is not None and value is not False


def _exact(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# --- image-text retrieval ---------------------------------------------------------------------------------------------


class ImageTokens(NamedTuple):
    """What :func:`encode_image` returns. Attributes: tokens (B, M, D); size (B, M, 1), None where every token counts once."""

    tokens: Tensor
    size: Tensor | None = None

    def rows(self, which: Tensor) -> ImageTokens:
        """Those of some of the images, by index."""
        return ImageTokens(self.tokens[which], None if self.size is None else self.size[which])

    def to(self, device: torch.device | str) -> ImageTokens:
        """The same on ``device``."""
        return ImageTokens(self.tokens.to(device), None if self.size is None else self.size.to(device))


class FPETBlipCrossAttention(modeling_blip_text.BlipTextSelfAttention):
    """The text's cross-attention over image tokens, each weighed by its size.

    BLIP's text encoder has no way to hand a bias down to this place: BlipTextAttention drops the mask it is given. So the
    logarithm of the size travels as one more column of ``encoder_hidden_states``; without that column, everything is as in
    transformers.
    """

    fpet_attention: str | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed = kwargs.get("encoder_hidden_states")
        if packed is None or packed.shape[-1] == self.key.in_features:
            return super().forward(hidden_states, *args, **kwargs)
        tokens, log_size = packed[..., :-1].to(hidden_states.dtype), packed[..., -1]
        width = self.attention_head_size
        q, k, v = _heads(self.query(hidden_states), width), _heads(self.key(tokens), width), _heads(self.value(tokens), width)
        out, weights = _weighed_attention(
            q, k, v, scale=1 / math.sqrt(width), sizes=SizeBias(log_size, "mask"), how=self.fpet_attention or "eager",
            dropout=self.dropout,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2), weights


class FPETBlipForImageTextRetrieval(modeling_blip.BlipForImageTextRetrieval):
    """BLIP for retrieval; its text encoder sees the merged tokens."""

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, use_itm_head: bool | None = True, attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False, return_dict: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        vision = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, keep_merged=True, return_dict=True,
            output_attentions=kwargs.get("output_attentions"), output_hidden_states=kwargs.get("output_hidden_states"),
        )  # fmt: skip
        image = _image_tokens(self.vision_model, vision)
        if use_itm_head:
            text = _text_states(self, input_ids, attention_mask, image, **kwargs)
            scores = self.itm_head(text[:, 0])
        else:
            text = _text_states(self, input_ids, attention_mask, **kwargs)
            image_features = F.normalize(self.vision_proj(image.tokens[:, 0]), dim=-1)
            scores = image_features @ F.normalize(self.text_proj(text[:, 0]), dim=-1).t()
        source = vision.source[..., None].expand(-1, -1, image.tokens.shape[-1])
        output = modeling_blip.BlipImageTextMatchingModelOutput(
            itm_score=scores, last_hidden_state=vision.last_hidden_state.gather(1, source),
            hidden_states=vision.hidden_states, attentions=vision.attentions, question_embeds=text,
        )  # fmt: skip
        return output if _flag(return_dict, self.config, "return_dict", True) else output.to_tuple()


def _image_tokens(encoder: Any, output: Any) -> ImageTokens:
    size = getattr(output, "size", None)
    config = getattr(encoder, "fpet_config", None)
    weigh = config is not None and config.layers and config.proportional_attention is not None
    return ImageTokens(output.last_hidden_state, size if weigh else None)


def _text_states(model: Any, ids: Tensor, mask: Tensor | None, image: ImageTokens | None = None, **kwargs: Any) -> Tensor:
    """(B, L, D): the text encoder's last states, with cross-attention where an image is given."""
    states = None
    if image is not None:
        states = image.tokens if image.size is None else torch.cat((image.tokens, image.size.log()), dim=-1)
    return model.text_encoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=states, return_dict=True, **kwargs
    ).last_hidden_state  # fmt: skip


def encode_image(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[ImageTokens, Tensor]:
    """Image tokens for :func:`match_logits`, and normalised features (B, E) for the contrastive loss.

    Args:
        model: a BlipForImageTextRetrieval, patched or not. options: of its vision encoder, as interpolate_pos_encoding.
    """
    encoder: Any = _retrieval_model(model).vision_model
    if isinstance(encoder, _MergingEncoder):
        options["keep_merged"] = True
    image = _image_tokens(encoder, encoder(pixel_values, return_dict=True, **options))
    return image, F.normalize(model.vision_proj(image.tokens[:, 0]), dim=-1)


def encode_text(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Normalised features (B, E) of (B, L) token ids, without cross-attention."""
    states = _text_states(_retrieval_model(model), input_ids, attention_mask)
    return F.normalize(model.text_proj(states[:, 0]), dim=-1)


def match_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, image: ImageTokens) -> Tensor:
    """(B, 2): does the text not match, does it match the image of the same row."""
    return model.itm_head(_text_states(_retrieval_model(model), input_ids, attention_mask, image)[:, 0])


def _retrieval_model(model: nn.Module) -> Any:
    if not isinstance(model, modeling_blip.BlipForImageTextRetrieval):
        raise TypeError(f"model: expected a BlipForImageTextRetrieval, got {type(model).__name__}")
    return model


# --- switching on and off ---------------------------------------------------------------------------------------------


def _original(ours: type[nn.Module]) -> type[nn.Module]:
    return ours.__bases__[-1]


ENCODERS: dict[type[nn.Module], type[nn.Module]] = {
    _original(cls): cls for cls in (FPETBlipVisionModel, FPETCLIPVisionModel, FPETSiglipVisionModel, FPETViTModel)
}
"""The class that takes over, for each of transformers' vision encoders."""

_INNER: dict[type[nn.Module], type[nn.Module]] = {
    _original(cls): cls
    for cls in (
        FPETBlipEncoderLayer, FPETCLIPEncoderLayer, FPETSiglipEncoderLayer, FPETViTLayer,
        FPETBlipAttention, FPETCLIPAttention, FPETSiglipAttention, FPETViTAttention,
        FPETBlipCrossAttention,
    )
}  # fmt: skip
_HOLDERS: dict[type[nn.Module], type[nn.Module]] = {
    _original(cls): cls for cls in (FPETBlipForImageTextRetrieval, globals().get("FPETSiglipVisionShell")) if cls is not None
}
_BACK = {ours: theirs for theirs, ours in (ENCODERS | _INNER | _HOLDERS).items()}
for _ours, _theirs in _BACK.items():
    if issubclass(_ours, PreTrainedModel):
        _ours.__name__ = _theirs.__name__  # save_pretrained writes it into config.json; pickle goes by __qualname__


def apply(
    model: nn.Module,
    layer: int | Iterable[int] | None = None,
    *,
    refinement: Any = None,
    proportional_attention: bool | str = True,
    similarity: str = "cosine",
    attention: str | None = None,
    backend: str | None = None,
) -> nn.Module:
    """Makes the vision encoder in ``model`` merge half of its patch tokens in one layer or several.

    Args: those of :func:`fpet.apply`, and
        model: a BLIP, CLIP, SigLIP or ViT of transformers, or anything that holds exactly one vision encoder of theirs.
        attention: "eager" or "sdpa" for the encoder's layers; None follows the model's ``attn_implementation``, which for
            BLIP transformers has in eager form only. "sdpa" holds for BLIP's cross-attention over merged tokens too.

    Returns:
        ``model``. Calling it again changes the settings.

    Raises:
        TypeError: an encoder, layer or attention that merging would not be sound in, with the reason. ValueError: an
            argument's value. Nothing is changed then.
    """
    encoder: Any = find_vision_encoder(model)
    form = "auto" if proportional_attention is True else proportional_attention or None
    if form is not None and form not in _FORMS:
        raise ValueError(f"proportional_attention: expected True, False, 'mask' or 'column', got {proportional_attention!r}")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity: expected 'cosine' or 'dot', got {similarity!r}")
    if attention is not None and attention not in _ATTENTIONS:
        raise ValueError(f"attention: expected 'eager', 'sdpa' or None, got {attention!r}")
    layers = _check_layers(layer, len(vision_layers(encoder)))
    _check_structure(encoder, layers, attention)
    modules = _check_refinement(refinement, layers, vision_layers(encoder), _key_channels)
    if modules and isinstance(encoder, FSDPModule):
        raise TypeError("model: it is sharded and takes no new parameters; call fpet.huggingface.apply before fully_shard")

    convert(encoder)
    encoder.fpet_config = VisionMergeConfig(layers, form, similarity, backend, attention)  # type: ignore[arg-type]
    for i, block in enumerate(vision_layers(encoder)):
        if i in modules:
            block.refinement = modules[i]
        elif refinement is False and getattr(block, "refinement", None) is not None:
            del block.refinement
    for module in _around(model, encoder):
        module.__class__ = (_INNER | _HOLDERS).get(type(module), type(module))
        if isinstance(module, FPETBlipCrossAttention):
            module.fpet_attention = attention
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply`: classes are transformers' again, refinements are gone. Returns ``model``.

    With adapters in the encoder's layers (:func:`fpet.retrieval.uniadapter.add_uniadapters`) these stay, and nothing is merged.
    """
    encoder: Any = next((m for m in model.modules() if isinstance(m, _MergingEncoder)), None)
    if encoder is None:
        return model
    if type(encoder) not in _BACK:
        raise TypeError(f"model: {type(encoder).__name__} was wrapped after fpet.huggingface.apply; remove before wrapping")
    for block in vision_layers(encoder):
        if getattr(block, "refinement", None) is not None:
            del block.refinement
    for module in _around(model, encoder):
        module.__dict__.pop("fpet_attention", None)
        module.__class__ = _BACK.get(type(module), type(module))
    encoder.fpet_config = VisionMergeConfig()
    restore(encoder)
    return model


def convert(encoder: Any) -> None:
    """Swaps the classes of a vision encoder, its layers and their attentions; nothing is merged by that yet."""
    for module in _parts(encoder):
        # transformers 4 leaves a module's own forward behind on the instance once it has recorded hidden states.
        module.__dict__.pop("forward", None)
        module.__class__ = (ENCODERS | _INNER).get(type(module), type(module))
    if not hasattr(encoder, "fpet_config"):
        encoder.fpet_config = VisionMergeConfig()


def restore(encoder: Any) -> None:
    """Undoes :func:`convert`, unless the encoder merges or a layer has an adapter or a refinement."""
    blocks = vision_layers(encoder)
    filled = any(block.adapter is not None or getattr(block, "refinement", None) is not None for block in blocks)
    if encoder.fpet_config.layers or filled:
        return
    for module in _parts(encoder):
        module.__dict__.pop("forward", None)
        module.__class__ = _BACK.get(type(module), type(module))
    del encoder.fpet_config


def merged_features(model: nn.Module, pixel_values: Tensor, **options: Any) -> MergedFeatures:
    """The encoder's merged tokens (B, M, D), how many original tokens each one stands for, and which one for which.

    Raises:
        TypeError: the model is not patched.
    """
    encoder: Any = next((m for m in model.modules() if isinstance(m, _MergingEncoder)), None)
    if encoder is None:
        raise TypeError(f"model: expected one patched by fpet.huggingface.apply, got {type(model).__name__}")
    output = encoder(pixel_values, keep_merged=True, return_dict=True, **options)
    return MergedFeatures(output.last_hidden_state, output.size, output.source)


def find_vision_encoder(model: nn.Module) -> nn.Module:
    """The one vision encoder in ``model`` that merging is known for.

    Raises:
        TypeError: there is none, there are several, or a data-parallel wrapper is around it.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise TypeError(f"model: expected an unwrapped model, got {type(model).__name__}; patch it before wrapping")
    found = [m for m in model.modules() if type(m) in ENCODERS or isinstance(m, _MergingEncoder)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        raise TypeError(f"model: {name} holds {len(found)} vision encoders; call fpet.huggingface.apply on each")
    for module in model.modules():
        if (base := next((cls for cls in type(module).__mro__[1:] if cls in ENCODERS), None)) is not None:
            what = f"{type(module).__name__} is a subclass of {base.__name__}, and what it changes there is unknown"
            raise TypeError(f"model: {name} can't be merged: {what}")
    known = ", ".join(cls.__name__ for cls in ENCODERS)
    raise TypeError(f"model: {name} can't be merged: no knowledge of a vision encoder in it; known are {known}")


def vision_layers(encoder: Any) -> list[Any]:
    """The layers of a vision encoder."""
    if hasattr(encoder, "layers"):  # ViT in transformers 5
        return list(encoder.layers)
    return list(encoder.encoder.layer if hasattr(encoder.encoder, "layer") else encoder.encoder.layers)


def _attention_of(layer: Any) -> Any:
    """The module that has q, k and v."""
    if hasattr(layer, "self_attn"):
        return layer.self_attn
    return getattr(layer.attention, "attention", layer.attention)


def _parts(encoder: Any) -> list[nn.Module]:
    blocks = vision_layers(encoder)
    return [encoder, *blocks, *(_attention_of(block) for block in blocks)]


def _around(model: nn.Module, encoder: nn.Module) -> list[nn.Module]:
    """What else in ``model`` has to know that ``encoder`` merges: the model it belongs to, and BLIP's cross-attentions."""
    found: list[nn.Module] = []
    for holder in model.modules():
        if (type(holder) in _HOLDERS or type(holder) in _HOLDERS.values()) and holder.vision_model is encoder:
            found.append(holder)
            if isinstance(holder, modeling_blip.BlipForImageTextRetrieval):
                blocks = holder.text_encoder.encoder.layer
                found += [block.crossattention.self for block in blocks if hasattr(block, "crossattention")]
    return found


def _check_structure(encoder: Any, layers: tuple[int, ...], attention: str | None) -> None:
    name = type(encoder).__name__
    for part in _parts(encoder):
        if type(part) not in ENCODERS and type(part) not in _INNER and type(part) not in _BACK:
            raise TypeError(f"model: {name} can't be merged: no knowledge of {type(part).__name__}")
        own = part.__dict__.get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(part).forward:
            what = f"the forward of its {type(part).__name__} was replaced, as accelerate's device_map does"
            raise TypeError(f"model: {name} can't be merged: {what}; call fpet.huggingface.apply before that")
    how = attention or encoder.config._attn_implementation
    if how not in _ATTENTIONS:
        raise TypeError(
            f"model: {name} attends by {how!r}, which can't weigh tokens by size; expected 'eager' or 'sdpa': load it with "
            f"attn_implementation='sdpa', or give attention='sdpa'"
        )
    if layers:
        height, width = _configured_grid(encoder)
        merge_splits(height, width, len(layers))


def _configured_grid(encoder: Any) -> tuple[int, int]:
    size, patch = encoder.config.image_size, encoder.config.patch_size
    sizes = size if isinstance(size, Iterable) else (size, size)
    patches = patch if isinstance(patch, Iterable) else (patch, patch)
    height, width = (int(s) // int(p) for s, p in zip(sizes, patches, strict=True))
    return height, width


def _key_channels(block: Any) -> int:
    inner = _attention_of(block)
    return inner.head_dim if hasattr(inner, "head_dim") else inner.attention_head_size
