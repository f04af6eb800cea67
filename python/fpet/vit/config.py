"""Where and how a model merges, and the checks of what a user asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layers.refinement import KeyRefinement

__all__ = ["MergeConfig", "attention_form", "check_layers", "check_similarity", "new_refinements", "set_refinements"]


@dataclass(frozen=True)
class MergeConfig:
    """Where and how a model merges; on a patched model as ``model.fpet_config``.

    Attributes:
        layers: 0-based blocks that merge, increasing.
        proportional_attention: None for ordinary attention; else the form, "auto", "mask" or "column".
        similarity: "cosine" or "dot".
        backend: of :func:`fpet_kernels.bdm_merge`; None takes the best.
    """

    layers: tuple[int, ...] = ()
    proportional_attention: str | None = "auto"
    similarity: str = "cosine"
    backend: str | None = None


def check_layers(layer: int | Iterable[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks that merge, increasing, of a model with ``depth`` of them; TypeError, ValueError."""
    if layer is not None and not isinstance(layer, (int, Iterable)):
        raise TypeError(f"layer: expected an int, several or None, got {type(layer).__name__}")
    layers = () if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
    for i in layers:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth:
            raise ValueError(f"layer: expected block indices in range({depth}), got {layer!r}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layer: expected every block at most once, got {layer!r}")
    return tuple(sorted(layers))


def attention_form(proportional_attention: bool | str) -> str | None:
    """:class:`MergeConfig`'s form of proportional attention, for what ``fpet.apply`` takes; ValueError."""
    form = "auto" if proportional_attention is True else proportional_attention or None
    if form not in (None, "auto", "mask", "column"):
        raise ValueError(f"proportional_attention: expected True, False, 'mask' or 'column', got {proportional_attention!r}")
    return form


def check_similarity(similarity: str) -> None:
    """ValueError for anything but "cosine" and "dot"."""
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity: expected 'cosine' or 'dot', got {similarity!r}")


def new_refinements(
    refinement: Any, layers: tuple[int, ...], blocks: Sequence[Any], channels: Callable[[Any], int]
) -> dict[int, nn.Module]:
    """The modules to set, by layer; ``channels`` tells the key channels of a block. TypeError, ValueError."""
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
    arguments = {} if refinement is True else refinement
    modules: dict[int, nn.Module] = {}
    for i in layers:
        block = blocks[i]
        if refinement is True and getattr(block, "refinement", None) is not None:
            continue
        like = next(block.parameters())
        # Parameters of a quantised backbone may be integers; float32 is then the trainable choice.
        module = KeyRefinement(channels(block), **arguments).to(device=_device(block, like))
        modules[i] = module.to(dtype=like.dtype) if like.dtype.is_floating_point else module
        modules[i].train(block.training)
    return modules


def _device(block: nn.Module, like: nn.Parameter) -> Any:
    """Where ``block`` computes: for weights that accelerate keeps elsewhere its hook knows."""
    hooks = (getattr(module, "_hf_hook", None) for module in block.modules()) if like.is_meta else ()
    return next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), like.device)


def set_refinements(blocks: Iterable[Any], modules: dict[int, nn.Module], others: bool) -> None:
    """Puts ``modules`` into their blocks, by index; the other blocks keep theirs, or with ``others`` False lose them."""
    for i, block in enumerate(blocks):
        if i in modules:
            block.refinement = modules[i]
        elif not others and getattr(block, "refinement", None) is not None:
            del block.refinement
