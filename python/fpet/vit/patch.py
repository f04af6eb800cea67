"""``fpet.apply``, ``fpet.remove`` and ``fpet.merged``: token merging switched on and off in a model that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .block import convert, is_converted, key_channels, restore, why_not
from .config import MergeConfig, attention_form, check_layers, check_similarity, new_refinements, set_refinements
from .foreign import of_transformers, refuse_wrapped
from .merging import merge_splits
from .models import TIMM_MODELS, MergingModel

__all__ = ["also_removes", "apply", "find_model", "merged", "remove"]

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
        refinement: the learned correction of the key that is matched (equation 10 of the paper), in the merging blocks. None:
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
    _refuse_reduced(inner)
    layers = check_layers(layer, len(inner.blocks))
    form = attention_form(proportional_attention)
    check_similarity(similarity)
    if (reason := _why_not(inner)) is not None:
        raise TypeError(f"model: {type(inner).__name__} can't be merged: {reason}")
    if inner.patch_embed.grid_size is not None:  # else the images decide
        height, width = inner.patch_embed.grid_size
        merge_splits(height, width, len(layers))
    modules = new_refinements(refinement, layers, inner.blocks, key_channels)
    if modules:
        refuse_wrapped(model, "fpet.apply")
        refuse_wrapped(inner, "fpet.apply")

    for i, block in enumerate(inner.blocks):
        convert(block)
        block.fpet_merging = True
        block.fpet_layer = i if i in layers else None
    TIMM_MODELS.swap(inner)
    inner.fpet_config = MergeConfig(layers, form, similarity, backend)
    set_refinements(inner.blocks, modules, others=refinement is not False)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply`: classes are timm's again and refinements are gone; adapters stay. Returns ``model``.

    Does nothing to a model that isn't patched. Undoes :func:`fpet.huggingface.apply` too.
    """
    for kind, undo in _OTHERS:
        if any(isinstance(m, kind) for m in model.modules()):
            return undo(model)
    inner = _patched(model)
    if inner is None:
        return model
    _refuse_reduced(inner)
    if not TIMM_MODELS.known(inner):  # fully_shard made a subclass of ours
        raise TypeError(
            f"model: {type(inner).__name__} was wrapped after fpet.apply; use fpet.apply(model, layer=None) to stop merging"
        )
    TIMM_MODELS.restore(inner)
    del inner.fpet_config
    set_refinements(inner.blocks, {}, others=False)
    for block in inner.blocks:
        block.__dict__.pop("fpet_merging", None)
        block.__dict__.pop("fpet_layer", None)
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
                block.fpet_layer = i if i in config.layers else None
            set_refinements(inner.blocks, {i: module for i, module in before.items() if module is not None}, others=False)


_OTHERS: list[tuple[type[nn.Module], Callable[[nn.Module], nn.Module]]] = []


def also_removes(kind: type[nn.Module], undo: Callable[[nn.Module], nn.Module]) -> None:
    """:func:`remove` calls ``undo`` for a model that holds a module of ``kind``."""
    _OTHERS.append((kind, undo))


def find_model(model: nn.Module) -> nn.Module:
    """The one timm vision transformer in ``model``, which may be that itself.

    Raises:
        TypeError: there is none, there are several, or a data-parallel wrapper is around it.
    """
    refuse_wrapped(model, "fpet.apply", new_parameters=False)
    found = [m for m in model.modules() if TIMM_MODELS.known(m) or isinstance(m, MergingModel)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        raise TypeError(f"model: {name} holds {len(found)} vision transformers; call fpet.apply on each")
    reason = _REASONS.get(name)
    if reason is None and of_transformers(model):
        reason = "it is of transformers: for BLIP, CLIP, SigLIP and ViT call fpet.huggingface.apply"
    if reason is None and isinstance(model, FSDPModule):
        reason = "it is sharded; call fpet.apply before fully_shard"
    if reason is None and (base := TIMM_MODELS.base_of(type(model))) is not None:
        reason = f"it is a subclass of timm's {base.__name__}, and what it changes there is unknown"
    if reason is None:
        reason = f"no knowledge of it; known are {TIMM_MODELS.names()}"
    raise TypeError(f"model: {name} can't be merged: {reason}")


def _refuse_reduced(inner: Any) -> None:
    if (reduction := getattr(inner, "fpet_reduction", None)) is not None:
        raise TypeError(f"model: reduces its tokens by {reduction.name!r}: fpet.comparators.remove_reduction(model) first")


def _patched(model: nn.Module) -> Any:
    return next((m for m in model.modules() if isinstance(m, MergingModel)), None)


def _why_not(inner: Any) -> str | None:
    if isinstance(getattr(inner, "patch_drop", None), (PatchDropout, PatchDropoutWithIndices)):
        return "patch dropout leaves no grid to merge on; build it with patch_drop_rate=0"
    for i, block in enumerate(inner.blocks):
        if not is_converted(block) and isinstance(block, FSDPModule):
            return f"it is sharded (blocks.{i}); call fpet.apply before fully_shard"
        if (reason := why_not(block)) is not None:
            return f"{reason} (blocks.{i})"
    return None
