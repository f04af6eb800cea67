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

try:
    import transformers as _transformers  # noqa: F401  # the modules below take its parts one by one
    from transformers.models.blip import modeling_blip as _modeling_blip  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fpet.huggingface needs transformers 4.57 or later: pip install 'transformers>=4.57' ({error})"
    ) from error

from .blip import ImageTokens, encode_image, encode_text, match_logits
from .encoders import MergedOutput, VisionMergeConfig, vision_layers
from .patch import apply, convert, find_vision_encoder, merged_features, remove, restore

__all__ = [
    "ImageTokens",
    "MergedOutput",
    "VisionMergeConfig",
    "apply",
    "convert",
    "encode_image",
    "encode_text",
    "find_vision_encoder",
    "match_logits",
    "merged_features",
    "remove",
    "restore",
    "vision_layers",
]
