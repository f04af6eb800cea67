"""BLIP for image-text retrieval: a text encoder whose cross-attention sees merged image tokens and their sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip import modeling_blip, modeling_blip_text

from ..vit.merging import SizeBias
from .attention import split_heads, weighed_attention
from .encoders import MergingEncoder, asked_for

__all__ = ["ImageTokens", "encode_image", "encode_text", "match_logits"]


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
        q, k, v = (
            split_heads(self.query(hidden_states), width),
            split_heads(self.key(tokens), width),
            split_heads(self.value(tokens), width),
        )
        out, weights = weighed_attention(
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
            itm_score=scores,
            last_hidden_state=vision.last_hidden_state.gather(1, source),
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            question_embeds=text,
        )
        return output if asked_for(return_dict, self.config, "return_dict", True) else output.to_tuple()


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
    ).last_hidden_state


def encode_image(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[ImageTokens, Tensor]:
    """Image tokens for :func:`match_logits`, and normalised features (B, E) for the contrastive loss.

    Args:
        model: a BlipForImageTextRetrieval, patched or not. options: of its vision encoder, as interpolate_pos_encoding.
    """
    whole = _retrieval_model(model)
    encoder = whole.vision_model
    if isinstance(encoder, MergingEncoder):
        options["keep_merged"] = True
    image = _image_tokens(encoder, encoder(pixel_values, return_dict=True, **options))
    return image, F.normalize(whole.vision_proj(image.tokens[:, 0]), dim=-1)


def encode_text(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Normalised features (B, E) of (B, L) token ids, without cross-attention."""
    whole = _retrieval_model(model)
    return F.normalize(whole.text_proj(_text_states(whole, input_ids, attention_mask)[:, 0]), dim=-1)


def match_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, image: ImageTokens) -> Tensor:
    """(B, 2): does the text not match, does it match the image of the same row."""
    whole = _retrieval_model(model)
    return whole.itm_head(_text_states(whole, input_ids, attention_mask, image)[:, 0])


def _retrieval_model(model: nn.Module) -> Any:
    if not isinstance(model, modeling_blip.BlipForImageTextRetrieval):
        raise TypeError(f"model: expected a BlipForImageTextRetrieval, got {type(model).__name__}")
    return model
