"""The caching allocator's rules."""

from __future__ import annotations

import itertools
import random

import pytest

from fpet.measure.allocator import MIB, CachingAllocator


def placed(*sizes: float) -> tuple[CachingAllocator, list[int]]:
    """An allocator with blocks of these many MiB, one after the other."""
    allocator = CachingAllocator()
    return allocator, [allocator.allocate(int(size * MIB)) for size in sizes]


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB), (513, 1024, 2 * MIB), (MIB, MIB, 2 * MIB), (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB, 10 * MIB), (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    ],
)  # fmt: skip
def test_sizes_of_blocks_and_segments(size: int, block: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert (allocator.allocated, allocator.reserved) == (block, segment)


def test_small_and_large_blocks_have_segments_of_their_own() -> None:
    allocator, at = placed(0.5, 4, 0.75, 4)
    assert allocator.reserved == 22 * MIB and allocator.allocated == 9.25 * MIB
    assert at == [0, 2 * MIB, MIB // 2, 6 * MIB]


def test_a_small_rest_stays_with_its_block() -> None:
    allocator, (segment,) = placed(20)
    allocator.free(segment)
    assert allocator.allocate(19 * MIB) == segment and allocator.allocated == 20 * MIB, "1 MiB is no block of its own"
    allocator.free(segment)
    assert allocator.allocate(19 * MIB - 512) == segment and allocator.allocated == 19 * MIB - 512
    assert allocator.reserved == 20 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator, at = placed(20, 12, 14)
    for address in at:
        allocator.free(address)
    assert allocator.allocate(13 * MIB) == at[2] and allocator.allocate(11 * MIB) == at[1] and allocator.reserved == 46 * MIB


def test_neighbours_become_one_block_and_segments_do_not() -> None:
    allocator, at = placed(5, 5, 5, 5)
    for i in (0, 2, 1):
        allocator.free(at[i])
    assert allocator.allocate(15 * MIB) == at[0] and allocator.reserved == 20 * MIB
    allocator, at = placed(10, 10)
    for address in at:
        allocator.free(address)
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_blocks_in_use_never_overlap_and_all_of_them_come_back() -> None:
    draw, allocator = random.Random(0), CachingAllocator()
    used: dict[int, int] = {}
    for _ in range(3000):
        if used and draw.random() < 0.5:
            address = draw.choice(list(used))
            del used[address]
            allocator.free(address)
        else:
            size = int(2 ** draw.uniform(0, 25))
            used[allocator.allocate(size)] = size
        ordered = sorted(used.items())
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(ordered))
        assert sum(used.values()) <= allocator.allocated <= allocator.reserved
    reserved = allocator.reserved
    for address in used:
        allocator.free(address)
    assert allocator.allocated == 0
    # Whole segments again: what asks for one of the size of each gets it from those that are there.
    segments = [block.size for block in allocator._blocks.values()]
    assert sum(segments) == reserved and all(block.free for block in allocator._blocks.values())
    for size in segments:
        allocator.allocate(size if size > 2 * MIB else MIB)
    assert allocator.reserved == reserved
