"""Static splits of the patch tokens into sources (set A) and destinations (set B).

A split is decided by position alone, so shapes stay static: every A token is merged into one B token, and what is left
is the prefix tokens followed by B in increasing position. Positions count the patch tokens only, prefix excluded.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .tracing import constant_while_compiling

__all__ = ["Split", "alternating", "checkerboard", "checkerboard_3d", "second_checkerboard"]


@contextmanager
def real_cpu_tensors() -> Iterator[None]:
    """What is made here outlives its first caller: ordinary CPU tensors, whatever mode that was in."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        yield


class Split:
    """A partition of ``num_tokens`` patch tokens into sources ``a`` and destinations ``b``.

    Args:
        num_tokens: number of patch tokens, prefix tokens not counted.
        a: positions of the sources, strictly increasing, in ``[0, num_tokens)``.
        b: positions of the destinations, strictly increasing; together with ``a`` every position exactly once.

    Attributes:
        a, b: int64 tensors ``(N_A,)`` and ``(N_B,)`` on the CPU. Treat them as constants.
        grid: ``(H, W)`` where the lists are a :func:`checkerboard`, whose positions kernels compute instead of reading;
            else ``None``.

    Raises:
        ValueError: the two lists do not partition the positions, or there are fewer than two destinations (the soft
            match needs a largest and a second largest score, eq. 12 of the paper).
    """

    __slots__ = ("a", "b", "grid", "num_tokens", "_by_device")

    def __init__(
        self, num_tokens: int, a: Sequence[int] | Tensor, b: Sequence[int] | Tensor, *, grid: tuple[int, int] | None = None
    ) -> None:
        self.num_tokens = operator.index(num_tokens)
        self.grid = None if grid is None else check_sides(height=grid[0], width=grid[1])
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.a, self.b = _partition(self.num_tokens, a, b, self.grid)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(a, b)`` on ``device``; copied there once. Under FakeTensorMode, fake ones."""
        if torch.compiler.is_compiling():  # what is made while tracing belongs to the trace, not to the cache
            return self.a.to(device), self.b.to(device)
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if fake is not None:
            with real_cpu_tensors():
                lists = self.a.tolist(), self.b.tolist()
            a, b = (torch.tensor(positions, dtype=torch.int64, device=device) for positions in lists)
            return a, b
        if device.type == "cpu":
            return self.a, self.b
        found = self._by_device.get(device)
        if found is None:
            found = self._by_device[device] = (self.a.to(device), self.b.to(device))
        return found

    def __reduce__(self) -> tuple:
        return (rebuild_split, (self.num_tokens, self.a.tolist(), self.b.tolist(), self.grid))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Split) and self.num_tokens == other.num_tokens and torch.equal(self.b, other.b)

    def __hash__(self) -> int:
        return hash((self.num_tokens, tuple(self.b[:8].tolist()), self.b.numel()))

    def __repr__(self) -> str:
        grid = f", grid={self.grid}" if self.grid else ""
        return f"Split({self.num_tokens} tokens: {self.a.numel()} into {self.b.numel()}{grid})"


def rebuild_split(num_tokens: int, a: list[int], b: list[int], grid: tuple[int, int] | None) -> Split:
    return Split(num_tokens, a, b, grid=grid)


@constant_while_compiling
def _partition(
    num_tokens: int, a: Sequence[int] | Tensor, b: Sequence[int] | Tensor, grid: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The two lists as tensors, checked."""
    with real_cpu_tensors():
        a, b = (torch.as_tensor(positions, dtype=torch.int64, device="cpu").contiguous() for positions in (a, b))
        if a.dim() != 1 or b.dim() != 1:
            raise ValueError(f"split: expected 1-D position lists, got {a.dim()}-D a and {b.dim()}-D b")
        if b.numel() < 2:
            raise ValueError(f"split: needs at least two destinations, got {b.numel()} of {num_tokens} tokens")
        for name, index in (("a", a), ("b", b)):
            if index.numel() > 1 and not bool((index[1:] > index[:-1]).all()):
                raise ValueError(f"split: positions of {name} must be strictly increasing")
        seen = torch.cat((a, b)).sort().values
        if seen.numel() != num_tokens or not torch.equal(seen, torch.arange(num_tokens)):
            raise ValueError(
                f"split: a and b must hold every position of range({num_tokens}) exactly once, "
                f"got {a.numel()} + {b.numel()} positions"
            )
        if grid is not None:  # kernels compute positions from it instead of reading the lists
            sources, destinations = checkerboard_positions(*grid, torch.device("cpu"))
            if not (torch.equal(sources, a) and torch.equal(destinations, b)):
                raise ValueError(f"split: a and b are not the checkerboard of grid={grid}; leave grid out")
        return a, b


def as_integer(value: Any) -> int | torch.SymInt | None:
    """``value`` where it is an integer, NumPy's included; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | torch.SymInt):
        return value
    return int(value) if isinstance(value, numbers.Integral) else None


def check_sides(**sides: Any) -> tuple[Any, ...]:
    """The values, each an integer of at least 1."""
    checked = tuple(map(as_integer, sides.values()))
    for (name, given), value in zip(sides.items(), checked, strict=True):
        if value is None or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {given!r}")
    return checked


def _constant_sides(**sides: Any) -> tuple[int, ...]:
    """Checked; a compiler specialises on them."""
    return tuple(map(operator.index, check_sides(**sides)))


def _made_once(make: Callable[..., Split]) -> Callable[..., Split]:
    """``make`` is called once for the same sides; a compiler takes its result as a constant."""
    remembered = functools.lru_cache(maxsize=256)(make)

    @constant_while_compiling
    def made(*sides: int) -> Split:
        return remembered(*sides)

    return made


def _by_parity(parity: Tensor) -> Split:
    """Sources where ``parity`` is even."""
    mask = parity.flatten() % 2 == 0
    return Split(mask.numel(), mask.nonzero().flatten(), (~mask).nonzero().flatten())


def checkerboard_positions(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 positions (N_A,) and (N_B,) of the checkerboard, in closed form: no data-dependent shape, so it can be traced."""
    if width % 2:  # then row + col is even where row · width + col is
        return torch.arange(0, height * width, 2, device=device), torch.arange(1, height * width, 2, device=device)
    i = torch.arange(height * width // 2, device=device)
    row, col = i // (width // 2), 2 * (i % (width // 2))
    return row * width + col + row % 2, row * width + col + 1 - row % 2


def checkerboard(height: int, width: int) -> Split:
    """The paper's split (eq. 9): patch (row, col) is a source where row + col is even, a destination where odd.

    Both sets are in raster order. Odd sides are fine: a 7×7 grid has 25 sources and 24 destinations.
    """
    return _checkerboard(*_constant_sides(height=height, width=width))


@_made_once
def _checkerboard(height: int, width: int) -> Split:
    with real_cpu_tensors():
        return Split(height * width, *checkerboard_positions(height, width, torch.device("cpu")), grid=(height, width))


def second_checkerboard(height: int, width: int) -> Split:
    """Splits what ``checkerboard(height, width)`` left, so that merging can be applied again.

    The survivors (row + col odd) form a square lattice turned by 45°, and its checkerboard is the parity of the row: even
    rows are sources, odd rows destinations, so that every source's nearest neighbours are destinations. What this second
    merge leaves is an ordinary ``height // 2`` × ``ceil(width / 2)`` grid again.
    """
    return _second_checkerboard(*_constant_sides(height=height, width=width))


@_made_once
def _second_checkerboard(height: int, width: int) -> Split:
    with real_cpu_tensors():
        _, left = checkerboard_positions(height, width, torch.device("cpu"))
        return _by_parity(left // width)


def alternating(num_tokens: int) -> Split:
    """Every second token, as in ToMe: even positions are sources, odd positions destinations."""
    return _alternating(*_constant_sides(num_tokens=num_tokens))


@_made_once
def _alternating(num_tokens: int) -> Split:
    with real_cpu_tensors():
        return _by_parity(torch.arange(num_tokens))


def checkerboard_3d(frames: int, height: int, width: int) -> Split:
    """For video tokens, frame by frame in raster order: a source where frame + row + col is even."""
    return _checkerboard_3d(*_constant_sides(frames=frames, height=height, width=width))


@_made_once
def _checkerboard_3d(frames: int, height: int, width: int) -> Split:
    with real_cpu_tensors():
        return _by_parity(torch.arange(frames)[:, None, None] + torch.arange(height)[:, None] + torch.arange(width))
