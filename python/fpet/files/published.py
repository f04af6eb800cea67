"""Checkpoints that others published: of PETL-ViT's binary adapters, and of the authors' FPET code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attaching import transformer_blocks
from ..adapters.freezing import parameter_roles
from ..layers.quantize import QuantizedLinear, latent_weight, levels, packed_size, unpack
from .modelfile import assign, quantized_layers, unpacked

__all__ = ["import_authors", "import_petl_vit"]


def import_petl_vit(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads a checkpoint of PETL-ViT's binary adapters (``…-bit1-dim32.bin``) into a model prepared for it.

    The file has no header. It holds the quantised layers in the order of the blocks (LoRA of q, of v, or AdaptFormer; down,
    then up), each codes, least significant bits first, then float32 mean and std; then head weight and bias in float32, or
    for the ``-bihead`` runs a one-bit head without bias. All little-endian.

    Args:
        model: after :func:`fpet.add_adapters` with the run's method, dimension, bits and scale, and ``reset_classifier``.
        path: of the file.

    Returns:
        model, computing with the published weights. A one-bit head becomes a plain one with a bias of zero.

    Raises:
        ValueError: the file's size fits neither form of the model, its contents are no numbers, or the model is not prepared.
            The model is then as it was.
    """
    data = _file_bytes(path)
    layers = _published_order(model, refinement=False)
    if not layers:
        raise ValueError("model: expected quantised adapters: fpet.add_adapters(model, 'bi-adaptformer' or 'bi-lora') first")
    head: Any = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"model: expected a linear head, got {type(head).__name__}: reset_classifier(num_classes) first")
    adapters = sum(packed_size(layer.weight.numel(), layer.bits) for _, layer in layers)
    weight, classes = head.weight, head.out_features
    plain, binary = 4 * (weight.numel() + classes), packed_size(weight.numel(), 1)
    if data.numel() not in (adapters + plain, adapters + binary):
        raise ValueError(
            f"path: expected {adapters} bytes of adapters and {plain} of head (or {binary} of a one-bit head) for {classes} "
            f"classes, got {data.numel()} in {path}"
        )
    values, rest = _take_packed(data, layers, path)
    names = {id(p): name for name, p in model.named_parameters()}
    if rest.numel() == plain:
        numbers = _floats(rest)
        values[names[id(weight)]] = numbers[: weight.numel()].view(weight.shape)
        bias = numbers[weight.numel() :]
    else:
        codes, mean, std = unpack(rest, weight.shape, 1)
        values[names[id(weight)]] = torch.tensor(levels(1))[codes] * std + mean
        bias = torch.zeros(classes)
    if head.bias is not None:
        values[names[id(head.bias)]] = bias
    elif bias.any():
        raise ValueError("model: expected a head with a bias, got one without")
    _check_finite(values, path)
    assign(dict(model.named_parameters()), values)
    return model


def import_authors(model: nn.Module, stem: str | os.PathLike[str]) -> nn.Module:
    """Reads a checkpoint of the authors' FPET code, ``STEM.bin`` and ``STEM.pth``, into a model prepared for it.

    ``.bin`` holds the quantised layers, block by block: LoRA of q, of v, AdaptFormer, refinement; each as in
    :func:`import_petl_vit`. ``.pth`` holds the other adapters and the head, as a state_dict.

    Args:
        model: after :func:`fpet.add_adapters`, ``reset_classifier`` and :func:`fpet.apply` with the run's settings and its
            refinement. stem: the files' path without ``.bin`` and ``.pth``.

    Returns:
        model, computing with the published weights.

    Raises:
        ValueError: a size, name or shape does not fit the model, or a file is damaged. FileNotFoundError: one is missing. The
            model is then as it was.
    """
    binary, state = Path(f"{os.fspath(stem)}.bin"), Path(f"{os.fspath(stem)}.pth")
    layers = _published_order(model, refinement=True)
    roles = parameter_roles(model)
    values: dict[str, Tensor] = {}
    if layers:
        data = _file_bytes(binary)
        expected = sum(packed_size(layer.weight.numel(), layer.bits) for _, layer in layers)
        if data.numel() != expected:
            raise ValueError(
                f"path: expected {expected} bytes of {len(layers)} quantised layers, got {data.numel()} in {binary}"
            )
        values, _ = _take_packed(data, layers, binary)
    wanted: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if roles[name] != "backbone" and name not in values
    }
    if wanted:
        values |= unpacked(wanted, _read_pth(state), {}, state)
    _check_finite(values, stem)
    assign(dict(model.named_parameters()), values)
    return model


def _file_bytes(path: str | os.PathLike[str]) -> Tensor:
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"path: {path} is empty")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _floats(data: Tensor) -> Tensor:
    """float32 numbers from little-endian bytes."""
    return torch.from_numpy(data.numpy().view("<f4").astype("=f4"))


def _read_pth(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"stem: expected a file {path}, as the model has parameters that it holds")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"path: {path} is damaged or no state_dict: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) and v.is_floating_point() for v in state.values()):
        raise ValueError(f"path: expected a state_dict in {path}, got {type(state).__name__} with other things than weights")
    return state


def _published_order(model: nn.Module, *, refinement: bool) -> list[tuple[str, QuantizedLinear]]:
    """Quantised layers in the order in which both published programs write them, whatever order ours were added in."""
    slots = ("attn.lora_q", "attn.lora_v", "adapter_mlp", *(("refinement",) if refinement else ()))
    found = quantized_layers(model)
    names = [
        f"blocks.{i}.{slot}.{layer}.weight"
        for i in range(len(transformer_blocks(model)))
        for slot in slots
        for layer in ("adapter_down", "adapter_up")
    ]
    ordered = [(name, found[name]) for name in names if name in found]
    for name, layer in ordered:
        if layer.bits == 8:
            raise ValueError("model: expected 1, 2 or 4 bits: the published programs use 8-bit levels of their own, got 8")
        if layer.weight.numel() * layer.bits % 8:
            raise ValueError(f"model: {name} does not fill whole bytes, and the published programs drop the rest of its codes")
    return ordered


def _take_packed(
    data: Tensor, layers: list[tuple[str, QuantizedLinear]], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Latent weights by name, and the bytes behind them."""
    values = {}
    for name, layer in layers:
        length = packed_size(layer.weight.numel(), layer.bits)
        try:
            codes, mean, std = unpack(data[:length], layer.weight.shape, layer.bits)
            values[name] = latent_weight(codes, mean, std, layer.bits)
        except ValueError as error:
            raise ValueError(f"path: {path} is damaged at {name}: {error}") from error
        data = data[length:]
    return values, data


def _check_finite(values: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"path: expected finite numbers, got others for {name} in {path}")
