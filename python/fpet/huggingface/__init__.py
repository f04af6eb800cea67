"""Token merging in the vision encoders of transformers."""

from .encoders import (
    ImageTokens,
    MergedOutput,
    VisionMergeConfig,
    apply,
    encode_image,
    encode_text,
    find_vision_encoder,
    match_logits,
    merged_features,
    remove,
    vision_layers,
)

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
