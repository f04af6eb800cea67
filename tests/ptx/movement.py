"""Between memory and registers, and between the registers of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine import TYPES, Instruction, Machine, Mask, Step, instruction
from .memory import Fault, Memory
from .program import vector

__all__: list[str] = []

LANE = np.arange(32)


def _space(ins: Instruction) -> str:
    return next((part for part in ins.parts if part in ("global", "shared", "param")), "generic")


def _memory(machine: Machine, space: str) -> Memory:
    return machine.memory if space == "global" else machine.shared


@instruction("ld")
def _load(machine: Machine, ins: Instruction) -> Step:
    space = _space(ins)
    if space == "param":
        return _load_parameter(machine, ins)
    if space == "generic":
        raise Fault(f"a generic address: {ins.text}")
    dtype = np.dtype(TYPES[ins.type])
    registers = vector(ins.operands[0])
    size, width = dtype.itemsize, dtype.itemsize * ins.number(r"v(\d)")
    address = machine.address(ins.operands[1], space)
    writers = [machine.writer(register) for register in registers]
    widened = dtype.kind == "i" and registers[0].startswith("%rd") and size == 4

    def step(mask: Mask) -> None:
        mask = machine.everyone if mask is None else mask
        raw = _memory(machine, space).load(address(), width, mask, machine.warp)
        for k, write in enumerate(writers):
            value = np.ascontiguousarray(raw[:, k * size : (k + 1) * size]).view(dtype)[:, 0]
            write(value.astype(np.int64) if widened else value.view(f"u{size}"), mask)
        if space == "global" and mask.any():
            machine.counts["bytes loaded"] += width * int(mask.sum())
            machine.asked = True

    return step


def _load_parameter(machine: Machine, ins: Instruction) -> Step:
    name, size = ins.operands[1].strip("[] "), np.dtype(TYPES[ins.type]).itemsize
    write = machine.writer(ins.operands[0])
    signed = ins.type == "s32" and ins.operands[0].startswith("%rd")

    def step(mask: Mask) -> None:
        value = machine.arguments[name]
        if isinstance(value, float):
            write(np.float32(value) if size == 4 else np.float64(value), mask)
        elif signed:
            write(np.int64(np.uint32(int(value) & 0xFFFFFFFF).astype(np.int32)), mask)
        else:
            write(np.array(int(value) % (1 << 8 * size), f"u{size}"), mask)

    return step


@instruction("st")
def _store(machine: Machine, ins: Instruction) -> Step:
    space = _space(ins)
    dtype = f"u{np.dtype(TYPES[ins.type]).itemsize}"
    address = machine.address(ins.operands[0], space)
    readers = [machine.reader(register, dtype) for register in vector(ins.operands[1])]

    def step(mask: Mask) -> None:
        mask = machine.everyone if mask is None else mask
        columns = [np.broadcast_to(read(), (machine.threads,)) for read in readers]
        raw = np.stack(columns, 1).view(np.uint8).reshape(machine.threads, -1)
        _memory(machine, space).store(address(), raw, mask, machine.warp)
        if space == "global":
            machine.counts["bytes stored"] += raw.shape[1] * int(mask.sum())

    return step


# --- asynchronous copies ---------------------------------------------------------------------------------------------


@instruction("cp")
def _copy(machine: Machine, ins: Instruction) -> Step:
    """cp.async: what it writes is there after the wait for its group, and for other warps after a barrier."""
    if "commit_group" in ins.parts:

        def close(_mask: Mask) -> None:
            machine.copies.append([])
            machine.round_trips.close_copies()

        return close
    if "wait_group" in ins.parts or "wait_all" in ins.parts:
        left = int(ins.operands[0]) if ins.operands else 0
        return lambda _mask: _wait_for_copies(machine, left)
    width = int(ins.operands[2], 0)
    target, source = machine.address(ins.operands[0], "shared"), machine.address(ins.operands[1], "global")
    filled = machine.reader(ins.operands[3], np.uint32) if len(ins.operands) > 3 else (lambda: np.uint32(width))

    def step(mask: Mask) -> None:
        mask = machine.everyone if mask is None else mask
        taken = np.broadcast_to(filled(), (machine.threads,))
        if not np.isin(taken[mask], (0, width)).all():
            raise Fault("a copy of less than its width")
        reads = mask & (taken > 0)
        offset = machine.shared.offsets(target(), width, mask, "cp.async")
        cells, warp = Memory.cells(offset, width, mask, machine.warp)
        machine.shared.check_write(cells, warp, by_copy=True)
        machine.shared.arriving[cells] = True
        raw = machine.memory.load(np.where(reads, source(), machine.memory.base), width, reads, machine.warp)
        raw = np.where(reads[:, None], raw, 0)[mask]
        machine.copies[-1].append((offset[mask][:, None] + np.arange(width), raw, cells, warp))
        machine.asked = bool(reads.any())
        machine.counts["bytes loaded"] += width * int(reads.sum())

    return step


def _wait_for_copies(machine: Machine, left: int) -> None:
    machine.round_trips.await_copies(left)
    while len(machine.copies) > left + 1:
        for at, raw, cells, warp in machine.copies.pop(0):
            shared = machine.shared
            shared.bytes[at] = raw
            shared.arriving[cells] = False
            shared.write_epoch[cells], shared.write_warp[cells] = machine.clock.epoch, warp


# --- within a warp ---------------------------------------------------------------------------------------------------


@instruction("shfl")
def _shuffle(machine: Machine, ins: Instruction) -> Step:
    mode = ins.parts[2]
    if int(ins.operands[4], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Fault(f"a shuffle of a part of a warp: {ins.text}")
    write = machine.writer(ins.operands[0].split("|")[0])
    read, by = machine.reader(ins.operands[1], np.uint32), machine.reader(ins.operands[2], np.uint32)

    def step(mask: Mask) -> None:
        value, distance = (np.broadcast_to(t, (machine.threads,)).reshape(-1, 32) for t in (read(), by()))
        distance = distance.astype(np.int64) & 31
        if mode == "bfly":
            lane = LANE ^ distance
        elif mode == "idx":
            lane = distance
        elif mode == "up":
            lane = np.where(distance <= LANE, LANE - distance, LANE)
        else:
            lane = np.where(LANE + distance < 32, LANE + distance, LANE)
        write(np.take_along_axis(value, lane, 1).reshape(-1), mask)

    return step


@instruction("redux")
def _reduce(machine: Machine, ins: Instruction) -> Step:
    """redux.sync: every lane gets the warp's sum, minimum, …"""
    dtype = TYPES[ins.type]
    of = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}[ins.parts[2]]
    read, write = machine.reader(ins.operands[1], dtype), machine.writer(ins.operands[0])

    def step(mask: Mask) -> None:
        value = np.broadcast_to(read(), (machine.threads,)).reshape(-1, 32)
        write(np.repeat(of.reduce(value, axis=1), 32), mask)

    return step


def _matrix_cells(machine: Machine, address: np.ndarray, matrices: int) -> np.ndarray:
    """[warps, matrices, 8 rows, 8 columns] cells of the 8 × 8 matrices whose rows the lanes' addresses point to."""
    rows = address.reshape(-1, 32)[:, : 8 * matrices].reshape(-1, matrices, 8)
    offset = rows - machine.shared.base
    if (offset < 0).any() or (offset + 16 > machine.shared.size).any() or (offset % 16).any():
        raise Fault("a row of a matrix outside of shared memory, or misaligned")
    return offset[..., None] // 2 + np.arange(8)


def _by_warp(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = cells.reshape(cells.shape[0], -1)
    return flat, np.broadcast_to(np.arange(cells.shape[0])[:, None], flat.shape)


@instruction("ldmatrix")
def _load_matrix(machine: Machine, ins: Instruction) -> Step:
    writers = [machine.writer(register) for register in vector(ins.operands[0])]
    address = machine.address(ins.operands[1], "shared")

    def step(mask: Mask) -> None:
        cells = _matrix_cells(machine, address(), len(writers))
        machine.shared.check_read(*_by_warp(cells))
        matrix = machine.shared.bytes.view(np.uint16)[cells]
        if "trans" in ins.parts:
            matrix = matrix.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrix).view(np.uint32)  # [warps, matrices, 8, 4]
        for k, write in enumerate(writers):
            write(pairs[:, k].reshape(-1), mask)

    return step


@instruction("stmatrix")
def _store_matrix(machine: Machine, ins: Instruction) -> Step:
    address = machine.address(ins.operands[0], "shared")
    readers = [machine.reader(register, np.uint32) for register in vector(ins.operands[1])]

    def step(_mask: Mask) -> None:
        cells = _matrix_cells(machine, address(), len(readers))
        values = [np.broadcast_to(read(), (machine.threads,)).reshape(-1, 8, 4) for read in readers]
        matrix = np.ascontiguousarray(np.stack(values, 1)).view(np.uint16)  # [warps, matrices, 8, 8]
        if "trans" in ins.parts:
            matrix = matrix.swapaxes(2, 3)
        held: Any = machine.shared.bytes.view(np.uint16)
        same = held[cells] == matrix
        held[cells] = matrix
        if not np.array_equal(held[cells], matrix):
            machine.findings.note("shared one store writes different values to one address")
        machine.shared.check_write(*_by_warp(cells), same.reshape(same.shape[0], -1))

    return step
