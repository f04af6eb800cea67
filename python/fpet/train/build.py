"""The model of a run: backbone, adapters, reduction of tokens, and what of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import comparators
from ..adapters import add_adapters
from ..adapters.freezing import freeze, parameter_roles
from ..files import saving
from ..vit.patch import find_model
from . import pretrain
from .config import EMBEDDED_MODEL, Config, ConfigError
from .folder import MODEL

__all__ = ["build_model", "embedded_weights", "freeze_for", "load_tuned", "reduce_tokens", "rehearse"]


def _backbone(config: Config, num_classes: int) -> nn.Module:
    """With weights and a fresh head."""
    if config.model == EMBEDDED_MODEL:
        return pretrain.load_backbone(embedded_weights(config), num_classes, config.drop_path)
    load = config.pretrained and config.weights is None
    model = _create(config, num_classes, load)
    if config.weights is not None and config.weights.endswith(".npz"):
        model.load_pretrained(config.weights)  # published JAX weights; timm leaves out a head of another size
    elif config.weights is not None:
        state = timm.models.load_state_dict(config.weights, use_ema=False)
        own = model.state_dict()
        state = {n: v for n, v in state.items() if not n.startswith("head") or (n in own and own[n].shape == v.shape)}
        missing, extra = model.load_state_dict(state, strict=False)
        if extra or any(not name.startswith("head") for name in missing):
            raise ValueError(f"weights: {config.weights} lacks {missing} and has {extra} besides what {config.model} takes")
    return model


def _create(config: Config, num_classes: int, pretrained: bool) -> Any:
    return timm.create_model(
        config.model, pretrained=pretrained, num_classes=num_classes, drop_path_rate=config.drop_path,
        img_size=config.image_size,
    )  # fmt: skip


def embedded_weights(config: Config) -> Path:
    """The file of the embedded backbone."""
    return Path(config.weights) if config.weights is not None else Path(config.output) / pretrain.FILE


def _prepare(model: nn.Module, config: Config) -> nn.Module:
    """Adapters, the reduction of tokens, and what is trained."""
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    add_adapters(
        model, config.method, hidden_dim=config.hidden_dim, scale=config.scale, bits=config.bits, dropout=config.dropout
    )
    return freeze_for(reduce_tokens(model, config), config)


def reduce_tokens(model: nn.Module, config: Config) -> nn.Module:
    """Switches on ``config.reduction``; a refinement that is there stays."""
    refinement = {"dropout": config.refinement_dropout}
    depth = len(find_model(model).blocks)  # type: ignore[arg-type]
    layer = depth // 2 if config.layer is None else config.layer
    if layer >= depth:
        raise ConfigError(f"layer: expected a block index in range({depth}), got {layer}")
    return comparators.apply_reduction(
        model, config.reduction, layer, r=config.tome_r, refinement=refinement, target=config.ltmp_target
    )  # fmt: skip


def freeze_for(model: nn.Module, config: Config) -> nn.Module:
    """:func:`fpet.freeze`, and the refinement too where ``config.refine`` is off."""
    freeze(model)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] == "refinement" and not config.refine:
            parameter.requires_grad_(False)
    return model


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The backbone with pre-trained weights, a fresh head, adapters and reduction of tokens; what is not tuned is frozen.

    The embedded backbone has to be pre-trained already: ``config.weights``, or ``backbone.safetensors`` in ``config.output``.
    """
    return _prepare(_backbone(config, num_classes), config)


def load_tuned(config: Config, num_classes: int) -> nn.Module:
    """The model that a finished run left in its folder, reducing tokens as ``config`` says."""
    model = saving.load(_backbone(config, num_classes), Path(config.output) / MODEL)
    return reduce_tokens(model, config)


def rehearse(config: Config) -> None:
    """Whatever is wrong with model, layer, method and reduction shows on a model without weights."""
    try:
        if config.model == EMBEDDED_MODEL:
            with torch.random.fork_rng(devices=[]):
                _prepare(pretrain.embedded_backbone(2, config.drop_path), config)
            return
        if not timm.is_model(config.model):
            raise ConfigError(f"model: expected {EMBEDDED_MODEL!r} or a model that timm knows, got {config.model!r}")
        with torch.device("meta"):
            reduce_tokens(_create(config, 2, pretrained=False), config)
    except ConfigError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(str(error)) from error
