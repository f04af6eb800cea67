"""What the embedded backbone is pre-trained on: scikit-learn's handwritten digits, placed anew each time they are drawn."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .shapes import SHAPE_TASKS, draw

__all__ = ["PretrainingData"]


class PretrainingData:
    """Endless random batches: light digits of random colour, size, place and turn; without scikit-learn, drawn shapes.

    Attributes:
        source: "digits" or "shapes". num_classes: 10 or 6.
    """

    def __init__(self, source: str | None = None) -> None:
        if source is None:
            source = "digits" if importlib.util.find_spec("sklearn") else "shapes"
        self.source, self.num_classes = source, 6
        if source == "digits":
            from sklearn.datasets import load_digits

            found = load_digits()
            self.num_classes = 10
            self._digits = torch.from_numpy(found.images).float()[:, None] / 16
            self._labels = torch.from_numpy(found.target).long()

    def batch(self, count: int, generator: Generator, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
        """(count, 3, size, size) images in [0, 1]; (count,) labels; (count, 4) x, y, size and turn, about −1 to 1."""
        if self.source == "shapes":
            shapes, labels = SHAPE_TASKS["kind"][0](count, generator)
            factors = torch.cat((shapes.center[:, 0] / 16 - 1, shapes.radius / 2 - 2.6, shapes.angle / math.pi - 1), 1)
            return draw(shapes, generator, size), labels, factors
        chosen = torch.randint(len(self._digits), (count,), generator=generator)
        random = torch.rand(count, 4, generator=generator)
        side = 0.5 + 0.4 * random[:, 0]  # of the image's
        angle = (random[:, 1] - 0.5) * (math.pi / 3)
        shift = (random[:, 2:] * 2 - 1) * (1 - side)[:, None]
        cos, sin = angle.cos() / side, angle.sin() / side
        matrix = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), 1)
        theta = torch.cat((matrix, -matrix @ shift[:, :, None]), -1)
        ink = F.grid_sample(
            self._digits[chosen], F.affine_grid(theta, [count, 1, size, size], align_corners=False), align_corners=False
        )
        background = 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
        colour = background + 0.25 + 0.25 * torch.rand(count, 1, 1, 1, generator=generator)
        clouds = F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), (size, size), mode="bicubic")
        image = ink * colour + (1 - ink) * (background + 0.04 * clouds)
        noise = 0.02 * torch.randn(image.shape, generator=generator)
        factors = torch.cat((shift, random[:, :2] * 2 - 1), 1)
        return (image + noise).clamp(0, 1), self._labels[chosen], factors
