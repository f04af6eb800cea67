"""Frozen launch configurations, by architecture and shape class. Nothing is tuned at a user's first call.

The tables below were chosen from what the compiler reports (registers, shared memory, no spills: ``python -m
fpet_kernels.triton.report``), not from timings. ``benchmarks/tune.py`` times the candidates on a GPU and prints the rows to put
here. What changes a rounding (block sizes along sources and destinations, warps, the way float32 products are made) depends on
the architecture and the shape of one image only, never on the batch: an image's result does not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

__all__ = [
    "PAIR_PROGRAMS",
    "TABLES",
    "Architecture",
    "Short",
    "Tiles",
    "architecture_of",
    "next_power",
    "pretend",
    "short_class",
    "table",
]


@dataclass(frozen=True)
class Short:
    """The fused forward.

    Attributes:
        block_a: sources whose scores are in registers at once; block_d: columns of x per step.
        warps, stages: of the kernel.
        fit: programs that run on one multiprocessor at once, which the compiler's report says and a test compares.
    """

    block_a: int
    block_d: int
    warps: int
    stages: int
    fit: int = 1


@dataclass(frozen=True)
class Tiles:
    """The tiled kernels: sources, destinations, channels of the key and columns of x per tile.

    ``rows`` of the key, or of the gather in the backward, are one program's share. ``fit``: programs that run on one
    multiprocessor at once.
    """

    block_a: int
    block_b: int
    block_c: int
    block_d: int
    warps: int
    stages: int
    rows: int = 16
    fit: int = 2


@dataclass(frozen=True)
class Architecture:
    """Everything frozen for one kind of GPU.

    Attributes:
        forward: by (bytes of x's element, whether the key is taken as it is in 16 bits, destinations rounded up to a power of
            two). What is missing goes to the tiled kernels.
        multiprocessors: of the GPU; launches share work out until their programs fill them.
        tiles, tiles_double: long grids, and float64 anywhere.
        split_float32: float32 products from bfloat16 parts on matrix units (else float32 multiply-adds).
        shared: bytes of shared memory a program may use.
        ordered: a barrier orders a program's writes and reads of global memory too, as short forwards with several blocks of
            sources need. So it is on NVIDIA's GPUs and on CDNA; elsewhere the tiled kernels take those.
    """

    forward: dict[tuple[int, bool, int], Short]
    multiprocessors: int
    tiles: Tiles
    tiles_double: Tiles
    split_float32: bool
    shared: int
    ordered: bool = True


# Most programs of an image, along sources and along destinations, that share its pairs out in the backward. Each leaves sums of
# its own: extra memory is at most as many times that of one float32 key.
PAIR_PROGRAMS = 8

# Small tiles: float64 products are made without matrix units, as a sum over a three-dimensional block.
_DOUBLE = Tiles(block_a=16, block_b=16, block_c=16, block_d=16, warps=4, stages=1)

_FORWARD = {
    (2, True, 16): Short(16, 64, 4, 3, 2),
    (2, True, 32): Short(32, 64, 4, 3, 2),
    (2, True, 64): Short(64, 64, 4, 3, 2),
    (2, True, 128): Short(128, 64, 8, 3),
    (2, True, 256): Short(32, 64, 8, 2),
    (2, False, 16): Short(16, 64, 4, 3, 2),
    (2, False, 32): Short(32, 64, 4, 3, 2),
    (2, False, 64): Short(32, 64, 4, 3, 2),
    (2, False, 128): Short(32, 64, 8, 2),
    (2, False, 256): Short(16, 64, 8, 2),
    (4, True, 16): Short(16, 32, 4, 2, 2),
    (4, True, 32): Short(32, 32, 4, 2, 2),
    (4, True, 64): Short(64, 32, 4, 2, 2),
    (4, True, 128): Short(128, 32, 8, 2),
    (4, True, 256): Short(32, 32, 8, 2),
    (4, False, 16): Short(16, 32, 4, 2, 2),
    (4, False, 32): Short(32, 32, 4, 2, 2),
    (4, False, 64): Short(32, 32, 4, 2, 2),
    (4, False, 128): Short(32, 32, 8, 2),
    (4, False, 256): Short(16, 32, 8, 2),
}
# Versions of Triton differ in what they spill: these are the largest blocks of sources that none from 3.6 to 3.9 spills.
_FORWARD_SM80 = _FORWARD | {(2, False, 128): Short(16, 64, 8, 2), (4, False, 128): Short(16, 32, 8, 2)}
_FORWARD_SM90 = _FORWARD | {(2, False, 128): Short(128, 64, 8, 2), (4, False, 128): Short(128, 32, 8, 2)}
_FORWARD_SM100 = _FORWARD_SM90 | {(4, False, 128): Short(32, 32, 8, 2)}


def _four_warps(table: dict[tuple[int, bool, int], Short]) -> dict[tuple[int, bool, int], Short]:
    """For warps of 64 lanes: with eight, a lane has half of the registers."""
    return {key: replace(config, warps=4, fit=1) for key, config in table.items()}


TABLES: dict[str, Architecture] = {
    "sm80": Architecture(_FORWARD_SM80, 108, Tiles(32, 64, 64, 64, 4, 2), _DOUBLE, True, 166_912),
    "sm90": Architecture(_FORWARD_SM90, 132, Tiles(64, 64, 64, 64, 4, 2), _DOUBLE, True, 232_448),
    "sm100": Architecture(_FORWARD_SM100, 148, Tiles(64, 64, 64, 64, 4, 2), _DOUBLE, True, 232_448),
    "gfx942": Architecture(_four_warps(_FORWARD), 304, Tiles(32, 64, 64, 32, 4, 2), _DOUBLE, True, 65_536),
    # Triton's interpreter pays for every operation, not for its size: few large tiles.
    "interpreter": Architecture(
        _FORWARD_SM90, 1, Tiles(64, 64, 64, 128, 4, 1, 64), Tiles(64, 64, 32, 64, 4, 1, 64), True, 1 << 30
    ),
    # NVIDIA's others: the least demanding of the above, for 99 KiB of shared memory (sm_86, sm_89, sm_120).
    "other": Architecture(_FORWARD_SM80, 64, Tiles(32, 64, 32, 32, 4, 1), _DOUBLE, True, 101_376),
    # Any other GPU that Triton knows.
    "elsewhere": Architecture(_four_warps(_FORWARD), 64, Tiles(32, 64, 32, 32, 4, 1), _DOUBLE, True, 65_536, ordered=False),
}


def next_power(n: int) -> int:
    """Smallest power of two ≥ n, at least 16: the smallest block of a matrix product. By comparisons: n may be symbolic."""
    power = 16
    while power < n:
        power *= 2
    return power


def short_class(num_a: int, num_b: int, channels: int, hidden: int) -> int | None:
    """Destinations rounded up where the fused kernels take the problem; None where the tiled ones do."""
    if max(num_a, num_b) > 256 or num_a < 1 or channels > 128 or hidden > 64:
        return None
    return next_power(num_b)


_pretended: str | None = None


@contextlib.contextmanager
def pretend(name: str) -> Iterator[None]:
    """Every device is taken for ``name``, a key of ``TABLES``: to compile for a GPU that is not there, or try a table."""
    global _pretended
    before, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = before


def table(device_type: str, index: int | None) -> Architecture:
    """The configurations for a device."""
    return TABLES[_pretended or architecture_of(device_type, index)]


@functools.lru_cache(maxsize=64)
def architecture_of(device_type: str, index: int | None) -> str:
    """The key into ``TABLES`` for a device."""
    import torch

    if device_type == "cpu":
        return "interpreter"
    if device_type != "cuda" or not torch.cuda.is_available():
        return "elsewhere"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return name if name in TABLES else "elsewhere"
    major, minor = torch.cuda.get_device_capability(index)
    name = "sm100" if (major, minor) == (10, 3) else f"sm{major}{minor}"  # 10.3 has the limits of 10.0
    return name if name in TABLES else "other"
