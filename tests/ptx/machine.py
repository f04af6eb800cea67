"""One block of threads in lockstep: registers, operands, control flow. The instructions are in the modules beside this one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from .memory import Clock, Fault, Findings, Memory
from .program import Instruction, Program
from .round_trips import RoundTrips

__all__ = ["GLOBAL_BASE", "INSTRUCTIONS", "SHARED_BASE", "TYPES", "Machine", "instruction"]

GLOBAL_BASE = 0x7F0000000000
SHARED_BASE = 0x0400  # as a driver that keeps the first kilobyte for itself
TYPES: dict[str, type] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
HELD_AS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "f": np.uint32, "rd": np.uint64, "fd": np.uint64}

Mask = Any  # [threads] of bool, or None: every thread takes part
Step = Callable[[Mask], int | None]  # executes an instruction; returns where to go on, if not behind it
INSTRUCTIONS: dict[str, Callable[[Machine, Instruction], Step]] = {}


def instruction(*names: str) -> Callable:
    """Registers what builds the step of the instructions called ``names``."""

    def register(build: Callable[[Machine, Instruction], Step]) -> Callable[[Machine, Instruction], Step]:
        INSTRUCTIONS.update(dict.fromkeys(names, build))
        return build

    return register


class Machine:
    """Executes the programs of one launch after another.

    ``truncate``: matrix units cut off what falls below the largest addend's last bits, as those of NVIDIA do, instead of
    rounding an exact sum. ``counts`` is summed over the programs run, ``longest`` the most instructions of one. ``asked``: the instruction under way asks global memory for something.
    """

    END = -1

    def __init__(self, program: Program, truncate: bool = False) -> None:
        self.program, self.truncate, self.threads = program, truncate, program.threads
        self.clock = Clock()
        self.findings = Findings(where=lambda: f"program {self.position}: {self.current.text[:110]}")
        self.counts: Counter[str] = Counter()
        self.longest = 0
        self.thread = np.arange(self.threads, dtype=np.uint32)
        self.warp = (self.thread // 32).astype(np.int16)
        self.everyone = np.ones(self.threads, bool)
        self.current = program.code[0]
        self.position = self.grid = (0, 0, 0)
        self.registers: dict[str, np.ndarray] = {}
        self.round_trips = RoundTrips(program)
        self.steps = [self._build(ins) for ins in program.code]

    def _build(self, ins: Instruction) -> Step:
        build = INSTRUCTIONS.get(ins.name)
        if build is None:
            raise Fault(f"unknown instruction: {ins.text}")
        step = build(self, ins)
        if ins.guard is None:
            return step
        guard, negated = self.reader(ins.guard, np.bool_), ins.negated
        return lambda _mask: step(~guard() if negated else guard())

    # --- operands ----------------------------------------------------------------------------------------------------

    def reader(self, operand: str, dtype: Any) -> Callable[[], np.ndarray]:
        """What reads an operand, [threads] or a single immediate, as ``dtype``."""
        dtype = np.dtype(dtype)
        if re.match(r"%(n?ctaid|n?tid)\.", operand):
            return lambda: self._special(operand).astype(dtype)
        if not operand.startswith("%"):
            value = dtype.type(SHARED_BASE) if operand == "global_smem" else immediate(operand, dtype)
            return lambda: value

        def read() -> np.ndarray:
            value = self.registers.get(operand)
            if value is None:
                raise Fault(f"{operand} is read before it is written")
            if operand in self.in_product:
                self.findings.note("a register is read or written while its product is under way", operand)
            if value.dtype == dtype:
                return value
            if value.dtype.itemsize == dtype.itemsize:
                return value.view(dtype)
            if value.dtype.itemsize > dtype.itemsize and dtype.kind in "ui":
                return value.astype(f"u{dtype.itemsize}").view(dtype)
            raise Fault(f"{operand}: {value.dtype} as {dtype}")

        return read

    def writer(self, register: str) -> Callable[[Any, Mask], None]:
        """What writes a register, in the threads of a mask."""
        kind = re.match(r"%([a-z]+)", register)
        assert kind, register
        held = np.dtype(HELD_AS[kind[1]])

        def write(value: Any, mask: Mask) -> None:
            if register in self.in_product:
                self.findings.note("a register is read or written while its product is under way", register)
            value = np.ascontiguousarray(np.broadcast_to(np.asarray(value), (self.threads,)))
            if value.dtype != held:
                reinterpret = value.dtype.itemsize == held.itemsize and held.kind != "b"
                value = value.view(held) if reinterpret else value.astype(held)
            if mask is not None:
                value = np.where(mask, value, self.registers.get(register, np.zeros((), held)))
            self.registers[register] = value
            self.written_at[register] = self.clock.step
            self.of_product.discard(register)

        return write

    def _special(self, operand: str) -> np.ndarray:
        name, axis = operand[1:].split(".")
        which = "xyz".index(axis)
        if name == "tid":
            return self.thread if which == 0 else np.zeros(self.threads, np.uint32)
        value = {"ctaid": self.position[which], "nctaid": self.grid[which], "ntid": self.threads if which == 0 else 1}[name]
        return np.full(self.threads, value, np.uint32)

    def address(self, operand: str, space: str) -> Callable[[], np.ndarray]:
        """What works out ``[register + offset]`` of every thread."""
        found = re.match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert found, operand
        register, offset = self.reader(found[1], np.int64 if space == "global" else np.uint32), int(found[2] or 0)
        return lambda: np.broadcast_to(register().astype(np.int64) + offset, (self.threads,))

    def function(self, ins: Instruction, dtypes: Collection[Any], of: Callable[..., Any]) -> Step:
        """The step that writes ``of`` the operands behind the first into the first."""
        readers = [self.reader(operand, dtype) for operand, dtype in zip(ins.operands[1:], dtypes, strict=False)]
        write = self.writer(ins.operands[0])
        if len(readers) == 1:
            (only,) = readers
            return lambda mask: write(of(only()), mask)
        if len(readers) == 2:
            first, second = readers
            return lambda mask: write(of(first(), second()), mask)
        return lambda mask: write(of(*(read() for read in readers)), mask)

    # --- running -----------------------------------------------------------------------------------------------------

    def launch(
        self, memory: Memory, arguments: dict[str, Any], grid: tuple[int, int, int], shared: int,
        only: Collection[tuple[int, int, int]] | None = None, most: int = 50_000_000,
    ) -> None:  # fmt: skip
        """Runs the programs of ``grid``, or ``only`` some; ``shared``: bytes of each one's shared memory."""
        self.memory, self.arguments, self.grid = memory, arguments, grid
        memory.clock, memory.findings = self.clock, self.findings
        memory.forget_launches()
        positions = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        with np.errstate(all="ignore"):
            for self.clock.program, position in enumerate(positions):
                if only is None or position in only:
                    self._run(position, shared, most)

    def _run(self, position: tuple[int, int, int], shared: int, most: int) -> None:
        self.position = position
        self.shared = Memory("shared", max(shared, 16), SHARED_BASE, self.clock, self.findings)
        self.shared.allocated[:] = True
        self.registers, self.written_at = {}, {}
        self.round_trips.begin()
        self.copies: list[list] = [[]]  # groups of cp.async under way; the last one is open
        self.products: list[list] = [[]]  # groups of wgmma likewise
        self.in_product: Counter[str] = Counter()  # registers that products under way use
        self.of_product: set[str] = set()  # registers last written by a product
        self.product_fence = self.proxy_fence = -1
        self.clock.epoch += 1
        self.clock.step = at = 0
        while at < len(self.steps):
            self.current = self.program.code[at]
            self.clock.step += 1
            self.asked = False
            try:
                target = self.steps[at](None)
            except Fault as fault:
                raise Fault(f"program {position}, {self.current.text[:200]}: {fault}") from None
            self.round_trips.follow(at, self.asked)
            if target == self.END:
                break
            at = at + 1 if target is None else target
            if self.clock.step > most:
                raise Fault("runs forever")
        if any(self.products):
            self.findings.note("a product is not waited for at the end")
        self.longest = max(self.longest, self.clock.step)
        self.counts.update({"programs": 1, "instructions": self.clock.step, "round trips": self.round_trips.issued})


def immediate(text: str, dtype: np.dtype) -> Any:
    """A number in an operand's place."""
    if text.startswith(("0f", "0d")):
        bits = np.array(int(text[2:], 16), np.uint32 if text[1] == "f" else np.uint64)
        value = bits.view(np.float32 if text[1] == "f" else np.float64)
        return value[()] if dtype.kind == "f" else bits.astype(dtype)[()]
    number = int(text, 0)
    if dtype.kind not in "ui":
        return dtype.type(number)
    return np.array(number % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]


# --- control flow ----------------------------------------------------------------------------------------------------


@instruction("bra")
def _branch(machine: Machine, ins: Instruction) -> Step:
    label = ins.operands[-1]

    def step(mask: Mask) -> int | None:
        if mask is None or mask.all():
            return machine.program.labels[label]
        if mask.any():
            raise Fault("a branch that not all threads of the block take")
        return None

    return step


@instruction("ret", "exit")
def _return(machine: Machine, _ins: Instruction) -> Step:
    def step(mask: Mask) -> int | None:
        if mask is None or mask.all():
            return machine.END
        if mask.any():
            raise Fault("a return that not all threads of the block take")
        return None

    return step


@instruction("bar", "barrier")
def _barrier(machine: Machine, _ins: Instruction) -> Step:
    def step(mask: Mask) -> None:
        if mask is not None and not mask.all():
            raise Fault("a barrier that not all threads of the block reach")
        machine.clock.epoch += 1
        machine.counts["barriers"] += 1

    return step


@instruction("fence")
def _fence(machine: Machine, ins: Instruction) -> Step:
    def step(_mask: Mask) -> None:
        if "proxy" in ins.parts:
            machine.proxy_fence = machine.clock.step

    return step


@instruction("membar", "nop", "griddepcontrol")
def _nothing(_machine: Machine, _ins: Instruction) -> Step:
    return lambda _mask: None
