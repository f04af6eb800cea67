"""What a training step keeps in memory, counted storage by storage instead of estimated.

>>> with SavedTensors(model) as saved:
...     loss = F.cross_entropy(model(images), labels)
>>> saved.bytes

:func:`step_memory` adds parameters, gradients and optimiser to that, and the peak: the training memory of Table 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["SavedTensors", "StepMemory", "step_memory"]


class StepMemory(NamedTuple):
    """Bytes that a training step takes.

    Attributes:
        parameters, buffers: of the model. gradients: of the trained parameters. optimizer: its state. inputs: images, labels.
        saved: what autograd keeps for the backward, at its maximum, each storage once, none of the above counted again.
        peak: everything alive at once at its maximum, results on their way through an operator included: of PyTorch's
            allocator on a GPU; elsewhere of the storages that operators return, which leaves out what a kernel
            allocates and frees within one call.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    inputs: int
    saved: int
    peak: int

    @property
    def held(self) -> int:
        """All but the peak together: what a step can't do without."""
        return sum(self[:6])


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd saves for the backward while it is entered, custom functions' contexts included.

    A storage counts once, whole, however many views of it are saved, and stops counting when the graph lets go of it. What a
    non-reentrant checkpoint holds to recompute from is no saved tensor; the peak of :func:`step_memory` has it.

    Args:
        known: modules and tensors whose storages are not counted: the model's parameters, and its inputs.

    Attributes:
        bytes: at the maximum so far. now: at present.
    """

    def __init__(self, *known: nn.Module | Tensor) -> None:
        super().__init__(self._pack, _unpack)
        self.bytes = self.now = 0
        self._known = {_key(t) for t in _tensors(known)}
        self._holders: dict[int, int] = {}  # of each storage: how many saved tensors hold it

    def __enter__(self) -> SavedTensors:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Held:
        held, key, size = _Held(tensor.detach()), _key(tensor), _storage(tensor).nbytes()
        if key not in self._known:
            if key not in self._holders:
                self._holders[key] = 0
                self.now += size
                self.bytes = max(self.bytes, self.now)
            self._holders[key] += 1
            weakref.finalize(held, self._release, key, size).atexit = False
        return held

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.now -= size


class _Held:
    """A saved tensor, in an object that the graph alone owns."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(held: _Held) -> Tensor:
    return held.tensor


class _LiveStorages(TorchDispatchMode):
    """Follows every storage that an operator returns until it is freed. Attributes: bytes, at the maximum; now."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self._seen = {_key(t) for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in self._seen:
                storage = _storage(leaf)
                self._seen.add(key)
                self.now += storage.nbytes()
                self.bytes = max(self.bytes, self.now)
                # torch keeps a storage's Python object, and with it this callback, as long as the storage itself
                weakref.finalize(storage, self._freed, key, storage.nbytes()).atexit = False
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def step_memory(
    model: nn.Module, images: Tensor, labels: Tensor, *, optimizer: torch.optim.Optimizer | None = None,
    amp: bool = False,
) -> StepMemory:  # fmt: skip
    """Does one training step and counts. Not for compiled or data-parallel models.

    Bytes per image don't depend on the batch, so that a small one does where nothing but the ratio of two models is wanted,
    as long as their fixed part is taken off or scaled.

    Args:
        model: in the mode in which it is measured (``model.train()``), with what is frozen frozen. Its gradients are gone
            afterwards. images: (B, 3, H, W). labels: (B,) int64. All on one device; "meta" counts without computing.
        optimizer: over the trained parameters; it takes a step. None: AdamW with a learning rate of 0, which moves nothing.
        amp: bfloat16 autocast.

    Raises:
        ValueError: nothing is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: expected parameters that require a gradient, got none")
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    device = images.device
    optimizer.zero_grad(set_to_none=True)
    parameters, buffers = _size(model.parameters()), _size(model.buffers())
    fixed = [*_tensors([model]), images, labels, *_state(optimizer)]
    saved, live = SavedTensors(model, images, labels), _LiveStorages(fixed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with live:
            with saved, torch.autocast(device.type, torch.bfloat16) if amp else nullcontext():
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            del loss
        measured = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        gradients = _size(p.grad for p in trained if p.grad is not None)
        stepped = _size(_state(optimizer))
        optimizer.step()
    state = _size(_state(optimizer))
    optimizer.zero_grad(set_to_none=True)
    inputs = _size((images, labels))
    # The state of a fresh optimiser comes to be after the peak, and is there at the next step's.
    peak = parameters + buffers + inputs + live.bytes + state if measured is None else measured + state - stepped
    return StepMemory(parameters, buffers, gradients, state, inputs, saved.bytes, peak)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _tensors(known: Iterable[nn.Module | Tensor]) -> Iterable[Tensor]:
    for item in known:
        yield from ((*item.parameters(), *item.buffers()) if isinstance(item, nn.Module) else (item,))


def _size(tensors: Iterable[Tensor]) -> int:
    return sum({_key(t): _storage(t).nbytes() for t in tensors}.values())


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _key(tensor: Tensor) -> int:
    return _storage(tensor)._cdata
