"""The model of a run: backbone, adapters, reduction of tokens, and what of it is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import comparators
from ..adapters import add_adapters
from ..adapters.freezing import freeze, parameter_roles
from ..files import saving
from ..files.loading import LoadedModel, load_model
from ..files.modelfile import read_file
from ..vit.patch import find_model
from . import pretrain
from .config import EMBEDDED_MODEL, Config, ConfigError
from .folder import MODEL, SETTINGS

__all__ = [
    "build_model", "embedded_weights", "finished", "freeze_for", "load_run", "load_tuned", "reduce_tokens", "rehearse",
]  # fmt: skip


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


def finished(folder: str | Path, **changes: Any) -> Config:
    """The settings of a finished run, wherever its folder is now.

    A file of weights that is not where it was is looked for in the folder and in the one around it.

    Args:
        changes: settings that differ.

    Raises:
        FileNotFoundError: the folder holds no finished run. ConfigError: its settings are damaged, or there is no such setting.
    """
    folder = Path(folder)
    for name in (SETTINGS, MODEL):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder: expected a finished run with {name}, got {folder}")
    config = Config.from_json((folder / SETTINGS).read_text(encoding="utf-8"))
    if config.weights is not None and not Path(config.weights).is_file():
        near = [place / Path(config.weights).name for place in (folder, folder.absolute().parent)]
        config = dataclasses.replace(config, weights=next((str(p) for p in near if p.is_file()), config.weights))
    return dataclasses.replace(config, output=str(folder), **changes)


def load_run(folder: str | Path, *, weights: str | Path | None = None) -> LoadedModel:
    """The model, the transform and the class names of a finished run; its folder may have been moved or copied.

    Args:
        folder: ``output`` of the run. weights: the backbone's file, where it is neither where it was nor in the folder.

    Raises:
        FileNotFoundError: the run has not finished, or the backbone's weights are not there. ValueError: a file is damaged, or
            does not fit.
    """
    config = finished(folder, **({} if weights is None else {"weights": str(weights)}))
    path = Path(folder) / MODEL
    header, _ = read_file(path)
    if config.model == EMBEDDED_MODEL or config.weights is not None:
        file = embedded_weights(config) if config.model == EMBEDDED_MODEL else Path(str(config.weights))
        if not file.is_file():
            raise FileNotFoundError(f"weights: expected the backbone of {folder} in {file}; pass weights=FILE")
    return load_model(path, _backbone(config, header["num_classes"]))


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
