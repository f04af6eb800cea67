"""What a backbone is: written into files, and compared when one is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from ..data.preprocessing import Preprocessing, input_channels
from .modelfile import dtype_name

__all__ = ["Description", "describe", "first_difference", "fresh_names", "short_digests"]


@dataclass(frozen=True)
class Description:
    """What a backbone is.

    Attributes:
        name: timm's of the architecture, or the class's. tag: timm's of the pre-trained weights, behind the name, or None.
        image_size: (height, width) in pixels, or None where images may have any. patch_size, channels, width, depth: of the
            model. global_pool: how the head pools. dtype: of the first parameter. preprocessing: what timm knows, or None.
    """

    name: str
    tag: str | None
    image_size: tuple[int, int] | None
    patch_size: tuple[int, int] | None
    channels: int | None
    width: int | None
    depth: int | None
    global_pool: str | None
    dtype: str
    preprocessing: dict[str, Any] | None

    def backbone(self) -> dict[str, Any]:
        """All but the preprocessing, as JSON has it."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        del values["preprocessing"]
        return values


def describe(model: Any) -> Description:
    """What can be read from the model."""
    config = pretrained_config(model)
    name = config.get("architecture") or type(model).__name__.removeprefix("FPET").replace("Reduced", "")
    tag = f"{name}.{config['tag']}" if config.get("architecture") and config.get("tag") else config.get("architecture")
    embed = getattr(model, "patch_embed", None)
    return Description(
        name=name, tag=tag, image_size=_pair(getattr(embed, "img_size", None)),
        patch_size=_pair(getattr(embed, "patch_size", None)), channels=input_channels(model),
        width=getattr(model, "embed_dim", None),
        depth=len(model.blocks), global_pool=getattr(model, "global_pool", None),
        dtype=dtype_name(next(model.parameters()).dtype),
        preprocessing=Preprocessing.of(model).asdict() if config.get("architecture") else None,
    )  # fmt: skip


def pretrained_config(model: Any) -> dict[str, Any]:
    """timm's configuration of the pre-trained model, empty where there is none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def fresh_names(model: Any) -> frozenset[str] | None:
    """The parameters of timm's own model of this architecture; None where timm does not know it."""
    name = pretrained_config(model).get("architecture")
    if not name or not timm.is_model(name):
        return None
    with torch.device("meta"):
        return frozenset(n for n, _ in timm.create_model(name, pretrained=False).named_parameters())


def short_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Eight hex digits for each tensor's dtype, shape and values: enough to find the one that differs."""
    return {
        name: hashlib.blake2b(
            t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),  # type: ignore[arg-type]
            key=f"{dtype_name(t.dtype)} {tuple(t.shape)}".encode()[:64],
            digest_size=4,
        ).hexdigest()
        for name, t in tensors.items()
    }


def first_difference(theirs: Mapping[str, Any], ours: Description, tensors: Mapping[str, str]) -> str:
    """Where a backbone first differs from the one that a file was written for; empty where the file doesn't say.

    Args:
        theirs: the header's description. ours: of the model at hand. tensors: its :func:`short_digests`.
    """
    mine = ours.backbone()
    for key in ("name", "image_size", "patch_size", "channels", "width", "depth", "dtype"):
        if key in theirs and theirs[key] != mine[key]:
            return f": expected {key.replace('_', ' ')} {theirs[key]}, got {mine[key]}"
    known = theirs.get("tensors")
    if known is None:
        return ""
    for name, digest in known.items():
        if name not in tensors:
            return f": the model has no {name}"
        if tensors[name] != digest:
            return f": {name} has another shape or other values"
    extra = next((name for name in tensors if name not in known), None)
    return "" if extra is None else f": the model also has {extra}"
