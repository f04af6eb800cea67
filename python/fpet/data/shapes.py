"""Drawn shapes, in the spirit of VTAB's structured group: how many, how far apart, where, turned how."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .base import TensorTask

__all__ = ["KINDS", "SHAPE_TASKS", "Shapes", "draw", "shapes_task"]

KINDS = ("disc", "square", "triangle", "ring", "cross", "bar")
_SIZE = 32  # pixels a side; all lengths below are in these pixels


class Shapes(NamedTuple):
    """Objects of a batch of images; lengths in units of a 32-pixel image.

    Attributes:
        center: (B, K, 2) x and y. radius: (B, K), 0 for no object. angle: (B, K) radians. kind: (B, K) index in KINDS.
    """

    center: Tensor
    radius: Tensor
    angle: Tensor
    kind: Tensor


def _signed_distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """(len(KINDS), …): how far outside each kind of shape the points are, approximately, negative inside."""
    length, ax, ay = (x.square() + y.square()).sqrt(), x.abs(), y.abs()
    third = math.sqrt(0.75)
    disc = length - r
    square = torch.maximum(ax, ay) - 0.85 * r
    triangle = torch.maximum(y, torch.maximum(third * x, -third * x) - 0.5 * y) - 0.55 * r
    ring = (length - 0.75 * r).abs() - 0.25 * r
    cross = torch.maximum(torch.minimum(ax, ay) - 0.25 * r, torch.maximum(ax, ay) - r)
    bar = torch.maximum(ax - 1.3 * r, ay - 0.3 * r)
    return torch.stack((disc, square, triangle, ring, cross, bar))


def draw(shapes: Shapes, generator: Generator, size: int = _SIZE) -> Tensor:
    """(B, 3, size, size) images in [0, 1]: light shapes in random colours, anti-aliased, on a cloudy background."""
    batch, count = shapes.radius.shape
    axis = (torch.arange(size) + 0.5) * (_SIZE / size)
    background = 0.5 * torch.rand(batch, 3, 1, 1, generator=generator)
    clouds = torch.nn.functional.interpolate(torch.randn(batch, 3, 4, 4, generator=generator), (size, size), mode="bicubic")
    image = background + 0.06 * clouds
    for k in range(count):
        x, y = (axis - shapes.center[:, k, i, None] for i in (0, 1))  # (B, size)
        cos, sin = shapes.angle[:, k].cos()[:, None, None], shapes.angle[:, k].sin()[:, None, None]
        u = cos * x[:, None, :] + sin * y[:, :, None]
        v = cos * y[:, :, None] - sin * x[:, None, :]
        r = shapes.radius[:, k, None, None]
        every = _signed_distances(u, v, r)
        distance = every.gather(0, shapes.kind[:, k].view(1, -1, 1, 1).expand(1, *every.shape[1:]))[0]
        cover = ((0.5 - distance * size / _SIZE).clamp(0, 1) * (r > 0))[:, None]
        colour = background + 0.25 + 0.25 * torch.rand(batch, 3, 1, 1, generator=generator)  # lighter: always visible
        image = cover * colour + (1 - cover) * image
    return (image + 0.02 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def _uniform(low: float, high: float, *shape: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _integers(high: int, *shape: int, generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def _random_objects(center: Tensor, low: float, high: float, generator: Generator, kinds: int = len(KINDS)) -> Shapes:
    shape = center.shape[:2]
    return Shapes(
        center,
        _uniform(low, high, *shape, generator=generator),
        _uniform(0, 2 * math.pi, *shape, generator=generator),
        _integers(kinds, *shape, generator=generator),
    )


def _count(n: int, g: Generator) -> tuple[Shapes, Tensor]:
    """One to six shapes, in different cells of a 3 × 3 grid."""
    label = _integers(6, n, generator=g)
    cells = torch.rand(n, 9, generator=g).argsort(1)[:, :6]
    center = torch.stack((cells % 3, cells // 3), -1) * 10.0 + 6 + _uniform(-1, 1, n, 6, 2, generator=g)
    shapes = _random_objects(center, 2.5, 4, g)
    return shapes._replace(radius=shapes.radius * (torch.arange(6) <= label[:, None])), label


def _distance(n: int, g: Generator) -> tuple[Shapes, Tensor]:
    """Two shapes; their distance in four bins of 5 pixels from 5 on."""
    label = _integers(4, n, generator=g)
    length = 5 * (label + 1) + _uniform(0.5, 4.5, n, generator=g)
    direction = _uniform(0, 2 * math.pi, n, generator=g)
    half = torch.stack((direction.cos(), direction.sin()), -1) * length[:, None] / 2
    room = (_SIZE / 2 - 3.5 - half.abs()).clamp(min=0)
    middle = _SIZE / 2 + room * _uniform(-1, 1, n, 2, generator=g)
    return _random_objects(torch.stack((middle - half, middle + half), 1), 2.2, 3.2, g, kinds=3), label


def _location(n: int, g: Generator) -> tuple[Shapes, Tensor]:
    """One shape, in one of 4 × 4 cells."""
    label = _integers(16, n, generator=g)
    cell = torch.stack((label % 4, label // 4), -1)[:, None]
    return _random_objects(cell * 7.0 + 5.5 + _uniform(-2.8, 2.8, n, 1, 2, generator=g), 2.5, 4, g), label


def _orientation(n: int, g: Generator) -> tuple[Shapes, Tensor]:
    """One bar, turned by one of eight angles, ± 8°."""
    label = _integers(8, n, generator=g)
    center = _uniform(9, 23, n, 1, 2, generator=g)
    angle = (label[:, None] + _uniform(-0.35, 0.35, n, 1, generator=g)) * (math.pi / 8)
    return Shapes(center, _uniform(4, 6.5, n, 1, generator=g), angle, torch.full((n, 1), KINDS.index("bar"))), label


def _kind(n: int, g: Generator) -> tuple[Shapes, Tensor]:
    """One shape: which. Not a structured task; what a backbone is pre-trained on where there are no digits."""
    shapes = _random_objects(_uniform(7, 25, n, 1, 2, generator=g), 3.5, 7, g)
    return shapes, shapes.kind[:, 0]


SHAPE_TASKS: dict[str, tuple[Callable[[int, Generator], tuple[Shapes, Tensor]], int]] = {
    "count": (_count, 6),
    "distance": (_distance, 4),
    "location": (_location, 16),
    "orientation": (_orientation, 8),
    "kind": (_kind, len(KINDS)),
}
"""Generator and number of classes, by name."""


def shapes_task(task: str, count: int, seed: int, size: int = _SIZE) -> TensorTask:
    """``count`` drawn images and labels of a task; the same ``seed`` gives the same ones.

    Raises:
        ValueError: no such task.
    """
    if task not in SHAPE_TASKS:
        raise ValueError(f"task: expected one of {', '.join(SHAPE_TASKS)}, got {task!r}")
    generator = torch.Generator().manual_seed(seed)
    shapes, labels = SHAPE_TASKS[task][0](count, generator)
    return TensorTask(draw(shapes, generator, size), labels)
