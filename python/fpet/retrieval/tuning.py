"""What is tuned of a BLIP: merging, UniAdapters and heads, and the file of it."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .. import huggingface
from ..adapters.freezing import freeze as freeze_backbone
from ..files.atomic import write_atomically
from ..files.modelfile import digest_of
from .config import RetrievalConfig
from .uniadapter import add_uniadapters

__all__ = ["freeze", "frozen_digest", "load_tuned", "prepare", "save_tuned", "tuned_parameters"]

_HEADS = ("vision_proj", "text_proj", "itm_head")


def prepare(model: nn.Module, config: RetrievalConfig) -> nn.Module:
    """Merging, UniAdapters and what is trained, on a bare BlipForImageTextRetrieval. Returns ``model``."""
    depth = len(huggingface.vision_layers(huggingface.find_vision_encoder(model)))
    layer = depth // 2 if config.layer is None else config.layer
    huggingface.apply(
        model,
        layer if config.merge else None,
        refinement=True if config.merge and config.refine else None,
        attention=config.attention,
    )
    add_uniadapters(model, config.adapter_dim, scale=config.adapter_scale, key_value_dim=config.key_value_dim)
    if config.grad_checkpointing:
        # Re-entrant checkpointing gives no gradient behind frozen inputs; and transformers 5's public switch asks for one at
        # the word embeddings, to which BLIP adds in place.
        model._set_gradient_checkpointing(  # type: ignore[operator]
            enable=True, gradient_checkpointing_func=partial(torch_checkpoint, use_reentrant=False)
        )
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """Leaves adapters, refinement, the two projections and the matching head trainable. Returns ``model``."""
    freeze_backbone(model)
    for name in _HEADS:
        getattr(model, name).requires_grad_(True)
    return model


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of what is not tuned."""
    return digest_of({name: p for name, p in model.named_parameters() if not p.requires_grad})


def save_tuned(model: nn.Module, path: str | Path, config: RetrievalConfig) -> None:
    """Writes the tuned parameters, the settings and a checksum of the frozen ones as a safetensors file."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in tuned_parameters(model).items()}
    header = {"config": dataclasses.asdict(config), "frozen_sha256": frozen_digest(model)}
    write_atomically(Path(path), safetensors_bytes(tensors, metadata={"fpet_retrieval": json.dumps(header)}))


def load_tuned(model: nn.Module, path: str | Path) -> RetrievalConfig:
    """Prepares the bare ``model`` and gives it what :func:`save_tuned` wrote. Returns the settings.

    Raises:
        ValueError: another kind of file, or one tuned on other weights. FileNotFoundError: no file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file written by save_tuned, got {path}, which is no file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        header = json.loads(metadata["fpet_retrieval"])
        config, frozen = RetrievalConfig(**header["config"]), header["frozen_sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a file written by save_tuned, got {path}: {error}") from error
    prepare(model, config)
    tuned = tuned_parameters(model)
    if tuned.keys() != tensors.keys() or any(tuned[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ValueError(f"model: {path} was tuned on a model with other layers or widths")
    if frozen_digest(model) != frozen:
        raise ValueError(f"model: {path} was tuned on other frozen weights")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tuned[name].copy_(tensor)
    return config
