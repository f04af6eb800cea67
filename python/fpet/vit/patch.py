"""``fpet.apply``, ``fpet.remove`` and ``fpet.merged``: token merging switched on and off in a model that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .block import convert, key_channels, restore, why_not
from .merging import merge_splits
from .models import MODELS, MergeConfig, _MergingModel

__all__ = ["apply", "find_model", "merged", "remove"]

_FORMS = ("auto", "mask", "column")

_REASONS = {
    "VisionTransformerSAM": "its blocks attend within windows, which need the whole grid",
    "SwinTransformer": "its blocks attend within windows, which need the whole grid",
    "SwinTransformerV2": "its blocks attend within windows, which need the whole grid",
    "SwinTransformerV2Cr": "its blocks attend within windows, which need the whole grid",
    "Hiera": "its mask units and pooling need the whole grid",
    "HieraDet": "its windows and pooling need the whole grid",
    "NaFlexVit": "its sequences are padded patches of different images, without a grid",
}


def apply(
    model: nn.Module,
    layer: int | Iterable[int] | None = None,
    *,
    refinement: Any = None,
    proportional_attention: bool | str = True,
    similarity: str = "cosine",
    backend: str | None = None,
) -> nn.Module:
    """Makes a timm vision transformer merge half of its patch tokens in one block or several.

    The class of the model and of its blocks is swapped for one that knows about merging; parameters, buffers, their names and
    the hooks on modules stay as they are. Calling it again only changes the settings.

    Args:
        model: a timm model, or any module that holds exactly one: a features_only wrapper, a peft model, open_clip's trunk.
        layer: 0-based block, any, or several: each merges half of what the one before left, between its attention's
            residual and its MLP. None or empty: nothing is merged, and the model computes what it did before.
        refinement: the learned correction of the key that is matched (section 3.3 of the paper), in the merging blocks. None:
            as it is there already, or none. True: a new KeyRefinement where there is none. A dict: its arguments, for a new
            one. A module: that one, or for several layers a dict from layer to module. False: taken away.
        proportional_attention: a token that stands for several counts as several in later attention (adds log size to the
            scores). True chooses how, "mask" and "column" decide: see :func:`fpet.vit.attention.attend`. False: off.
        similarity: "cosine" as the authors' code computes, or "dot" as the paper prints.
        backend: of :func:`fpet_kernels.bdm_merge`; None takes the best one available.

    Returns:
        ``model``. Its ``forward`` merges; ``forward_features`` and ``forward_intermediates`` merge inside and return every
        original position, as timm does; :func:`fpet.merged_features` returns the merged tokens.

    Raises:
        TypeError: a model, block or attention that merging would not be sound in, with the reason. ValueError: an argument's
            value. Nothing is changed then.
    """
    inner: Any = find_model(model)
    layers = _check_layers(layer, len(inner.blocks))
    if proportional_attention is True:
        form: str | None = "auto"
    else:
        form = proportional_attention or None
    if form is not None and form not in _FORMS:
        raise ValueError(f"proportional_attention: expected True, False, 'mask' or 'column', got {proportional_attention!r}")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity: expected 'cosine' or 'dot', got {similarity!r}")
    if (reason := _why_not(inner)) is not None:
        raise TypeError(f"model: {type(inner).__name__} can't be merged: {reason}")
    if inner.patch_embed.grid_size is not None:  # else the images decide
        height, width = inner.patch_embed.grid_size
        merge_splits(height, width, len(layers))
    modules = _check_refinement(refinement, layers, inner.blocks, key_channels)
    if modules and isinstance(inner, FSDPModule):
        raise TypeError(
            f"model: {type(inner).__name__} is sharded and takes no new parameters; call fpet.apply before fully_shard"
        )

    for block in inner.blocks:
        convert(block)
        block.fpet_merging = True
    inner.__class__ = MODELS.get(type(inner), type(inner))
    inner.fpet_config = MergeConfig(layers, form, similarity, backend)
    for i, block in enumerate(inner.blocks):
        if i in modules:
            block.refinement = modules[i]
        elif refinement is False and getattr(block, "refinement", None) is not None:
            del block.refinement
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply`: classes are timm's again and refinements are gone; adapters stay. Returns ``model``.

    Does nothing to a model that isn't patched.
    """
    inner = _patched(model)
    if inner is None:
        return model
    original = next((theirs for theirs, ours in MODELS.items() if type(inner) is ours), None)
    if original is None:  # fully_shard made a subclass of ours
        raise TypeError(
            f"model: {type(inner).__name__} was wrapped after fpet.apply; use fpet.apply(model, layer=None) to stop merging"
        )
    inner.__class__ = original
    del inner.fpet_config
    for block in inner.blocks:
        block.__dict__.pop("fpet_merging", None)
        if getattr(block, "refinement", None) is not None:
            del block.refinement
        restore(block)
    return model


@contextmanager
def merged(model: nn.Module, layer: int | Iterable[int] | None = None, **settings: Any) -> Iterator[nn.Module]:
    """``with fpet.merged(model, layer=6):`` merges inside the block and leaves the model as it was found.

    Args: those of :func:`apply`. A model that was patched before gets its settings and refinements back.
    """
    inner = _patched(model)
    config = None if inner is None else inner.fpet_config
    before = {} if inner is None else {i: getattr(b, "refinement", None) for i, b in enumerate(inner.blocks)}
    apply(model, layer, **settings)
    try:
        yield model
    finally:
        if config is None:
            remove(model)
        else:
            assert inner is not None
            inner.fpet_config = config
            for i, block in enumerate(inner.blocks):
                if before[i] is not None:
                    block.refinement = before[i]
                elif getattr(block, "refinement", None) is not None:
                    del block.refinement


def find_model(model: nn.Module) -> nn.Module:
    """The one timm vision transformer in ``model``, which may be that itself.

    Raises:
        TypeError: there is none, there are several, or a data-parallel wrapper is around it.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise TypeError(f"model: expected an unwrapped model, got {type(model).__name__}; call fpet.apply before wrapping")
    known = tuple(MODELS) + tuple(MODELS.values())
    found = [m for m in model.modules() if type(m) in known or isinstance(m, _MergingModel)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        raise TypeError(f"model: {name} holds {len(found)} vision transformers; call fpet.apply on each")
    reason = _REASONS.get(name)
    if reason is None and (base := next((cls for cls in type(model).__mro__[1:] if cls in MODELS), None)) is not None:
        reason = f"it is a subclass of timm's {base.__name__}, and what it changes there is unknown"
        if isinstance(model, FSDPModule):
            reason = "it is sharded; call fpet.apply before fully_shard"
    if reason is None:
        reason = f"no knowledge of it; known are {', '.join(cls.__name__ for cls in MODELS)}"
    raise TypeError(f"model: {name} can't be merged: {reason}")


def _patched(model: nn.Module) -> Any:
    return next((m for m in model.modules() if isinstance(m, _MergingModel)), None)


def _why_not(inner: nn.Module) -> str | None:
    if isinstance(getattr(inner, "patch_drop", None), (PatchDropout, PatchDropoutWithIndices)):
        return "patch dropout leaves no grid to merge on; build it with patch_drop_rate=0"
    for i, block in enumerate(inner.blocks):
        if (reason := why_not(block)) is not None:
            return f"{reason} (blocks.{i})"
    return None


def _check_layers(layer: int | Iterable[int] | None, depth: int) -> tuple[int, ...]:
    if layer is not None and not isinstance(layer, (int, Iterable)):
        raise TypeError(f"layer: expected an int, several or None, got {type(layer).__name__}")
    layers = () if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
    for i in layers:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth:
            raise ValueError(f"layer: expected block indices in range({depth}), got {layer!r}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layer: expected every block at most once, got {layer!r}")
    return tuple(sorted(layers))


def _check_refinement(
    refinement: Any, layers: tuple[int, ...], blocks: Sequence[Any], channels: Callable[[Any], int]
) -> dict[int, nn.Module]:
    """The modules to set, by layer; ``channels`` tells the key channels of a block."""
    if refinement is None or refinement is False:
        return {}
    if isinstance(refinement, nn.Module):
        if len(layers) != 1:
            raise ValueError(f"refinement: expected a dict from layer to module for layers {layers}, got one module")
        return {layers[0]: refinement}
    if isinstance(refinement, dict) and refinement and all(isinstance(key, int) for key in refinement):
        if set(refinement) != set(layers):
            raise ValueError(f"refinement: expected a module for each of the layers {layers}, got {sorted(refinement)}")
        return dict(refinement)
    if refinement is not True and not isinstance(refinement, dict):
        raise TypeError(f"refinement: expected True, False, None, a module or a dict, got {type(refinement).__name__}")
    from ..layers.refinement import KeyRefinement

    arguments = {} if refinement is True else refinement
    modules: dict[int, nn.Module] = {}
    for i in layers:
        block = blocks[i]
        if refinement is True and getattr(block, "refinement", None) is not None:
            continue
        like = next(block.parameters())
        # Parameters of a quantised backbone may be integers; float32 is then the trainable choice.
        module = KeyRefinement(channels(block), **arguments).to(device=like.device)
        modules[i] = module.to(dtype=like.dtype) if like.dtype.is_floating_point else module
        modules[i].train(block.training)
    return modules
