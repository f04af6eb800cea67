"""A tuned model, its transform and its class names from the file alone: :func:`load_model`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from ..data.preprocessing import Preprocessing
from .modelfile import read_file
from .saving import load

__all__ = ["LoadedModel", "load_model"]


class LoadedModel(NamedTuple):
    """What :func:`load_model` and :func:`fpet.load_run` return.

    Attributes:
        model: in evaluation mode. transform: from a PIL image to a tensor (channels, height, width). class_names: by label, or
            None where nobody gave them. metadata: texts that were saved with it.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    class_names: tuple[str, ...] | None
    metadata: Mapping[str, str]


def load_model(path: str | os.PathLike[str], backbone: nn.Module | str | os.PathLike[str] | None = None) -> LoadedModel:
    """The model that :func:`fpet.save` wrote, ready for use: the file says which of timm's backbones it needs, and how images
    are prepared for it.

    >>> model, transform, names, _ = fpet.load_model("flowers.safetensors")
    >>> scores = model(transform(Image.open("rose.jpg").convert("RGB"))[None])

    Args:
        path: of the file.
        backbone: None: timm's pre-trained weights, from its cache or the network. Else a file with the backbone's weights, or
            the bare backbone itself, which then becomes the tuned model; needed for a backbone that timm has no name for.

    Raises:
        ValueError: as :func:`fpet.load` does; or the file names no backbone of timm's, and none was given. OSError: a file, or
            the network, can't be reached; the message says which weights are missing.
    """
    header, _ = read_file(Path(path))
    if not isinstance(backbone, nn.Module):
        backbone = _backbone(header, path, None if backbone is None else Path(backbone))
    model = load(backbone, path).eval()
    values = header.get("preprocessing")
    preprocessing = Preprocessing.of(model) if values is None else Preprocessing.from_dict(values)
    names = header.get("class_names")
    return LoadedModel(
        model, preprocessing.transform(), None if names is None else tuple(names), dict(header.get("metadata") or {})
    )


def _backbone(header: dict[str, Any], path: str | os.PathLike[str], weights: Path | None) -> nn.Module:
    said = header["backbone"]
    tag = said.get("tag")
    name = said["name"]
    if tag is None or not timm.is_model(name):
        raise ValueError(
            f"backbone: {path} was tuned on {name}, which timm has no name for; pass the bare backbone: "
            "load_model(path, backbone)"
        )
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"backbone: expected a file with the weights of {tag}, got {weights}")
    arguments: dict[str, Any] = {"num_classes": header["num_classes"], "in_chans": said["channels"]}
    if said["image_size"] is not None:
        arguments["img_size"] = tuple(said["image_size"])
    if said["global_pool"] is not None:
        arguments["global_pool"] = said["global_pool"]
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if weights is not None:
        arguments["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        return timm.create_model(tag, pretrained=True, **arguments)
    except Exception as error:  # the hub's client, its cache and the network each have their own
        raise OSError(
            f"backbone: {path} needs timm's weights {tag}, which can't be had here ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); fetch them where there is a network and pass the file: "
            "load_model(path, backbone=FILE)"
        ) from error
