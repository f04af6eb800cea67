"""Products on matrix units: mma.sync of sm_80, wgmma of sm_90a, of 16-bit operands with sums in float32."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from .machine import Instruction, Machine, Mask, Step, instruction
from .memory import Fault
from .program import vector

__all__: list[str] = []

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4 * 2  # of a lane's first element in an 8 × 8 part
EXTRA_BITS = 2  # that a matrix unit keeps below the 24 of float32 while it adds


def _number(raw: np.ndarray, kind: str) -> np.ndarray:
    return (
        (raw.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bf16" else raw.view(np.float16).astype(np.float32)
    )


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, truncate: bool) -> np.ndarray:
    """c + a b in float32, for [.., M, 16] and [.., 16, N]; the sum is exact, or what ``truncate`` of a machine says."""
    wide = c.astype(np.float64)
    if not truncate:
        return (wide + a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    products = a.astype(np.float64)[..., :, None, :] * np.swapaxes(b.astype(np.float64), -1, -2)[..., None, :, :]
    largest = np.maximum(np.abs(products).max(-1), np.abs(wide))
    _, exponent = np.frexp(largest)
    last_bit = np.where(largest == 0, 1.0, np.exp2((exponent - 24 - EXTRA_BITS).astype(np.float64)))
    total = (np.trunc(products / last_bit[..., None]).sum(-1) + np.trunc(wide / last_bit)) * last_bit
    mantissa, exponent = np.frexp(total)
    total = np.ldexp(np.trunc(mantissa * 2**24), exponent - 24)
    finite = np.isfinite(products).all(-1) & np.isfinite(wide)
    return np.where(finite, total, wide + products.sum(-1)).astype(np.float32)


def _lanes(machine: Machine, read: Any) -> np.ndarray:
    """[warps, 32] of an operand."""
    return np.broadcast_to(read(), (machine.threads,)).reshape(-1, 32)


def _put_pair(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, value: np.ndarray) -> None:
    """The low and the high half of each lane's 32 bits, next to each other along the columns."""
    matrix[:, rows, columns] = value & np.uint32(0xFFFF)
    matrix[:, rows, columns + 1] = value >> np.uint32(16)


@instruction("mma")
def _mma(machine: Machine, ins: Instruction) -> Step:
    if "m16n8k16" not in ins.parts or ins.parts[-3:-1] not in (("bf16", "bf16"), ("f16", "f16")):
        raise Fault(f"unknown product: {ins.text}")
    kind = ins.parts[-2]
    d, a, b, c = (vector(operand) for operand in ins.operands)
    writers = [machine.writer(register) for register in d]
    read_a, read_b = ([machine.reader(register, np.uint32) for register in registers] for registers in (a, b))
    read_c = [machine.reader(register, np.float32) for register in c]
    warps = machine.threads // 32

    def step(mask: Mask) -> None:
        left, right = np.zeros((warps, 16, 16), np.uint16), np.zeros((warps, 8, 16), np.uint16)  # right by columns
        total = np.zeros((warps, 16, 8), np.float32)
        for k, read in enumerate(read_a):
            _put_pair(left, ROW + 8 * (k % 2), COLUMN + 8 * (k // 2), _lanes(machine, read))
        for k, read in enumerate(read_b):
            _put_pair(right, ROW, COLUMN + 8 * k, _lanes(machine, read))
        for k, read in enumerate(read_c):
            total[:, ROW + 8 * (k // 2), COLUMN + k % 2] = _lanes(machine, read)
        total = multiply(_number(left, kind), _number(right, kind).swapaxes(1, 2), total, machine.truncate)
        machine.counts["products"] += 1
        for k, write in enumerate(writers):
            write(total[:, ROW + 8 * (k // 2), COLUMN + k % 2].reshape(-1), mask)

    return step


# --- warpgroups ------------------------------------------------------------------------------------------------------


@instruction("wgmma")
def _wgmma(machine: Machine, ins: Instruction) -> Step:
    """Runs on by itself until its group is waited for. Four warps form a group of 64 rows, 16 to a warp."""
    if ins.parts[1] == "fence":

        def fence(_mask: Mask) -> None:
            machine.product_fence = machine.clock.step

        return fence
    if ins.parts[1] == "commit_group":
        return lambda _mask: machine.products.append([])
    if ins.parts[1] == "wait_group":
        left = int(ins.operands[0])
        return lambda _mask: _wait_for_products(machine, left)
    return _product(machine, ins)


def _wait_for_products(machine: Machine, left: int) -> None:
    while len(machine.products) > left + 1:
        for registers, operands in machine.products.pop(0):
            machine.in_product -= Counter(registers)
            for cells, warp in operands:
                np.subtract.at(machine.shared.products, cells.reshape(-1), 1)
                machine.shared.mark_read(cells, warp)


def _product(machine: Machine, ins: Instruction) -> Step:
    shape = re.search(r"\.m64n(\d+)k16\.f32\.(bf16|f16)\.(?:bf16|f16)", ins.text)
    if not shape or [int(t) for t in ins.operands[4:6]] != [1, 1]:
        raise Fault(f"unknown product: {ins.text}")
    n, kind = int(shape[1]), shape[2]
    d = vector(ins.operands[0])
    a = vector(ins.operands[1]) if ins.operands[1].startswith("{") else []  # else in shared memory
    turned = [int(t) for t in ins.operands[6:]]
    turned_a, turned_b = (0, turned[0]) if a else turned
    descriptor_b = machine.reader(ins.operands[2], np.uint64)
    descriptor_a = None if a else machine.reader(ins.operands[1], np.uint64)
    adds = ins.operands[3]
    read_adds = machine.reader(adds, np.bool_) if adds.startswith("%") else (lambda: np.bool_(int(adds, 0)))
    read_d = [machine.reader(register, np.float32) for register in d]
    read_a = [machine.reader(register, np.uint32) for register in a]
    writers = [machine.writer(register) for register in d]
    groups = machine.threads // 128
    places = [(ROW + 8 * (k % 4 // 2), k // 4 * 8 + COLUMN + k % 2) for k in range(len(d))]

    def of_warps(matrix: np.ndarray) -> np.ndarray:
        """[groups, 64, n] as [warps, 16, n]."""
        return matrix.reshape(4 * groups, 16, -1)

    def step(_mask: Mask) -> None:
        under_way, machine.in_product = machine.in_product, Counter()  # products may follow one another
        fresh = [r for r in (*d, *a) if machine.written_at.get(r, -1) > machine.product_fence and r not in machine.of_product]
        if fresh:
            machine.findings.note("a product uses a register written after the last wgmma.fence", fresh[0])
        total = np.zeros((groups, 64, n), np.float32)
        add = np.broadcast_to(read_adds(), (machine.threads,))
        if add.any() != add.all():
            raise Fault("scale-d differs between threads")
        if add.all():
            for (rows, columns), read in zip(places, read_d, strict=True):
                of_warps(total)[:, rows, columns] = _lanes(machine, read)
        operands: list[tuple[np.ndarray, np.ndarray]] = []
        if descriptor_a is None:
            left = np.zeros((groups, 64, 16), np.uint16)
            for k, read in enumerate(read_a):
                _put_pair(of_warps(left), ROW + 8 * (k % 2), COLUMN + 8 * (k // 2), _lanes(machine, read))
        else:
            left = _operand(machine, descriptor_a(), 64, turned_a, operands)
        right = _operand(machine, descriptor_b(), n, turned_b, operands)
        total = multiply(_number(left, kind), _number(right, kind).swapaxes(1, 2), total, machine.truncate)
        machine.counts["products"] += 1
        for (rows, columns), write in zip(places, writers, strict=True):
            write(of_warps(total)[:, rows, columns].reshape(-1), None)
        machine.of_product.update(d)
        machine.in_product = under_way
        machine.in_product.update((*d, *a))
        machine.products[-1].append(((*d, *a), operands))

    return step


SWIZZLES = {1: 128, 2: 64, 3: 32}  # layout of a descriptor: bytes in which 16-byte pieces are exchanged


def _operand(machine: Machine, descriptor: np.ndarray, rows: int, turned: int, used: list) -> np.ndarray:
    """[groups, rows, 16] of 16 bits from shared memory; ``turned``: consecutive rows, not columns, lie side by side."""
    each = np.broadcast_to(descriptor, (machine.threads,)).reshape(-1, 128)
    if not (each == each[:, :1]).all():
        raise Fault("a descriptor differs within a warpgroup")
    out = np.zeros((len(each), rows, 16), np.uint16)
    for group, value in enumerate(each[:, 0].tolist()):
        address = _operand_addresses(value, rows, turned)
        offset = address - machine.shared.base
        if (offset < 0).any() or (offset + 2 > machine.shared.size).any():
            raise Fault(f"descriptor {value:#x} leads out of shared memory")
        cells, warp = offset // 2, np.full(offset.shape, 4 * group)
        _check_operand(machine, cells)
        np.add.at(machine.shared.products, cells.reshape(-1), 1)
        used.append((cells, warp))
        out[group] = machine.shared.bytes.view(np.uint16)[cells]
    return out


def _operand_addresses(descriptor: int, rows: int, turned: int) -> np.ndarray:
    """[rows, 16] addresses; bits of the descriptor as the PTX manual lays them out."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Fault("a descriptor with a base offset")
    layout = descriptor >> 62 & 3
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if turned:
        wide = SWIZZLES[layout] // 2 if layout else 8
        along, across = (leading, stride) if layout else (stride, leading)
        address = start + row // wide * along + row % wide * 2 + k // 8 * across + k % 8 * 2 * wide
    elif layout:
        address = start + row // 8 * stride + row % 8 * SWIZZLES[layout] + k * 2
    else:
        address = start + row // 8 * stride + row % 8 * 16 + k // 8 * leading + k % 8 * 2
    pieces = SWIZZLES[layout] // 16 - 1 if layout else 0
    return address ^ ((address >> 7 & pieces) << 4)


def _check_operand(machine: Machine, cells: np.ndarray) -> None:
    shared, findings = machine.shared, machine.findings
    if shared.arriving[cells].any():
        findings.note("a product reads a copy under way")
    if not shared.written[cells].all():
        findings.note("a product reads shared memory that nothing wrote")
    if (shared.write_epoch[cells] == machine.clock.epoch).any():
        findings.note("a product reads shared memory written since the last barrier")
    if ((shared.write_step[cells] > machine.proxy_fence) & ~shared.by_copy[cells]).any():
        findings.note("a product reads shared memory written after the last fence.proxy.async")
