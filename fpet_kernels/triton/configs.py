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

__all__ = ["TABLES", "Architecture", "Short", "Tiles", "architecture_of", "next_power", "pretend", "short_class", "table"]


@dataclass(frozen=True)
class Short:
    """One fused launch over whole images.

    Attributes:
        block_a: sources whose scores are in registers at once; block_d: columns of x per step.
        warps, stages: of the kernel.
        rows: of keys that the backward prepares, and takes on through the refinement, at once.
    """

    block_a: int
    block_d: int
    warps: int
    stages: int
    rows: int = 16


@dataclass(frozen=True)
class Tiles:
    """The tiled kernels: sources, destinations, channels of the key and columns of x per tile.

    ``rows`` of the key, or of the gather in the backward, are one program's share: with more than 16, the parts of float32
    products spill.
    """

    block_a: int
    block_b: int
    block_c: int
    block_d: int
    warps: int
    stages: int
    rows: int = 16


@dataclass(frozen=True)
class Architecture:
    """Everything frozen for one kind of GPU.

    Attributes:
        forward, backward: by (bytes of x's element, whether the key is taken as it is in 16 bits, destinations rounded up to
            a power of two). What is missing goes to the tiled kernels.
        programs: programs that fill the GPU; a short forward splits D until it has as many.
        tiles, tiles_double: long grids, and float64 anywhere.
        split_float32: float32 products from bfloat16 parts on matrix units (else float32 multiply-adds).
        shared: bytes of shared memory a program may use.
        ordered: a barrier orders a program's writes and reads of global memory too, as short forwards with several blocks of
            sources and all short backwards need. So it is on NVIDIA's GPUs and on CDNA; elsewhere the tiled kernels take those.
    """

    forward: dict[tuple[int, bool, int], Short]
    backward: dict[tuple[int, bool, int], Short]
    programs: int
    tiles: Tiles
    tiles_double: Tiles
    split_float32: bool
    shared: int
    ordered: bool = True


# Small tiles: float64 products are made without matrix units, as a sum over a three-dimensional block.
_DOUBLE = Tiles(block_a=16, block_b=16, block_c=16, block_d=16, warps=4, stages=1)

_FORWARD = {
    (2, True, 16): Short(16, 64, 4, 3),
    (2, True, 32): Short(32, 64, 4, 3),
    (2, True, 64): Short(64, 64, 4, 3),
    (2, True, 128): Short(128, 64, 8, 3),
    (2, True, 256): Short(32, 64, 8, 2),
    (2, False, 16): Short(16, 64, 4, 3),
    (2, False, 32): Short(32, 64, 4, 3),
    (2, False, 64): Short(32, 64, 4, 3),
    (2, False, 128): Short(32, 64, 8, 2),
    (2, False, 256): Short(16, 64, 8, 2),
    (4, True, 16): Short(16, 32, 4, 2),
    (4, True, 32): Short(32, 32, 4, 2),
    (4, True, 64): Short(64, 32, 4, 2),
    (4, True, 128): Short(128, 32, 8, 2),
    (4, True, 256): Short(32, 32, 8, 2),
    (4, False, 16): Short(16, 32, 4, 2),
    (4, False, 32): Short(32, 32, 4, 2),
    (4, False, 64): Short(32, 32, 4, 2),
    (4, False, 128): Short(32, 32, 8, 2),
    (4, False, 256): Short(16, 32, 8, 2),
}
# Versions of Triton differ in what they spill: these are the largest blocks of sources that none from 3.6 to 3.9 spills.
_FORWARD_SM80 = _FORWARD | {(2, False, 128): Short(16, 64, 8, 2), (4, False, 128): Short(16, 32, 8, 2)}
_FORWARD_SM90 = _FORWARD | {(2, False, 128): Short(128, 64, 8, 2), (4, False, 128): Short(128, 32, 8, 2)}
_FORWARD_SM100 = _FORWARD_SM90 | {(4, False, 128): Short(32, 32, 8, 2)}
# Likewise; but where keys are refined, Triton 3.8 spills 56 to 64 bytes on sm_80.
_BACKWARD = {
    (2, True, 16): Short(16, 64, 4, 2),
    (2, True, 32): Short(32, 64, 4, 2),
    (2, True, 64): Short(32, 64, 8, 2),
    (2, True, 128): Short(32, 64, 8, 3, 64),
    (2, False, 16): Short(16, 64, 4, 2),
    (2, False, 32): Short(16, 64, 4, 2),
    (2, False, 64): Short(16, 64, 8, 2),
    (2, False, 128): Short(16, 32, 8, 1, 16),
    (4, True, 16): Short(16, 32, 4, 2),
    (4, True, 32): Short(16, 32, 4, 2),
    (4, True, 64): Short(16, 32, 8, 2),
    (4, True, 128): Short(32, 32, 8, 2, 64),
    (4, False, 16): Short(16, 32, 4, 2),
    (4, False, 32): Short(16, 32, 4, 2),
    (4, False, 64): Short(16, 32, 8, 2),
    (4, False, 128): Short(16, 32, 8, 1, 16),
}
# Operands from shared memory leave registers for larger blocks.
_BACKWARD_SM90 = _BACKWARD | {
    (2, True, 64): Short(64, 64, 8, 3, 64),
    (2, True, 128): Short(64, 64, 8, 3, 64),
    (2, True, 256): Short(16, 64, 8, 2, 64),
    (2, False, 64): Short(32, 64, 8, 3, 64),
    (2, False, 128): Short(32, 64, 8, 3, 64),
    (4, True, 64): Short(64, 32, 8, 2, 64),
    (4, True, 128): Short(64, 32, 8, 2, 64),
    (4, False, 64): Short(32, 32, 8, 2, 64),
    (4, False, 128): Short(32, 32, 8, 2, 64),
}
_BACKWARD_GFX942 = _BACKWARD | {
    (2, True, 128): Short(32, 64, 4, 2, 64),
    (2, False, 128): Short(32, 64, 4, 2, 32),
    (4, True, 128): Short(64, 32, 4, 2, 64),
    (4, False, 128): Short(16, 32, 4, 2),
}


def _four_warps(table: dict[tuple[int, bool, int], Short]) -> dict[tuple[int, bool, int], Short]:
    """For warps of 64 lanes: with eight, a lane has half of the registers."""
    return {key: replace(config, warps=4) for key, config in table.items()}


TABLES: dict[str, Architecture] = {
    "sm80": Architecture(_FORWARD_SM80, _BACKWARD, 216, Tiles(32, 64, 64, 64, 8, 2), _DOUBLE, True, 166_912),
    "sm90": Architecture(_FORWARD_SM90, _BACKWARD_SM90, 264, Tiles(64, 64, 64, 64, 4, 2), _DOUBLE, True, 232_448),
    "sm100": Architecture(_FORWARD_SM100, _BACKWARD_SM90, 296, Tiles(64, 64, 64, 64, 4, 2), _DOUBLE, True, 232_448),
    "gfx942": Architecture(
        _four_warps(_FORWARD), _four_warps(_BACKWARD_GFX942), 304, Tiles(32, 64, 64, 32, 4, 2), _DOUBLE, True, 65_536
    ),
    # Triton's interpreter pays for every operation, not for its size: few large tiles.
    "interpreter": Architecture(
        _FORWARD_SM90, _BACKWARD_SM90, 1, Tiles(64, 64, 64, 128, 4, 1, 64), Tiles(64, 64, 32, 64, 4, 1, 64), True, 1 << 30
    ),
    # NVIDIA's others: the least demanding of the above, for 99 KiB of shared memory (sm_86, sm_89, sm_120).
    "other": Architecture(_FORWARD_SM80, _BACKWARD, 128, Tiles(32, 64, 32, 32, 8, 1), _DOUBLE, True, 101_376),
    # Any other GPU that Triton knows.
    "elsewhere": Architecture(
        _four_warps(_FORWARD), {}, 128, Tiles(32, 64, 32, 32, 4, 1), _DOUBLE, True, 65_536, ordered=False
    ),
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
