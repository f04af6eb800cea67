"""What a training step keeps in memory, counted storage by storage instead of estimated.

>>> with SavedTensors(model) as saved:
...     loss = F.cross_entropy(model(images), labels)
>>> saved.bytes

:func:`step_memory` adds parameters, gradients and optimiser to that, and the peak: the training memory of tensors.
:func:`reserved_memory` is what PyTorch's caching allocator takes from a GPU to hold them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .allocator import CachingAllocator

__all__ = ["SavedTensors", "StepMemory", "reserved_memory", "step_memory"]


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
    """Follows every storage that an operator returns until it is freed.

    Args:
        known: tensors that are there already. allocator: told of every storage, theirs first.

    Attributes:
        bytes: of what operators returned, at the maximum. now: at present.
    """

    def __init__(self, known: Iterable[Tensor], allocator: CachingAllocator | None = None) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self._allocator = allocator
        self._seen: set[int] = set()
        for tensor in known:
            if _key(tensor) not in self._seen:
                self._seen.add(_key(tensor))
                self._allocate(_storage(tensor).nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in self._seen:
                storage = _storage(leaf)
                self._seen.add(key)
                self.now += storage.nbytes()
                self.bytes = max(self.bytes, self.now)
                address = self._allocate(storage.nbytes())
                # torch keeps a storage's Python object, and with it this callback, as long as the storage itself
                weakref.finalize(storage, self._freed, key, storage.nbytes(), address).atexit = False
        return result

    def _allocate(self, size: int) -> int | None:
        return self._allocator.allocate(size) if self._allocator is not None and size else None

    def _freed(self, key: int, size: int, address: int | None) -> None:
        self._seen.discard(key)
        self.now -= size
        if self._allocator is not None and address is not None:
            self._allocator.free(address)


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
    trained = _trained(model)
    optimizer = optimizer or _still(trained)
    device = images.device
    optimizer.zero_grad(set_to_none=True)
    parameters, buffers = _size(model.parameters()), _size(model.buffers())
    fixed = [*_tensors([model]), images, labels, *_state(optimizer)]
    saved, live = SavedTensors(model, images, labels), _LiveStorages(fixed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with _same_random_numbers(device):
        with live:
            _forward_backward(model, images, labels, amp, saved)
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


def reserved_memory(
    model: nn.Module, images: Tensor, labels: Tensor, *, optimizer: torch.optim.Optimizer | None = None,
    amp: bool = False, steps: int = 3,
) -> int:  # fmt: skip
    """Bytes that PyTorch's caching allocator takes from a GPU for some training steps, the holes between tensors included.

    On a GPU that is what the allocator says, of the whole process. Elsewhere every storage that an operator returns goes
    through :class:`CachingAllocator`, which leaves out what a kernel allocates and frees within one call. A program holds
    more on a GPU: its CUDA context, about a gigabyte, which no allocator sees.

    Args:
        steps: with more than one the optimiser's state is there, as in all steps but the first.
        The rest as in :func:`step_memory`.

    Raises:
        ValueError: nothing is trained.
    """
    trained, device = _trained(model), images.device
    optimizer = optimizer or _still(trained)
    optimizer.zero_grad(set_to_none=True)
    real, allocator = device.type == "cuda", CachingAllocator()
    if real:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    known = [*_tensors([model]), images, labels, *_state(optimizer)]
    with _same_random_numbers(device), _no_collection(), nullcontext() if real else _LiveStorages(known, allocator):
        for _ in range(steps):
            _forward_backward(model, images, labels, amp, nullcontext())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_reserved(device) if real else allocator.reserved


def _forward_backward(model: nn.Module, images: Tensor, labels: Tensor, amp: bool, saved: AbstractContextManager[Any]) -> None:
    """``saved`` is entered for the forward alone."""
    with saved, torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
        loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: expected parameters that require a gradient, got none")
    return trained


def _still(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An AdamW that moves nothing."""
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)


def _same_random_numbers(device: torch.device) -> AbstractContextManager[Any]:
    """Afterwards the random generators are where they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _no_collection() -> Iterator[None]:
    """Tensors go when their last name goes, not whenever the garbage collector happens to run."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
