"""Files of what was tuned: :func:`save` and :func:`load`.

A file of ours is a safetensors file. Its metadata entry ``fpet`` is JSON: format version; adapter, merging and reduction
settings; number and names of the classes; what the backbone is, and digests of its frozen weights; preprocessing; shape and
bits of each quantised weight; SHA-256 of the tensors. Its tensors are all that was trained, by name: what
:func:`fpet.freeze` leaves trainable, whatever else has requires_grad, and the running statistics of batch norms. A quantised
weight is uint8 as :func:`fpet.layers.quantize.pack` makes it: codes, least significant bits first, then float32 mean and std.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..adapters import METHODS, AdapterConfig, add_adapters, remove_adapters
from ..adapters.attaching import SLOTS, transformer, transformer_blocks
from ..adapters.freezing import head_modules, parameter_roles
from ..comparators import REDUCTIONS, ReductionConfig, apply_reduction, remove_reduction
from ..comparators.ltmp import Thresholds
from ..layers.refinement import KeyRefinement
from ..vit.config import MergeConfig
from ..vit.patch import apply, remove
from .atomic import write_atomically
from .describing import describe, first_difference, fresh_names, short_digests
from .modelfile import VERSION, assign, digest_of, dtype_name, packed_or_none, quantized_layers, read_file, unpacked

__all__ = ["backbone_hash", "load", "named_parameters", "running_statistics", "save", "tuned_tensors"]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes everything :func:`load` needs to rebuild the tuned model on the same backbone, without the backbone.

    Quantised weights are stored packed: what the model computes comes back up to float32 rounding of the mean and the
    standard deviation; the latent weights behind the codes do not. The file appears under its name only when it is
    complete: a crash leaves the old one. Before anything is written, the model is rebuilt without data as :func:`load` will,
    so that what is written can be loaded.

    Args:
        model: after :func:`fpet.add_adapters` and, or, :func:`fpet.apply`; a compiled or data-parallel one is looked into.
        path: of the file; its folder must exist.
        class_names: as many as the head has classes. preprocessing: the fields of
            :class:`fpet.data.preprocessing.Preprocessing`; None: what timm knows of the model. metadata: anything to remember,
            text by text.

    Raises:
        TypeError: the model is no timm vision transformer, or something was trained that :func:`load` could not put back; the
            message names it. ValueError: class_names or metadata do not fit.
    """
    model = _unwrapped(model)
    inner, roles = transformer(model), _roles(model)
    peft = [name for name, role in roles.items() if role == "peft"]
    if peft:
        raise TypeError(
            f"model: {peft[0]} and {len(peft) - 1} more parameters are the peft library's, which saves them: call "
            "fpet.apply before peft.get_peft_model, name 'refinement' in its modules_to_save, and save_pretrained"
        )
    if inner is not model:
        raise TypeError(f"model: expected the timm vision transformer itself, got {type(model).__name__} around one: save that")
    trained = tuned_tensors(model)
    tensors, packed = _stored(trained, model)
    config: AdapterConfig = getattr(model, "adapter_config", None) or AdapterConfig("none")
    extra = sorted(name for name, role in roles.items() if role == "backbone" and name in tensors)
    if extra and len(extra) == sum(role == "backbone" for role in roles.values()):
        warnings.warn(
            "model: its whole backbone has requires_grad, so the file holds all of it; call fpet.freeze before training",
            UserWarning,
            stacklevel=2,
        )
    num_classes = _num_classes(model)
    names = None if class_names is None else [str(name) for name in class_names]
    if names is not None and len(names) != num_classes:
        raise ValueError(f"class_names: expected {num_classes}, one for each class of the head, got {len(names)}")
    description = describe(model)
    frozen = _frozen(model, config.method, frozenset(extra), running_statistics(model))
    header = {
        "version": VERSION,
        "adapter": dataclasses.asdict(config),
        "merge": _merge_settings(model),
        "reduction": _reduction_settings(model),
        "num_classes": num_classes,
        "class_names": names,
        "preprocessing": dict(preprocessing) if preprocessing is not None else description.preprocessing,
        "backbone": {
            **description.backbone(),
            "sha256": digest_of(frozen),
            "tensors": short_digests(frozen),
        },
        "extra": extra,
        "packed": packed,
        "metadata": _checked_metadata(metadata),
        "registered_by": _registered_by(model, config),
        "tensors_sha256": digest_of(tensors),
    }
    _rehearse(model, header, config, trained)
    write_atomically(Path(path), safetensors_bytes(tensors, metadata={"fpet": json.dumps(header)}))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Makes the bare backbone ``model`` the tuned model that :func:`save` wrote: adapters, merging, refinement and head.

    Args:
        model: the backbone it was tuned on, without adapters and merging; its head may have another number of classes.
        path: of the file.

    Returns:
        model, with all that was tuned; call :func:`fpet.freeze` to tune on.

    Raises:
        ValueError: not a file of ours, a damaged one, or one for another backbone, and what differs; or the model has adapters
            or merges. TypeError: the model is no timm vision transformer. OSError: the file can't be read. The model is then as
            it was.
    """
    outer, model = model, transformer(_unwrapped(model))
    if getattr(model, "adapter_config", None) is not None or getattr(model, "fpet_config", None) is not None:
        raise ValueError("model: expected a bare backbone, got one with adapters or merging: fpet.remove_adapters, fpet.remove")
    header, tensors = read_file(Path(path))
    config = AdapterConfig(**header["adapter"])
    _check_registered(header, config, path)
    backbone, extra = header["backbone"], frozenset(header.get("extra", ()))
    statistics = {name for name in tensors if name in running_statistics(model)}
    frozen = _frozen(model, config.method, extra, statistics)
    if (found := digest_of(frozen)) != backbone["sha256"]:
        what = first_difference(backbone, describe(model), short_digests(frozen))
        raise ValueError(
            f"model: {path} was tuned on the backbone {backbone['name']} with frozen weights {backbone['sha256'][:12]}…, "
            f"got {describe(model).name} with {found[:12]}…{what}"
        )
    # A dress rehearsal without memory: everything that can be wrong is found before the model is touched.
    rehearsal = _rebuild(_meta_copy(model), copy.deepcopy(header), config)
    wanted = _wanted(rehearsal, extra, statistics)
    values = unpacked(wanted, tensors, header["packed"], path)
    _rebuild(model, header, config)
    assign({**named_parameters(model), **_kept_buffers(model)}, values)
    return outer


def backbone_hash(model: nn.Module, method: str | None = None) -> str:
    """SHA-256, as hex digits, of names, shapes, dtypes and values of the backbone's parameters and saved buffers.

    Adapters, head and running statistics of batch norms have no part in it.

    Args:
        method: whose frozen parameters; None takes that of the model's own adapters. Folded or cast weights are others.
    """
    return _hash(model, method, frozenset(), set(running_statistics(model)))


def tuned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`save` writes, by name, not copied: parameters that were trained, and running statistics of batch norms."""
    roles = _roles(model)
    found: dict[str, Tensor] = {
        name: p for name, p in named_parameters(model).items() if roles[name] != "backbone" or p.requires_grad
    }
    return found | running_statistics(model)


# --- what is in a model ------------------------------------------------------------------------------------------------

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile, of checkpointing


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by the names that they have where none of its parts is compiled."""
    return {_plain(name): p for name, p in model.named_parameters()}


def _roles(model: nn.Module, method: str | None = None) -> dict[str, str]:
    return {_plain(name): role for name, role in parameter_roles(model, method).items()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, a data-parallel or an averaging wrapper."""
    while True:
        if isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        else:
            return model


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {_plain(name): b for name, b in model.named_buffers() if name in kept}


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of batch norms, which move in training though nothing trains them."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: b for name, b in _kept_buffers(model).items() if name.rpartition(".")[2] in names}


def _frozen(model: nn.Module, method: str | None, extra: frozenset[str], statistics: Iterable[str]) -> dict[str, Tensor]:
    roles = _roles(model, method)
    frozen: dict[str, Tensor] = {
        name: p for name, p in named_parameters(model).items() if roles[name] == "backbone" and name not in extra
    }
    left_out = set(statistics)
    return frozen | {name: b for name, b in _kept_buffers(model).items() if name not in left_out}


def _hash(model: nn.Module, method: str | None, extra: frozenset[str], statistics: Iterable[str]) -> str:
    return digest_of(_frozen(model, method, extra, statistics))


def _stored(tensors: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors as they are stored, and what has to be known of those that are packed."""
    quantized = {_plain(name): layer for name, layer in quantized_layers(model).items()}
    stored: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        layer = quantized.get(name)
        if layer is not None and (codes := packed_or_none(data, layer.bits)) is not None:
            packed[name] = {"shape": list(data.shape), "bits": layer.bits, "dtype": dtype_name(data.dtype)}
            data = codes
        stored[name] = data
    return stored, packed


def _num_classes(model: Any) -> int | None:
    """Of the head that is there, which may not be the one that timm made."""
    heads = head_modules(model)
    if heads and isinstance(heads[0], nn.Linear):
        return heads[0].out_features
    return 0 if heads and isinstance(heads[0], nn.Identity) else getattr(model, "num_classes", None)


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
    return {
        "layers": list(config.layers),
        "proportional_attention": config.proportional_attention,
        "similarity": config.similarity,
        "refinement": refinements,
    }


def _reduction_settings(model: nn.Module) -> dict[str, Any] | None:
    config: ReductionConfig | None = getattr(model, "fpet_reduction", None)
    return None if config is None else dataclasses.asdict(config)


def _registered_by(model: nn.Module, config: AdapterConfig) -> dict[str, str]:
    """The modules that registered the method and the reduction, where they are not ours."""
    reduction: ReductionConfig | None = getattr(model, "fpet_reduction", None)
    found = {"method": METHODS[config.method].install.__module__}
    if reduction is not None:
        found["reduction"] = REDUCTIONS[reduction.name].reducer.__module__
    return {kind: module for kind, module in found.items() if not module.startswith("fpet.")}


# --- rebuilding --------------------------------------------------------------------------------------------------------


def _rebuild(model: nn.Module, header: dict[str, Any], config: AdapterConfig) -> nn.Module:
    """Head, adapters, merging and refinement as the header says, untrained."""
    blocks = transformer_blocks(model)
    like = next(blocks[0].parameters())
    try:
        num_classes = header["num_classes"]
        if num_classes is not None and num_classes != _num_classes(model):
            model.reset_classifier(num_classes)  # type: ignore[operator]
            for head in head_modules(model):
                head.to(like.device, like.dtype)
        arguments = dataclasses.asdict(config)
        add_adapters(model, arguments.pop("method"), **arguments)
        merge, reduction = header["merge"], header.get("reduction")
        if merge is not None:
            form = merge["proportional_attention"] or False
            apply(model, merge["layers"], proportional_attention=form, similarity=merge["similarity"])
            for i, arguments in merge["refinement"].items():
                blocks[int(i)].refinement = KeyRefinement(**arguments).to(like.device, like.dtype).train(blocks[0].training)
            for i in merge.get("thresholds", ()):  # of version 1, whose reader applied LTMP himself
                blocks[i].thresholds = Thresholds().to(like.device).train(blocks[0].training)
        if reduction is not None:
            kept = [getattr(block, "refinement", None) for block in blocks]
            apply_reduction(model, reduction.pop("name"), reduction.pop("layer"), **reduction)
            for block, refinement in zip(blocks, kept, strict=True):
                if refinement is not None:
                    block.refinement = refinement
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


def _wanted(model: nn.Module, extra: frozenset[str], statistics: set[str]) -> dict[str, Tensor]:
    """What of a rebuilt model has to come from the file."""
    roles = _roles(model)
    wanted: dict[str, Tensor] = {
        name: p for name, p in named_parameters(model).items() if roles[name] != "backbone" or name in extra
    }
    return wanted | {name: b for name, b in running_statistics(model).items() if name in statistics}


def _rehearse(model: nn.Module, header: dict[str, Any], config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Rebuilds the model without data, as :func:`load` will. TypeError: that is not the model which is here; says where."""
    bare: Any = _meta_copy(model)
    for parent in list(bare.modules()):
        for name, child in list(parent.named_children()):
            for wrapper in _WRAPPERS:
                if (inside := child._modules.get(wrapper[:-1])) is not None:
                    parent._modules[name] = inside
    remove_adapters(remove_reduction(bare))
    remove(bare)
    for block in transformer_blocks(bare):
        for slot in SLOTS:
            for parent in (block, *(m for m in (getattr(block, "attn", None),) if m is not None)):
                if getattr(parent, slot, None) is not None:
                    delattr(parent, slot)
    if header["num_classes"] is not None and hasattr(bare, "reset_classifier"):
        bare.reset_classifier(header["num_classes"])
    rebuilt = _rebuild(bare, json.loads(json.dumps(header)), config)
    wanted = _wanted(rebuilt, frozenset(header["extra"]), set(running_statistics(model)))
    heads = [(a, b) for a, b in zip(head_modules(model), head_modules(rebuilt), strict=False) if type(a) is not type(b)]
    if heads:
        raise TypeError(
            f"model: expected the head that reset_classifier makes, {type(heads[0][1]).__name__}, got "
            f"{type(heads[0][0]).__name__}, which fpet.load could not make"
        )
    for name in (*tensors, *wanted):
        if name not in wanted:
            raise TypeError(
                f"model: {name} was trained, but fpet.load could not make the module it is in: expected what "
                "fpet.add_adapters, fpet.apply and reset_classifier make"
            )
        if name not in tensors or tensors[name].shape != wanted[name].shape:
            got = "none" if name not in tensors else tuple(tensors[name].shape)
            raise TypeError(f"model: expected {name} of shape {tuple(wanted[name].shape)}, as fpet.load makes it, got {got}")
    fresh = fresh_names(model)
    if fresh is not None and (unknown := [name for name in header["extra"] if name not in fresh]):
        raise TypeError(f"model: {unknown[0]} was trained, and timm's {header['backbone']['name']} has no such parameter")


def _check_registered(header: dict[str, Any], config: AdapterConfig, path: str | os.PathLike[str]) -> None:
    reduction = (header.get("reduction") or {}).get("name", "none")
    for kind, name, known in (("method", config.method, METHODS), ("reduction", reduction, REDUCTIONS)):
        if name not in known:
            by = header.get("registered_by", {}).get(kind, "the module that registers it")
            raise ValueError(f"path: {path} needs the {kind} {name!r}, which is not registered: import {by} first")


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata: expected texts by text, got {value!r} for {key!r}")
    return dict(metadata or {})
