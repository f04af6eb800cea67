"""Numbers: arithmetic, comparisons, conversions, moves between registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import TYPES, Instruction, Machine, Mask, Step, instruction
from .memory import Fault
from .program import vector

__all__ = ["to_bfloat16"]

WIDER = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}


def to_bfloat16(value: Any) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    value = np.atleast_1d(np.asarray(value, np.float32))
    bits = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def to_float16(value: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(value)).astype(np.float16).view(np.uint16)


# --- arithmetic ------------------------------------------------------------------------------------------------------

BOTH: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip


@instruction(*BOTH)
def _arithmetic(machine: Machine, ins: Instruction) -> Step:
    dtype, of = TYPES[ins.type], BOTH[ins.name]
    if ins.name == "mul" and ins.parts[1] == "wide":
        wide = WIDER[dtype]
        return machine.function(ins, [dtype] * 2, lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide))
    if ins.name == "mul" and ins.parts[1] == "hi":
        wide = WIDER[dtype]
        bits = wide(8 * np.dtype(dtype).itemsize)
        return machine.function(
            ins, [dtype] * 2, lambda a, b: ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> bits).astype(dtype)
        )
    return machine.function(ins, [dtype] * 2, of)


@instruction("max", "min")
def _extreme(machine: Machine, ins: Instruction) -> Step:
    """Without .NaN, the one operand that is a number."""
    dtype = TYPES[ins.type]
    drops = np.dtype(dtype).kind == "f" and "NaN" not in ins.parts
    of = {("max", True): np.fmax, ("max", False): np.maximum, ("min", True): np.fmin, ("min", False): np.minimum}
    return machine.function(ins, [dtype] * 2, of[ins.name, drops])


@instruction("mad")
def _multiply_add(machine: Machine, ins: Instruction) -> Step:
    dtype = TYPES[ins.type]
    if ins.parts[1] != "wide":
        return machine.function(ins, [dtype] * 3, lambda a, b, c: a * b + c)
    wide = WIDER[dtype]
    return machine.function(
        ins, [dtype, dtype, wide], lambda a, b, c: np.asarray(a).astype(wide) * np.asarray(b).astype(wide) + c
    )


@instruction("fma")
def _fused(machine: Machine, ins: Instruction) -> Step:
    """In float64, where products of float32 are exact. For float64 rounded twice, which a GPU does not."""
    dtype = TYPES[ins.type]

    def of(a: Any, b: Any, c: Any) -> Any:
        return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(dtype)

    return machine.function(ins, [dtype] * 3, of)


@instruction("div")
def _divide(machine: Machine, ins: Instruction) -> Step:
    dtype = TYPES[ins.type]

    def of(a: Any, b: Any) -> Any:
        if np.dtype(dtype).kind == "f":
            return np.asarray(a, dtype) / np.asarray(b, dtype)
        b = np.where(np.asarray(b) == 0, dtype(1), b)  # what a GPU gives there is not used
        quotient = np.abs(a) // np.abs(b)
        return np.where((np.asarray(a) < 0) != (np.asarray(b) < 0), -quotient, quotient).astype(dtype)

    return machine.function(ins, [dtype] * 2, of)


@instruction("rem")
def _remainder(machine: Machine, ins: Instruction) -> Step:
    dtype = TYPES[ins.type]
    return machine.function(ins, [dtype] * 2, lambda a, b: np.fmod(a, np.where(np.asarray(b) == 0, dtype(1), b)))


APPROXIMATE: dict[str, Callable] = {
    "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda t: 1 / np.sqrt(t),
}  # fmt: skip


@instruction(*APPROXIMATE)
def _approximate(machine: Machine, ins: Instruction) -> Step:
    dtype, of = TYPES[ins.type], APPROXIMATE[ins.name]
    return machine.function(ins, [dtype], lambda t: of(np.asarray(t, np.float64)).astype(dtype))


# --- bits ------------------------------------------------------------------------------------------------------------


@instruction("shl", "shr")
def _shift(machine: Machine, ins: Instruction) -> Step:
    """By as many bits as there are or more: nothing is left, but the sign of a signed number shifted right."""
    dtype = np.dtype(TYPES[ins.type])
    bits = 8 * dtype.itemsize

    def of(value: Any, by: Any) -> Any:
        value, by = np.asarray(value), np.asarray(by)
        if ins.name == "shr" and dtype.kind == "i":
            return value >> np.minimum(by, bits - 1).astype(dtype)
        shifted = (np.right_shift if ins.name == "shr" else np.left_shift)(value, np.minimum(by, bits - 1).astype(dtype))
        return np.where(by < bits, shifted, dtype.type(0))

    return machine.function(ins, [dtype, np.uint32], of)


@instruction("bfe")
def _bit_field(machine: Machine, ins: Instruction) -> Step:
    dtype, start, length = TYPES[ins.type], int(ins.operands[2], 0), int(ins.operands[3], 0)

    def of(value: Any) -> Any:
        field = np.asarray(value).astype(np.int64) >> start & ((1 << length) - 1)
        if np.dtype(dtype).kind == "i":
            field = np.where(field >> (length - 1) & 1, field - (1 << length), field)
        return field.astype(dtype)

    return machine.function(ins, [np.uint32], of)


@instruction("prmt")
def _permute(machine: Machine, ins: Instruction) -> Step:
    def of(low: Any, high: Any, selector: Any) -> Any:
        both = np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)
        out = np.uint64(0)
        for k in range(4):
            choice = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * k) & np.uint64(15)
            byte = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out = out | np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * k)
        return np.asarray(out).astype(np.uint32)

    if len(ins.parts) != 2:
        raise Fault(f"unknown mode: {ins.text}")
    return machine.function(ins, [np.uint32] * 3, of)


# --- choices ---------------------------------------------------------------------------------------------------------

COMPARE: dict[str, Callable] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
OPPOSITE = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "neu": "eq"}


def _comparison(name: str, is_float: bool) -> Callable:
    """Ordered ones are false where an operand is NaN; those that end in u are true."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in OPPOSITE:
        opposite = COMPARE[OPPOSITE[name]]
        return lambda a, b: ~opposite(a, b)
    if name == "equ":
        return lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return (lambda a, b: (a < b) | (a > b)) if is_float else np.not_equal
    return COMPARE[name]


@instruction("setp")
def _compare(machine: Machine, ins: Instruction) -> Step:
    dtype = TYPES[ins.type]
    of = _comparison(ins.parts[1], np.dtype(dtype).kind == "f")
    if ins.parts[2] in ("and", "or", "xor"):
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[ins.parts[2]]
        return machine.function(ins, [dtype, dtype, np.bool_], lambda a, b, c: combine(of(a, b), c))
    return machine.function(ins, [dtype] * 2, of)


@instruction("selp")
def _select(machine: Machine, ins: Instruction) -> Step:
    dtype = np.dtype(f"u{np.dtype(TYPES[ins.type]).itemsize}")
    readers = [machine.reader(operand, dtype) for operand in ins.operands[1:3]]
    condition, write = machine.reader(ins.operands[3], np.bool_), machine.writer(ins.operands[0])
    return lambda mask: write(np.where(condition(), readers[0](), readers[1]()), mask)


# --- moves and conversions -------------------------------------------------------------------------------------------


@instruction("mov")
def _move(machine: Machine, ins: Instruction) -> Step:
    target, source = ins.operands
    if target.startswith("{"):
        return _unpack(machine, ins)
    if source.startswith("{"):
        return _pack(machine, ins)
    if ins.type == "pred" and not source.startswith("%"):
        value, write = source != "0", machine.writer(target)
        return lambda mask: write(np.full(machine.threads, value), mask)
    dtype = np.dtype(TYPES[ins.type])
    return machine.function(ins, [f"u{dtype.itemsize}" if dtype.kind == "f" else dtype], np.array)


def _unpack(machine: Machine, ins: Instruction) -> Step:
    registers = vector(ins.operands[0])
    whole = np.dtype(f"u{np.dtype(TYPES[ins.type]).itemsize}")
    bits = 8 * whole.itemsize // len(registers)
    read = machine.reader(ins.operands[1], whole)
    writers = [(k, machine.writer(register)) for k, register in enumerate(registers) if register != "_"]

    def step(mask: Mask) -> None:
        value = read()
        for k, write in writers:
            write((value >> whole.type(bits * k)).astype(f"u{bits // 8}"), mask)

    return step


def _pack(machine: Machine, ins: Instruction) -> Step:
    registers = vector(ins.operands[1])
    whole = np.dtype(f"u{np.dtype(TYPES[ins.type]).itemsize}")
    bits = 8 * whole.itemsize // len(registers)
    readers = [machine.reader(register, f"u{bits // 8}") for register in registers]
    write = machine.writer(ins.operands[0])

    def step(mask: Mask) -> None:
        value = whole.type(0)
        for k, read in enumerate(readers):
            value = value | np.asarray(read()).astype(whole) << whole.type(bits * k)
        write(value, mask)

    return step


@instruction("cvt")
def _convert(machine: Machine, ins: Instruction) -> Step:
    target, source = ins.parts[-2:]
    pack = {"bf16x2": to_bfloat16, "f16x2": to_float16}.get(target)
    if pack:

        def both(high: Any, low: Any) -> Any:
            return pack(high).astype(np.uint32) << np.uint32(16) | pack(low).astype(np.uint32)

        return machine.function(ins, [np.float32] * 2, both)
    if source == "bf16":
        return machine.function(ins, [np.uint16], lambda t: (np.asarray(t).astype(np.uint32) << np.uint32(16)).view(np.float32))
    if source == "f16":
        return machine.function(ins, [np.uint16], lambda t: np.asarray(t).view(np.float16).astype(TYPES[target]))
    dtype = TYPES[source]
    if target in ("bf16", "f16"):
        rounded = to_bfloat16 if target == "bf16" else to_float16
        return machine.function(ins, [dtype], lambda t: rounded(np.asarray(t).astype(np.float32)))
    return machine.function(ins, [dtype], lambda t: np.asarray(t).astype(TYPES[target]))
