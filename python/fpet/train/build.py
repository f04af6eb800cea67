"""The model of a run: backbone, adapters, reduction of tokens, and what of it is trained."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .. import comparators
from ..adapters import add_adapters
from ..adapters.freezing import freeze, parameter_roles
from ..files import saving
from ..files.atomic import write_atomically
from ..files.fetching import one_attempt
from ..files.loading import LoadedModel, load_model
from ..files.modelfile import read_file
from ..vit.patch import find_model
from . import pretrain
from .config import EMBEDDED_MODEL, Config, ConfigError
from .folder import MODEL, SETTINGS

__all__ = [
    "backbone", "build_model", "embedded_weights", "finished", "freeze_for", "keep_backbone", "load_run", "load_tuned",
    "load_weights", "prepare", "reduce_tokens", "rehearse",
]  # fmt: skip


def backbone(config: Config, num_classes: int) -> nn.Module:
    """The bare model with weights and a fresh head.

    Raises:
        ConfigError: weights that can't be had, or are of another model.
    """
    if config.model == EMBEDDED_MODEL:
        return pretrain.load_backbone(embedded_weights(config), num_classes, config.drop_path)
    if config.weights is not None or not config.pretrained:
        model = _create(config, num_classes, pretrained=False)
        if config.weights is not None:
            load_weights(model, Path(config.weights))
        return model
    try:
        with one_attempt():
            return _create(config, num_classes, pretrained=True)
    except (OSError, RuntimeError) as error:  # huggingface_hub's and urllib's are OSErrors; timm has a RuntimeError
        known = timm.models.get_pretrained_cfg(config.model)
        if not known.has_weights:
            raise ConfigError(
                f"model: timm has no pre-trained weights of {config.model}; pass --weights FILE or --no-pretrained"
            ) from error
        file = (
            f"model.safetensors of {known.hf_hub_id} on the Hugging Face Hub"
            if known.hf_hub_id
            else str(known.url or known.file)
        )
        raise ConfigError(
            f"model: the weights of {config.model} can't be fetched ({_first_line(error)}); fetch {file} where there is a "
            "network, and pass it by --weights FILE"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].partition(". ")[0]


def load_weights(model: Any, path: Path) -> None:
    """Gives ``model`` a file of weights as timm would: position embeddings and patches of another size are resampled.

    A head of another number of classes stays as it is. ``.npz`` is JAX's, as published with ViT.

    Raises:
        ConfigError: no file of weights, or of another model.
    """
    try:
        if path.suffix in (".npz", ".npy"):
            model.load_pretrained(str(path))  # timm leaves out a head of another size
            return
        state: Any = timm.models.load_state_dict(str(path), use_ema=False)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            state = convert(state, model)
    except Exception as error:  # pickle, zip, safetensors, numpy and timm each have their own
        raise ConfigError(
            f"weights: {path} can't be read as weights of this model: {type(error).__name__}: {_first_line(error)}"
        ) from error
    own, classifier = model.state_dict(), model.pretrained_cfg.get("classifier") or "head"
    head = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    of_head = {n for n in {*state, *own} if n.startswith(tuple(f"{h}." for h in head))}
    state = {n: v for n, v in state.items() if n not in of_head or (n in own and own[n].shape == v.shape)}
    missing, extra = sorted(own.keys() - state.keys() - of_head), sorted(state.keys() - own.keys())
    if missing or extra:
        raise ConfigError(
            f"weights: {path} is of another model: it lacks {_some(missing)} and has {_some(extra)} besides what this one takes"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ConfigError(
                f"weights: {path} is of another model: expected {name} of the shape {tuple(own[name].shape)}, got "
                f"{tuple(value.shape)}"
            )
    model.load_state_dict(state, strict=False)


def _some(names: list[str]) -> str:
    return "nothing" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def keep_backbone(model: nn.Module, config: Config) -> None:
    """Writes the bare ``model`` into the run's folder where it could not be had again otherwise, for :func:`load_tuned`."""
    path = Path(config.output) / pretrain.FILE
    if config.model == EMBEDDED_MODEL:
        if config.weights is not None and path.absolute() != Path(config.weights).absolute():
            write_atomically(path, Path(config.weights).read_bytes())
    elif config.keep_backbone and (config.weights is not None or not config.pretrained):
        state = {n: v.detach().cpu().contiguous() for n, v in model.state_dict().items() if not n.startswith("head")}
        write_atomically(path, safetensors_bytes(state))
    else:
        path.unlink(missing_ok=True)


def _create(config: Config, num_classes: int, pretrained: bool) -> Any:
    return timm.create_model(
        config.model,
        pretrained=pretrained,
        num_classes=num_classes,
        drop_path_rate=config.drop_path,
        img_size=config.image_size,
    )


def embedded_weights(config: Config) -> Path:
    """The file of the embedded backbone."""
    return Path(config.weights) if config.weights is not None else Path(config.output) / pretrain.FILE


def prepare(model: nn.Module, config: Config) -> nn.Module:
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
    )


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
    return prepare(backbone(config, num_classes), config)


def load_tuned(config: Config, num_classes: int) -> nn.Module:
    """The model that a finished run left in its folder, reducing tokens as ``config`` says."""
    model = saving.load(backbone(config, num_classes), Path(config.output) / MODEL)
    return reduce_tokens(model, config)


def finished(folder: str | Path, **changes: Any) -> Config:
    """The settings of a finished run, wherever its folder is now.

    Frozen weights in the folder come before the file that they were read from. Where neither is there, a file of that name is
    looked for in the folder around it.

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
    if (folder / pretrain.FILE).is_file():
        config = dataclasses.replace(config, weights=str(folder / pretrain.FILE))
    elif config.weights is not None and not Path(config.weights).is_file():
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
    return load_model(path, backbone(config, header["num_classes"]))


def rehearse(config: Config) -> None:
    """Whatever is wrong with model, layer, method and reduction shows on a model without weights."""
    try:
        if config.model == EMBEDDED_MODEL:
            with torch.random.fork_rng(devices=[]):
                prepare(pretrain.embedded_backbone(2, config.drop_path), config)
            return
        with torch.device("meta"):
            try:
                model = _create(config, 2, pretrained=False)
            except TypeError as error:  # timm's other architectures take no img_size
                raise TypeError(f"{error}; fpet tunes vision transformers") from error
            prepare(model, config)
    except ConfigError:
        raise
    except TypeError as error:
        raise ConfigError(f"model: {config.model!r} can't be tuned here: {error}") from error
    except (ValueError, IndexError, NotImplementedError) as error:
        raise ConfigError(str(error)) from error
