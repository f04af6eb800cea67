"""What others may have done to a model: wrapped it for data parallelism, replaced a forward."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .block import attention_modules

__all__ = ["check_forward", "check_forwards", "of_transformers", "refuse_wrapped"]

_WRAPPERS = (
    "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "ReplicateModule", "DeepSpeedEngine",
)  # fmt: skip


def of_transformers(model: nn.Module) -> bool:
    """Whether any part of ``model`` is of Hugging Face transformers."""
    return any(cls.__module__.startswith("transformers.") for m in model.modules() for cls in type(m).__mro__)


def refuse_wrapped(model: nn.Module, call: str, *, new_parameters: bool = True) -> None:
    """TypeError where ``model`` is, holds or, with ``new_parameters``, is held by a wrapper that knows its parameters already.

    What is added to such a model is left out of the wrapper's reductions, and drifts apart between processes. FSDP2's modules
    take settings, and so are refused with ``new_parameters`` only.

    Args:
        call: what to call before wrapping, for the message.
    """
    for module in model.modules():
        kind = _wrapper(type(module))
        if kind is not None and (new_parameters or kind != "FSDPModule"):
            where, before = "is" if module is model else "holds", "fully_shard" if kind == "FSDPModule" else "wrapping"
            raise TypeError(f"model: expected an unwrapped model, but it {where} a {kind}; call {call} before {before}")
    if new_parameters:
        for wrapper in _wrappers_alive():
            if any(module is model for module in wrapper.modules()):
                raise TypeError(
                    f"model: expected an unwrapped model, but a {_wrapper(type(wrapper))} holds it; call {call} before wrapping"
                )


def _wrapper(cls: type) -> str | None:
    """By name: apex, Megatron and torch call theirs the same, and need not be there to be looked for."""
    return next((base.__name__ for base in cls.__mro__ if base.__name__ in _WRAPPERS), None)


def _wrappers_alive() -> Iterator[Any]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield from (o for o in gc.get_objects() if issubclass(type(o), nn.Module) and _wrapper(type(o)) is not None)


def check_forwards(blocks: Sequence[Any], merging: Iterable[int], later: tuple[str, ...]) -> None:
    """RuntimeError where a forward that somebody put on a block or attention itself can't do what merging asks of it.

    Args:
        merging: indices of the blocks that merge, increasing. later: the arguments that blocks after the first one are given.
    """
    merging = tuple(merging)
    if not merging:
        return
    for i in range(merging[0], len(blocks)):
        block = blocks[i]
        after = later if i > merging[0] else ()
        check_forward(block, f"blocks.{i}", (*after, *(("merge", "record") if i in merging else ())))
        for attention in attention_modules(block):
            check_forward(attention, f"{type(attention).__name__} of blocks.{i}", (*after, *(("with_key",) * (i in merging))))


def check_forward(module: nn.Module, name: str, arguments: tuple[str, ...]) -> None:
    """RuntimeError where the forward that somebody put on ``module`` itself does not name these arguments."""
    replaced = module.__dict__.get("forward")
    if replaced is None or not arguments or "_old_forward" in module.__dict__:  # accelerate hands everything on
        return
    known = inspect.signature(replaced).parameters
    if missing := [argument for argument in arguments if argument not in known]:
        raise RuntimeError(
            f"{name}: its forward was replaced by one without the argument {missing[0]!r}, which "
            f"{_PURPOSE[missing[0]]}. Give it that argument, as the class {type(module).__name__} has it; merge "
            f"in a later block; or call fpet.apply(…, proportional_attention=False), where only 'sizes' is missing"
        )


_PURPOSE = {
    "sizes": "says how many tokens each one stands for, to be weighed by",
    "kept": "says which positions are left",
    "with_key": "asks for the key that merging matches by",
    "call": "says how to merge and to attend",
    "merge": "says how to merge",
    "record": "takes what was merged",
}
