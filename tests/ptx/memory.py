"""Memory that remembers who touched it, and reports what a GPU would leave to chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Clock", "Fault", "Findings", "Memory"]

NOBODY, SEVERAL = -1, -2
GUARD = 256  # bytes between two tensors


class Fault(Exception):
    """The program can't go on: what a GPU would answer with an error, or what is not known here."""


@dataclass
class Findings:
    """What was noticed, how often, and a few places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    where: Callable[[], str] = str

    def note(self, what: str, detail: str = "") -> None:
        self.counts[what] += 1
        places = self.examples.setdefault(what, [])
        if len(places) < 4:
            places.append(f"{self.where()} {detail}".rstrip())

    def __str__(self) -> str:
        return "\n".join(f"{n} × {what}\n    " + "\n    ".join(self.examples[what]) for what, n in self.counts.items())


@dataclass
class Clock:
    """Instructions executed by this program, barriers passed by all of them so far, and which program it is."""

    step: int = 0
    epoch: int = 0
    program: int = 0


def _same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal bytes, [threads, width], or NaN on both sides: which NaN depends on the order of operands."""
    if np.array_equal(one, other):
        return True
    if one.shape[1] % 4:
        return False
    floats = [np.ascontiguousarray(t).view(np.float32) for t in (one, other)]
    return bool(((floats[0].view(np.uint32) == floats[1].view(np.uint32)) | (np.isnan(floats[0]) & np.isnan(floats[1]))).all())


class Memory:
    """Global memory of a launch, or shared memory of a block, in cells of two bytes.

    Two accesses by different warps with no barrier between them, one of them a write of another value, are a race. So are, in
    global memory, those of two programs of a launch.
    """

    def __init__(self, name: str, size: int, base: int, clock: Clock, findings: Findings) -> None:
        size = -(-size // 16) * 16
        cells = size // 2
        self.name, self.size, self.base, self.clock, self.findings = name, size, base, clock, findings
        self.bytes = np.zeros(size, np.uint8)
        self.allocated, self.written = np.zeros(cells, bool), np.zeros(cells, bool)
        self.write_epoch, self.write_warp = np.full(cells, -1, np.int32), np.full(cells, NOBODY, np.int16)
        self.read_epoch, self.read_warp = np.full(cells, -1, np.int32), np.full(cells, NOBODY, np.int16)
        self.writer, self.reader = np.full(cells, NOBODY, np.int32), np.full(cells, NOBODY, np.int32)
        self.write_step = np.full(cells, -1, np.int64)
        self.by_copy = np.zeros(cells, bool)  # last written by cp.async
        self.arriving = np.zeros(cells, bool)  # cp.async under way
        self.products = np.zeros(cells, np.int16)  # wgmma under way that read it
        self.top = GUARD

    def place(self, raw: np.ndarray, written: np.ndarray | bool = True) -> int:
        """Takes in the bytes of a tensor and returns their address; ``written``: which cells hold something."""
        at, end = self.top, self.top + raw.size
        if end > self.size:
            raise Fault("simulated memory is full")
        self.bytes[at:end] = raw
        cells = slice(at // 2, (end + 1) // 2)
        self.allocated[cells], self.written[cells] = True, written
        self.top = -(-end // GUARD) * GUARD + GUARD
        return self.base + at

    def forget_launches(self) -> None:
        """What came before this launch is over."""
        for marks in (self.writer, self.reader, self.write_epoch, self.read_epoch):
            marks[:] = NOBODY

    # --- checks ------------------------------------------------------------------------------------------------------

    def offsets(self, address: np.ndarray, width: int, mask: np.ndarray, what: str) -> np.ndarray:
        """Of each thread's access of ``width`` bytes; 0 where it makes none."""
        offset = address - self.base
        bad = mask & ((offset < 0) | (offset + width > self.size) | (offset % width != 0))
        if bad.any():
            thread = int(np.argmax(bad))
            raise Fault(
                f"{self.name} {what} out of range or misaligned: thread {thread}, offset {offset[thread]}, {width} bytes"
            )
        return np.where(mask, offset, 0)

    @staticmethod
    def cells(offset: np.ndarray, width: int, mask: np.ndarray, warp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cells of the accesses that are made, and whose they are."""
        cells = (offset[mask] // 2)[:, None] + np.arange(max(width // 2, 1))
        return cells, np.broadcast_to(warp[mask][:, None], cells.shape)

    def _note(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            self.findings.note(f"{self.name} {what}", f"{int(wrong.sum())} cells")

    def mark_read(self, cells: np.ndarray, warp: np.ndarray) -> None:
        several = (self.read_epoch[cells] == self.clock.epoch) & (self.read_warp[cells] != warp)
        self.read_warp[cells] = np.where(several, SEVERAL, warp)
        self.read_epoch[cells] = self.clock.epoch

    def check_read(self, cells: np.ndarray, warp: np.ndarray) -> None:
        clock = self.clock
        self._note(~self.allocated[cells], "read outside of any tensor")
        self._note(~self.written[cells], "read of what nothing wrote")
        self._note(self.arriving[cells], "read of a copy under way")
        race = (self.write_epoch[cells] == clock.epoch) & (self.write_warp[cells] != warp)
        self._note(race, "race: read after another warp's write, no barrier")
        if self.name == "global":
            writer, reader = self.writer[cells], self.reader[cells]
            self._note((writer != NOBODY) & (writer != clock.program), "read of what another program of the launch writes")
            alone = (reader == NOBODY) | (reader == clock.program)
            self.reader[cells] = np.where(alone, clock.program, SEVERAL)
        self.mark_read(cells, warp)

    def check_write(self, cells: np.ndarray, warp: np.ndarray, same: np.ndarray | bool = False, by_copy: bool = False) -> None:
        """``same``: where the value was there before, which is no race of values; it is reported apart."""
        clock = self.clock
        if not self.allocated[cells].all():
            raise Fault(f"{self.name} write outside of any tensor")
        self._note(self.arriving[cells], "write over a copy under way")
        self._note(self.products[cells] > 0, "write under a product under way")
        race = (self.read_epoch[cells] == clock.epoch) & (self.read_warp[cells] != warp)
        self._note(race, "race: write after another warp's read, no barrier")
        race = (self.write_epoch[cells] == clock.epoch) & (self.write_warp[cells] != warp)
        self._note(race & ~np.asarray(same), "race: two warps write different values, no barrier")
        if self.name == "global":
            writer, reader = self.writer[cells], self.reader[cells]
            others = (writer != NOBODY) & (writer != clock.program)
            self._note(others & same, "write of what another program of the launch wrote, the same value")
            read = (reader != NOBODY) & (reader != clock.program)
            self._note((others | read) & ~np.asarray(same), "write of what another program of the launch reads or writes")
            self.writer[cells] = clock.program
        self.write_epoch[cells], self.write_warp[cells], self.write_step[cells] = clock.epoch, warp, clock.step
        self.written[cells], self.by_copy[cells] = True, by_copy

    # --- accesses ----------------------------------------------------------------------------------------------------

    def load(self, address: np.ndarray, width: int, mask: np.ndarray, warp: np.ndarray) -> np.ndarray:
        """[threads, width] bytes."""
        offset = self.offsets(address, width, mask, "load")
        if mask.any():
            self.check_read(*self.cells(offset, width, mask, warp))
        return self.bytes[offset[:, None] + np.arange(width)]

    def store(self, address: np.ndarray, raw: np.ndarray, mask: np.ndarray, warp: np.ndarray) -> None:
        """``raw``: [threads, width] bytes."""
        width = raw.shape[1]
        offset = self.offsets(address, width, mask, "store")
        if not mask.any():
            return
        at, new = offset[mask][:, None] + np.arange(width), raw[mask]
        old = self.bytes[at]
        self.bytes[at] = new
        if not _same_numbers(self.bytes[at], new):
            self.findings.note(f"{self.name} one store writes different values to one address")
        same = (old == new).reshape(len(new), -1, 2).all(2) if width >= 2 else old == new
        self.check_write(*self.cells(offset, width, mask, warp), same)
