"""The file of a tuned model: safetensors whose metadata entry ``fpet`` is JSON, and whose quantised weights are packed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..layers.quantize import QuantizedLinear, latent_weight, pack, unpack

__all__ = ["VERSION", "assign", "digest_of", "dtype_name", "packed_or_none", "quantized_layers", "read_file", "unpacked"]

VERSION = 2
"""1 held parameters alone, and no description of the backbone; it is still read."""


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of ours, checked as far as they can be without a model."""
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file written by fpet.save, got {path}, which is no file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"path: expected a file written by fpet.save, got {path}, damaged or not safetensors: {error}"
        ) from error
    if "fpet" not in metadata:
        raise ValueError(f"path: expected a file written by fpet.save, got {path}, safetensors of another kind")
    try:
        header = json.loads(metadata["fpet"])
        version = header["version"]
        if version not in (1, VERSION):
            raise ValueError(f"path: expected format version 1 or {VERSION}, got {version} in {path}")
        if header["tensors_sha256"] != digest_of(tensors):
            raise ValueError(f"path: {path} is damaged: its tensors are not those that were written")
        AdapterConfig(**header["adapter"])
        for key in ("merge", "num_classes", "backbone", "packed"):
            header[key]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: the header of {path} is damaged: {type(error).__name__}: {error}") from error
    return header, tensors


def unpacked(
    wanted: dict[str, Tensor], tensors: dict[str, Tensor], packed: dict[str, Any], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """A value for every parameter wanted; ValueError where names or shapes differ."""
    if wanted.keys() != tensors.keys():
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"path: {path} lacks {missing or 'nothing'} and has {extra or 'nothing'} besides what the model takes")
    values = {}
    for name, tensor in tensors.items():
        shape = wanted[name].shape
        if (entry := packed.get(name)) is not None:
            codes, mean, std = unpack(tensor, entry["shape"], entry["bits"])
            tensor = latent_weight(codes, mean, std, entry["bits"]).to(getattr(torch, entry["dtype"]))
        if tensor.shape != shape:
            raise ValueError(f"path: expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)} in {path}")
        values[name] = tensor
    return values


@torch.no_grad()
def assign(targets: Mapping[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copies each value into the parameter or buffer of its name."""
    for name, value in values.items():
        targets[name].copy_(value)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, as hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """By the name of their weight."""
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def packed_or_none(weight: Tensor, bits: int) -> Tensor | None:
    """The packed weight; None if training could not go on from it, so that it has to be stored as it is."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return None  # rounding the latent weight would move its mean and std
    data = pack(weight, bits)
    codes, mean, std = unpack(data, weight.shape, bits)
    try:
        again = pack(latent_weight(codes, mean, std, bits).to(weight.dtype), bits)
    except ValueError:
        return None
    return data if torch.equal(again[:-8], data[:-8]) else None
