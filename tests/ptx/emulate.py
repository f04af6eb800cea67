"""The package's own launchers on CPU tensors: every launch is compiled by Triton for a GPU that is not there, and executed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import arithmetic, matrix_units, movement
from .machine import GLOBAL_BASE, Machine
from .memory import Memory
from .program import parse

__all__ = ["INSTRUCTION_MODULES", "Emulation", "emulated"]

INSTRUCTION_MODULES = arithmetic, matrix_units, movement  # importing them is what makes their instructions known


@dataclass
class Emulation:
    """What :func:`emulated` did.

    Attributes:
        machines: of each launch, with the kernel's name: counts and findings.
        change: given a kernel's name and PTX, returns the PTX to execute.
        only: programs of each launch to run; all of them by default.
        written: of each tensor made by new_empty, by its address, the cells that hold something.
    """

    truncate: bool = False
    machines: list[tuple[str, Machine]] = field(default_factory=list)
    change: Callable[[str, str], str] = lambda _name, ptx: ptx
    only: Callable[[tuple[int, int, int]], Collection[tuple[int, int, int]] | None] = lambda _grid: None
    written: dict[int, np.ndarray] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)  # so that no address is used twice

    def assert_clean(self) -> None:
        """Nothing was found in any launch."""
        for name, machine in self.machines:
            assert not machine.findings.counts, f"{name}:\n{machine.findings}"

    def execute(self, kernel: Any, arguments: tuple, meta: dict[str, Any], grid: tuple[int, int, int]) -> None:
        """Compiles a launch, runs it, and leaves its results in the tensors."""
        name = kernel.fn.__name__
        compiled = kernel.run(*arguments, grid=(1, 1, 1), warmup=True, **meta)
        machine = Machine(parse(self.change(name, compiled.asm["ptx"])), self.truncate)
        bound = dict(zip(kernel.arg_names, arguments, strict=False))
        passed = [bound[n] for n, kind in compiled.src.signature.items() if kind != "constexpr"]
        storages = {s.data_ptr(): s for t in passed if isinstance(t, torch.Tensor) and (s := t.untyped_storage()).nbytes()}
        memory = Memory(
            "global", sum(s.nbytes() + 1024 for s in storages.values()), GLOBAL_BASE, machine.clock, machine.findings
        )
        places = {}
        for at, storage in storages.items():
            raw = np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(at), np.uint8)
            places[at] = memory.place(raw, self.written.get(at, True)), raw
        values = [self._address(places, v) if isinstance(v, torch.Tensor) else v for v in passed]
        parameters = machine.program.parameters
        values += [0] * (len(parameters) - len(values))  # Triton's own, for scratch that these kernels don't use
        typed = {n: float(v) if kind.startswith("f") else v for (kind, n), v in zip(parameters, values, strict=True)}
        self.machines.append((name, machine))
        machine.launch(memory, typed, grid, compiled.metadata.shared, self.only(grid))
        for at, (address, raw) in places.items():
            start = address - GLOBAL_BASE
            if at in self.written:
                self.written[at] = memory.written[start // 2 : (start + raw.size + 1) // 2].copy()
            np.copyto(raw, memory.bytes[start : start + raw.size])

    @staticmethod
    def _address(places: dict[int, tuple[int, np.ndarray]], tensor: torch.Tensor) -> int:
        place = places.get(tensor.untyped_storage().data_ptr())
        return place[0] + tensor.storage_offset() * tensor.element_size() if place else GLOBAL_BASE


@contextlib.contextmanager
def _ptx_only(target: str) -> Iterator[None]:
    """Triton stops at PTX: no machine code is made, which is not executed here and takes as long as the rest.

    What it caches meanwhile, on disk and in the process, is kept apart from whole kernels.
    """
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    from fpet_kernels.triton import report

    make, folder = CUDABackend.make_cubin, triton.knobs.cache.dir
    with report.absent_gpu(target), triton.knobs.cache.scope():
        triton.runtime.driver.active.get_current_device = lambda: f"{target}, PTX only"
        triton.knobs.cache.dir = f"{folder}-ptx"
        CUDABackend.make_cubin = lambda *_args, **_options: b""
        try:
            yield
        finally:
            CUDABackend.make_cubin = make


@contextlib.contextmanager
def emulated(target: str, truncate: bool = False, whole: bool = False) -> Iterator[Emulation]:
    """Launches go to the interpreter, as if on a GPU of ``target``; new tensors hold NaN, and reading them is found.

    ``whole``: kernels are compiled as they would be for use, down to machine code.
    """
    from fpet_kernels.triton import ops, report

    emulation = Emulation(truncate)
    call, new_empty, problems = ops._Launch.__call__, torch.Tensor.new_empty, ops._PROBLEMS

    def execute(self: Any, *tensors: torch.Tensor) -> None:
        emulation.execute(self.kernel, (*tensors, *self.numbers), self.meta, self.grid)

    def poisoned(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        made = new_empty(self, *args, **options)
        made.fill_(float("nan") if made.is_floating_point() else -(2**31))
        if made.numel():
            storage = made.untyped_storage()
            emulation.written[storage.data_ptr()] = np.zeros((storage.nbytes() + 1) // 2, bool)
            emulation.kept.append(made)
        return made

    ops._Launch.__call__, torch.Tensor.new_empty, ops._PROBLEMS = execute, poisoned, {}
    try:
        with report.absent_gpu(target) if whole else _ptx_only(target):
            yield emulation
    finally:
        ops._Launch.__call__, torch.Tensor.new_empty, ops._PROBLEMS = call, new_empty, problems
