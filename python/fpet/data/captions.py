"""Drawn shapes and what they are, in Flickr30K's format: what retrieval is shown and tested with where there is no data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Generator, Tensor

from .flickr30k import IMAGE_FOLDER, LIST_NAME
from .shapes import _signed_distances

__all__ = ["COLOURS", "SHAPES", "WORDS", "DrawnPair", "draw_pair", "write_folder"]

COLOURS = {
    "red": (0.9, 0.15, 0.1), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.25, 0.95), "yellow": (0.95, 0.9, 0.1),
    "white": (0.97, 0.97, 0.97), "pink": (0.95, 0.4, 0.75),
}  # fmt: skip
SHAPES = ("disc", "square", "triangle", "ring", "cross", "bar")
"""In the order of :data:`fpet.data.shapes.KINDS`."""
_TEMPLATES = (
    ("a {0} left of a {1}", "a {1} right of a {0}", "the {0} is on the left and the {1} is on the right"),
    ("a {0} above a {1}", "a {1} below a {0}", "the {0} is at the top and the {1} is at the bottom"),
)
WORDS = sorted(
    {*COLOURS, *SHAPES, *(w for group in _TEMPLATES for t in group for w in t.replace("{0}", "").replace("{1}", "").split())}
)
"""Every word of the captions."""


class DrawnPair(NamedTuple):
    """Attributes: image (3, size, size) in [0, 1]; captions, three that say the same."""

    image: Tensor
    captions: tuple[str, ...]


def draw_pair(what: int, generator: Generator, size: int = 32, background: float = 0.1) -> DrawnPair:
    """Two coloured shapes side by side or one above the other; ``what`` in range(2592) chooses which and how."""
    kinds, colours = len(SHAPES), list(COLOURS)
    vertical, what = what % 2, what // 2
    objects = []
    for _ in range(2):
        objects.append((what % kinds, (what // kinds) % len(colours)))
        what //= kinds * len(colours)
    axis = (torch.arange(size) + 0.5) * (32 / size)
    image = torch.full((3, size, size), background) + 0.04 * torch.rand(3, 1, 1, generator=generator)
    for place, (kind, colour) in enumerate(objects):
        along, across = 8.5 + 15 * place, 16 + 8 * (torch.rand((), generator=generator).item() - 0.5)
        x, y = (across, along) if vertical else (along, across)
        radius = 5 + 1.5 * torch.rand((), generator=generator).item()
        distance = _signed_distances(axis[None, :] - x, axis[:, None] - y, torch.tensor(radius))[kind]
        cover = (0.5 - distance * size / 32).clamp(0, 1)
        image = cover * torch.tensor(COLOURS[colours[colour]])[:, None, None] + (1 - cover) * image
    image = (image + 0.02 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    names = [f"{colours[colour]} {SHAPES[kind]}" for kind, colour in objects]
    return DrawnPair(image, tuple(template.format(*names) for template in _TEMPLATES[vertical]))


def write_folder(root: str | Path, sizes: dict[str, int], *, seed: int = 0, size: int = 32, background: float = 0.1) -> Path:
    """Writes ``sizes`` images per split, no two of which show the same, with captions, as Flickr30K comes. Returns ``root``.

    Raises:
        ValueError: more images than there are different ones.
    """
    root = Path(root)
    total = 2 * (len(SHAPES) * len(COLOURS)) ** 2
    if sum(sizes.values()) > total:
        raise ValueError(f"sizes: expected at most {total} images, got {sum(sizes.values())}")
    generator = torch.Generator().manual_seed(seed)
    order = iter(torch.randperm(total, generator=generator).tolist())
    (root / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for split, count in sizes.items():
        for _ in range(count):
            image, captions = draw_pair(next(order), generator, size, background)
            name = f"{len(entries):05d}.png"
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(root / IMAGE_FOLDER / name)
            entries.append({"filename": name, "split": split, "sentences": [{"raw": caption} for caption in captions]})
    (root / LIST_NAME).write_text(json.dumps({"dataset": "drawn", "images": entries}), encoding="utf-8")
    return root
