"""Files of what was tuned: :func:`save` and :func:`load` (safetensors), and the import of two published formats.

A file of ours is a safetensors file. Its metadata entry ``fpet`` is JSON: format version; adapter and merging settings;
number of classes; name and SHA-256 of the frozen backbone; shape and bits of each quantised weight; SHA-256 of the tensors.
Its tensors are what :func:`fpet.freeze` leaves trainable, by name; a quantised weight is uint8 as
:func:`fpet.layers.quantize.pack` makes it: codes, least significant bits first, then float32 mean and std.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..adapters import AdapterConfig, add_adapters
from ..adapters.freezing import head_modules, parameter_roles
from ..adapters.methods import transformer_blocks
from ..comparators.ltmp import Thresholds
from ..layers.quantize import QuantizedLinear, latent_weight, levels, pack, packed_size, unpack
from ..layers.refinement import KeyRefinement
from ..vit.config import MergeConfig
from ..vit.patch import apply

__all__ = ["backbone_hash", "import_authors", "import_petl_vit", "load", "save"]

_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes everything :func:`load` needs to rebuild the tuned model on the same backbone, without the backbone.

    Quantised weights are stored packed: what the model computes comes back up to float32 rounding of the mean and the
    standard deviation; the latent weights behind the codes do not. The file appears under its name only when it is
    complete: a crash leaves the old one.

    Args:
        model: after :func:`fpet.add_adapters` and, or, :func:`fpet.apply`.
        path: of the file; its folder must exist.

    Raises:
        TypeError: a timm model was expected.
    """
    transformer_blocks(model)
    roles = parameter_roles(model)
    quantized = _quantized_layers(model)
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if roles[name] == "backbone":
            continue
        data = parameter.detach().cpu().contiguous()
        layer = quantized.get(name)
        if layer is not None and (codes := _packed_or_none(data, layer.bits)) is not None:
            packed[name] = {"shape": list(data.shape), "bits": layer.bits, "dtype": _dtype_name(data.dtype)}
            data = codes
        tensors[name] = data
    config: AdapterConfig = getattr(model, "adapter_config", None) or AdapterConfig("none")
    header = {
        "version": _VERSION,
        "adapter": dataclasses.asdict(config),
        "merge": _merge_settings(model),
        "num_classes": getattr(model, "num_classes", None),
        "backbone": {"name": _backbone_name(model), "sha256": backbone_hash(model)},
        "packed": packed,
        "tensors_sha256": _digest(tensors),
    }
    _write_atomically(Path(path), safetensors_bytes(tensors, metadata={"fpet": json.dumps(header)}))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Makes the bare backbone ``model`` the tuned model that :func:`save` wrote: adapters, merging, refinement and head.

    Args:
        model: the backbone it was tuned on, without adapters and merging; its head may have another number of classes.
        path: of the file.

    Returns:
        model, with all that was tuned; call :func:`fpet.freeze` to tune on.

    Raises:
        ValueError: not a file of ours, a damaged one, or one for another backbone; or the model has adapters or merges.
            TypeError: the model is no timm vision transformer. OSError: the file can't be read. The model is then as it was.
    """
    transformer_blocks(model)
    if getattr(model, "adapter_config", None) is not None or getattr(model, "fpet_config", None) is not None:
        raise ValueError("model: expected a bare backbone, got one with adapters or merging: fpet.remove_adapters, fpet.remove")
    header, tensors = read_file(Path(path))
    config = AdapterConfig(**header["adapter"])
    backbone = header["backbone"]
    if (found := backbone_hash(model, config.method)) != backbone["sha256"]:
        raise ValueError(
            f"model: {path} was tuned on the backbone {backbone['name']} with frozen weights {backbone['sha256'][:12]}…, "
            f"got {_backbone_name(model)} with {found[:12]}…"
        )
    # A dress rehearsal without memory: everything that can be wrong is found before the model is touched.
    rehearsal = _rebuild(_meta_copy(model), header, config)
    roles = parameter_roles(rehearsal)
    wanted = {name: p for name, p in rehearsal.named_parameters() if roles[name] != "backbone"}
    values = _check_and_unpack(wanted, tensors, header["packed"], path)
    _rebuild(model, header, config)
    _assign(model, values)
    return model


def backbone_hash(model: nn.Module, method: str | None = None) -> str:
    """SHA-256, as hex digits, of names, shapes, dtypes and values of the frozen parameters and the saved buffers.

    Args:
        method: whose frozen parameters; None takes that of the model's own adapters. Folded or cast weights are others.
    """
    roles = parameter_roles(model, method)
    frozen: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if roles[name] == "backbone"}
    kept = model.state_dict()
    frozen |= {name: b for name, b in model.named_buffers() if name in kept}
    return _digest(frozen)


# --- writing and reading ---------------------------------------------------------------------------------------------


def _write_atomically(path: Path, data: bytes) -> None:
    # Beside the target, as a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
        if version != _VERSION:
            raise ValueError(f"path: expected format version {_VERSION}, got {version} in {path}")
        if header["tensors_sha256"] != _digest(tensors):
            raise ValueError(f"path: {path} is damaged: its tensors are not those that were written")
        AdapterConfig(**header["adapter"])
        for key in ("merge", "num_classes", "backbone", "packed"):
            header[key]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: the header of {path} is damaged: {type(error).__name__}: {error}") from error
    return header, tensors


def _check_and_unpack(
    wanted: dict[str, nn.Parameter], tensors: dict[str, Tensor], packed: dict[str, Any], path: str | os.PathLike[str]
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
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {_dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the model's side ------------------------------------------------------------------------------------------------


def _backbone_name(model: Any) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return name or type(model).__name__.removeprefix("FPET")


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """By the name of their weight."""
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def _packed_or_none(weight: Tensor, bits: int) -> Tensor | None:
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


def _merge_settings(model: nn.Module) -> dict[str, Any] | None:
    config: MergeConfig | None = getattr(model, "fpet_config", None)
    if config is None:
        return None
    refinements = {}
    for i, block in enumerate(transformer_blocks(model)):
        module = getattr(block, "refinement", None)
        if isinstance(module, KeyRefinement):
            names = ("channels", "hidden_dim", "bits", "dropout", "scale")
            refinements[i] = {name: getattr(module, name) for name in names}
        elif module is not None:
            raise TypeError(f"model: expected blocks.{i}.refinement to be a KeyRefinement, got {type(module).__name__}")
    thresholds = [i for i, block in enumerate(transformer_blocks(model)) if hasattr(block, "thresholds")]
    return {
        "layers": list(config.layers),
        "proportional_attention": config.proportional_attention,
        "similarity": config.similarity,
        "refinement": refinements,
        "thresholds": thresholds,
    }


def _rebuild(model: nn.Module, header: dict[str, Any], config: AdapterConfig) -> nn.Module:
    """Head, adapters, merging and refinement as the header says, untrained."""
    block = transformer_blocks(model)[0]
    like = next(block.parameters())
    try:
        num_classes = header["num_classes"]
        if num_classes is not None and num_classes != getattr(model, "num_classes", num_classes):
            model.reset_classifier(num_classes)  # type: ignore[operator]
            for head in head_modules(model):
                head.to(like.device, like.dtype)
        arguments = dataclasses.asdict(config)
        add_adapters(model, arguments.pop("method"), **arguments)
        merge = header["merge"]
        if merge is not None:
            form = merge["proportional_attention"] or False
            apply(model, merge["layers"], proportional_attention=form, similarity=merge["similarity"])
            for i, arguments in merge["refinement"].items():
                refinement = KeyRefinement(**arguments).to(like.device, like.dtype).train(block.training)
                transformer_blocks(model)[int(i)].refinement = refinement
            for i in merge.get("thresholds", ()):
                transformer_blocks(model)[i].thresholds = Thresholds().to(like.device).train(block.training)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"path: the header does not describe this model: {type(error).__name__}: {error}") from error
    return model


def _meta_copy(model: nn.Module) -> nn.Module:
    """The model's structure, its parameters and buffers without data."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


# --- published formats -----------------------------------------------------------------------------------------------


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
    _assign(model, values)
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
    wanted = {
        name: p for name, p in model.named_parameters() if roles[name] != "backbone" and name not in values
    }  # fmt: skip
    if wanted:
        values |= _check_and_unpack(wanted, _read_pth(state), {}, state)
    _check_finite(values, stem)
    _assign(model, values)
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
    found = _quantized_layers(model)
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
