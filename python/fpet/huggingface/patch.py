"""``fpet.huggingface.apply`` and ``remove``: merging switched on and off in a model of transformers that exists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers.models.blip import modeling_blip

from ..layers.swapping import ClassSwap
from ..vit.config import attention_form, check_layers, check_similarity, new_refinements, set_refinements
from ..vit.foreign import refuse_wrapped
from ..vit.merging import merge_splits
from ..vit.models import MergedFeatures
from ..vit.patch import also_removes
from . import encoders
from .attention import FPETBlipAttention, FPETCLIPAttention, FPETSiglipAttention, FPETViTAttention
from .blip import FPETBlipCrossAttention, FPETBlipForImageTextRetrieval
from .encoders import (
    FPETBlipEncoderLayer,
    FPETBlipVisionModel,
    FPETCLIPEncoderLayer,
    FPETCLIPVisionModel,
    FPETSiglipEncoderLayer,
    FPETSiglipVisionModel,
    FPETViTLayer,
    FPETViTModel,
    MergingEncoder,
    VisionMergeConfig,
    attention_of,
    vision_layers,
)

__all__ = ["apply", "convert", "find_vision_encoder", "merged_features", "remove", "restore"]


_IMPLEMENTATIONS = ("eager", "sdpa")


# By the name of the class: what output_hidden_states and output_attentions can record in transformers' own forward.
_RECORDED: dict[Any, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})

ENCODERS = ClassSwap(FPETBlipVisionModel, FPETCLIPVisionModel, FPETSiglipVisionModel, FPETViTModel)
"""transformers' vision encoders and the classes that take over."""

_INNER = ClassSwap(
    FPETBlipEncoderLayer, FPETCLIPEncoderLayer, FPETSiglipEncoderLayer, FPETViTLayer,
    FPETBlipAttention, FPETCLIPAttention, FPETSiglipAttention, FPETViTAttention,
)  # fmt: skip
_SHELL = getattr(encoders, "FPETSiglipVisionShell", None)  # transformers 4 alone has one
_HOLDERS = ClassSwap(FPETBlipForImageTextRetrieval, *(() if _SHELL is None else (_SHELL,)))
_CROSS = ClassSwap(FPETBlipCrossAttention)
for _theirs, _ours in (ENCODERS | _HOLDERS).pairs():
    if issubclass(_ours, PreTrainedModel):
        _ours.__name__ = _theirs.__name__  # save_pretrained writes it into config.json; pickle goes by __qualname__
    dict.__setitem__(_RECORDED, str(_ours), getattr(_theirs, "_can_record_outputs", None) or {})


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
    form = attention_form(proportional_attention)
    check_similarity(similarity)
    if attention is not None and attention not in _IMPLEMENTATIONS:
        raise ValueError(f"attention: expected 'eager', 'sdpa' or None, got {attention!r}")
    layers = check_layers(layer, len(vision_layers(encoder)))
    _check_structure(encoder, layers, attention)
    modules = new_refinements(refinement, layers, vision_layers(encoder), _key_channels)
    if modules:
        refuse_wrapped(model, "fpet.huggingface.apply")
        refuse_wrapped(encoder, "fpet.huggingface.apply")

    convert(encoder)
    encoder.fpet_config = VisionMergeConfig(layers, form, similarity, backend, attention)
    set_refinements(vision_layers(encoder), modules, others=refinement is not False)
    for i, block in enumerate(vision_layers(encoder)):
        block.fpet_layer = i if i in layers else None
    for module in _around(model, encoder):
        (_HOLDERS | _CROSS).swap(module)
        if isinstance(module, FPETBlipCrossAttention):
            module.fpet_attention = attention
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply`: classes are transformers' again, refinements are gone. Returns ``model``.

    With adapters in the encoder's layers (:func:`fpet.retrieval.uniadapter.add_uniadapters`) these stay, and nothing is merged.
    """
    encoder: Any = next((m for m in model.modules() if isinstance(m, MergingEncoder)), None)
    if encoder is None:
        return model
    if not ENCODERS.known(encoder):
        raise TypeError(f"model: {type(encoder).__name__} was wrapped after fpet.huggingface.apply; remove before wrapping")
    set_refinements(vision_layers(encoder), {}, others=False)
    for block in vision_layers(encoder):
        block.__dict__.pop("fpet_layer", None)
    for module in _around(model, encoder):
        module.__dict__.pop("fpet_attention", None)
        (_HOLDERS | _CROSS).restore(module)
    encoder.fpet_config = VisionMergeConfig()
    restore(encoder)
    return model


def convert(encoder: Any) -> None:
    """Swaps the classes of a vision encoder, its layers and their attentions; nothing is merged by that yet."""
    for module in _parts(encoder):
        (ENCODERS | _INNER).swap(module)
    if not hasattr(encoder, "fpet_config"):
        encoder.fpet_config = VisionMergeConfig()


def restore(encoder: Any) -> None:
    """Undoes :func:`convert`, unless the encoder merges or a layer has an adapter or a refinement."""
    blocks = vision_layers(encoder)
    filled = any(block.adapter is not None or getattr(block, "refinement", None) is not None for block in blocks)
    if encoder.fpet_config.layers or filled:
        return
    for module in _parts(encoder):
        (ENCODERS | _INNER).restore(module)
    del encoder.fpet_config


also_removes(MergingEncoder, remove)


def merged_features(model: nn.Module, pixel_values: Tensor, **options: Any) -> MergedFeatures:
    """The encoder's merged tokens (B, M, D), how many original tokens each one stands for, and which one for which.

    Raises:
        TypeError: the model is not patched.
    """
    encoder: Any = next((m for m in model.modules() if isinstance(m, MergingEncoder)), None)
    if encoder is None:
        raise TypeError(f"model: expected one patched by fpet.huggingface.apply, got {type(model).__name__}")
    output = encoder(pixel_values, keep_merged=True, return_dict=True, **options)
    return MergedFeatures(output.last_hidden_state, output.size, output.source)


def find_vision_encoder(model: nn.Module) -> nn.Module:
    """The one vision encoder in ``model`` that merging is known for.

    Raises:
        TypeError: there is none, there are several, or a data-parallel wrapper is around it.
    """
    refuse_wrapped(model, "fpet.huggingface.apply", new_parameters=False)
    found = [m for m in model.modules() if ENCODERS.known(m) or isinstance(m, MergingEncoder)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        raise TypeError(f"model: {name} holds {len(found)} vision encoders; call fpet.huggingface.apply on each")
    for module in model.modules():
        if (base := ENCODERS.base_of(type(module))) is not None:
            what = f"{type(module).__name__} is a subclass of {base.__name__}, and what it changes there is unknown"
            raise TypeError(f"model: {name} can't be merged: {what}")
    raise TypeError(f"model: {name} can't be merged: no knowledge of a vision encoder in it; known are {ENCODERS.names()}")


def _parts(encoder: Any) -> list[nn.Module]:
    blocks = vision_layers(encoder)
    return [encoder, *blocks, *(attention_of(block) for block in blocks)]


def _around(model: nn.Module, encoder: nn.Module) -> list[nn.Module]:
    """What else in ``model`` has to know that ``encoder`` merges: the model it belongs to, and BLIP's cross-attentions."""
    found: list[nn.Module] = []
    for holder in model.modules():
        if _HOLDERS.known(holder) and holder.vision_model is encoder:
            found.append(holder)
            if isinstance(holder, modeling_blip.BlipForImageTextRetrieval):
                blocks = holder.text_encoder.encoder.layer
                found += [block.crossattention.self for block in blocks if hasattr(block, "crossattention")]
    return found


def _check_structure(encoder: Any, layers: tuple[int, ...], attention: str | None) -> None:
    name = type(encoder).__name__
    for part in _parts(encoder):
        if not (ENCODERS | _INNER).known(part):
            raise TypeError(f"model: {name} can't be merged: no knowledge of {type(part).__name__}")
    how = attention or encoder.config._attn_implementation
    if how not in _IMPLEMENTATIONS:
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
    inner = attention_of(block)
    return inner.head_dim if hasattr(inner, "head_dim") else inner.attention_head_size
