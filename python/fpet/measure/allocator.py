"""PyTorch's caching allocator for GPUs, simulated."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

__all__ = ["MIB", "CachingAllocator"]

MIB = 1 << 20


class CachingAllocator:
    """Where PyTorch's caching allocator would put tensors on a GPU, by its default rules. Nothing is allocated.

    A size is rounded up to 512 bytes. The smallest free block that holds it is taken; if there is none, a segment from the
    device: 2 MiB for blocks of up to 1 MiB, 20 MiB for those below 10 MiB, otherwise the size, rounded up to 2 MiB. What is
    left of a block stays free as one of its own, from 512 bytes on among the small ones and above 1 MiB among the large.
    Neighbours that are free become one block; segments never do, and none goes back to the device.

    Attributes:
        reserved: bytes taken from the device. allocated: bytes of blocks in use.
    """

    def __init__(self) -> None:
        self.reserved = self.allocated = 0
        self._blocks: dict[int, _Block] = {}  # by address
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small, large: (size, address), sorted
        self._end = 0  # of the last segment

    def allocate(self, size: int) -> int:
        """The address of a block for ``size`` bytes, which are more than none."""
        size = _round_up(size, 512)
        small = size <= MIB
        fitting = bisect.bisect_left(self._free[small], (size, 0))
        address = self._free[small][fitting][1] if fitting < len(self._free[small]) else self._add_segment(size, small)
        block = self._blocks[address]
        self._take_out(address)
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            block.size = size
            self._blocks[address + size] = _Block(rest, small, before=address, after=block.after)
            block.after = address + size
            self._link(address + size)
            self._put_in(address + size)
        self.allocated += block.size
        return address

    def free(self, address: int) -> None:
        """Gives back the block at ``address``, which :meth:`allocate` returned."""
        self.allocated -= self._blocks[address].size
        self._put_in(address)
        before, after = self._blocks[address].before, self._blocks[address].after
        if after is not None and self._blocks[after].free:
            self._join(address, after)
        if before is not None and self._blocks[before].free:
            self._join(before, address)

    def _add_segment(self, size: int, small: bool) -> int:
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else _round_up(size, 2 * MIB)
        address, self._end = self._end, self._end + segment
        self._blocks[address] = _Block(segment, small)
        self._put_in(address)
        self.reserved += segment
        return address

    def _join(self, address: int, after: int) -> None:
        self._take_out(address)
        self._take_out(after)
        block, gone = self._blocks[address], self._blocks.pop(after)
        block.size, block.after = block.size + gone.size, gone.after
        self._link(address)
        self._put_in(address)

    def _link(self, address: int) -> None:
        """Tells the block behind ``address`` who its neighbour is."""
        after = self._blocks[address].after
        if after is not None:
            self._blocks[after].before = address

    def _put_in(self, address: int) -> None:
        block = self._blocks[address]
        block.free = True
        bisect.insort(self._free[block.small], (block.size, address))

    def _take_out(self, address: int) -> None:
        block = self._blocks[address]
        block.free = False
        del self._free[block.small][bisect.bisect_left(self._free[block.small], (block.size, address))]


@dataclass
class _Block:
    """Part of a segment. Attributes: before, after: addresses of its neighbours there."""

    size: int
    small: bool
    before: int | None = None
    after: int | None = None
    free: bool = False


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
