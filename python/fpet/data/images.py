"""Image files: one reader for every command, and the transforms that make tensors of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

__all__ = [
    "NORMALIZATIONS",
    "UnreadableImage",
    "find_damaged",
    "image_transform",
    "normalize",
    "read_image",
    "to_rgb",
]

NORMALIZATIONS = {
    "none": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel, by name; "half" maps [0, 1] to [−1, 1]."""


class UnreadableImage(ValueError):
    """A file that can't be read as an image. The message names the file and the reason."""


def read_image(source: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """An image file as 8-bit RGB, upright: see :func:`to_rgb`. Of an animation it takes the first frame.

    Args:
        source: a path or an open binary file. name: what messages call it; None: the path.

    Raises:
        FileNotFoundError: there is no such file. UnreadableImage: it is no image, is damaged, or is larger than Pillow's limit.
    """
    name = str(source) if name is None else name
    try:
        with Image.open(source) as image:
            return to_rgb(image)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # each format raises its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnreadableImage(f"{name}: can't be read as an image: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, as a viewer shows it.

    It is rotated as its EXIF data says. Transparent pixels show white. 16-bit values are scaled to 8 bits. Float values are
    taken to lie in [0, 1], [0, 255] or [0, 65535], whichever is the smallest that holds them.

    Raises:
        ValueError: integers outside 16 bits, or floats that are negative, too large or not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None  # only in-place transforms return None
        return converted
    return image.convert("RGB")


def _eight_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Grey values (H, W) of any number of bits, as uint8."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if values.dtype.kind == "f":
        top = next((top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top), None)
        if top is None:
            raise ValueError(f"expected float values in [0, 1], [0, 255] or [0, 65535], got {low:g} to {high:g}")
    elif low >= 0 and high <= 65535:
        top = 65535.0
    else:
        raise ValueError(f"expected values of at most 16 bits, got {low:g} to {high:g}")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def find_damaged(files: Iterable[Path], decode: bool) -> tuple[list[Path], list[str]]:
    """The files that are missing and, with ``decode``, why others can't be read as images."""
    missing, reasons = [], []
    for path in files:
        if not path.is_file():
            missing.append(path)
        elif decode:
            try:
                read_image(path)
            except (OSError, UnreadableImage) as error:
                reasons.append(str(error))
    return missing, reasons


def normalize(images: Tensor, how: str) -> Tensor:
    """(…, 3, H, W) in [0, 1], less mean and over standard deviation of :data:`NORMALIZATIONS`."""
    if (numbers := NORMALIZATIONS[how]) is None:
        return images
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in numbers)
    return (images - mean) / std


class _Transform:
    """Resize to a square, bicubic and anti-aliased, whatever the aspect ratio (NOAH's protocol); [0, 1]; normalise."""

    def __init__(self, size: int, how: str) -> None:
        self.size, self.how = size, how

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms.functional import InterpolationMode, resize, to_tensor

        return normalize(to_tensor(resize(image, [self.size, self.size], InterpolationMode.BICUBIC)), self.how)


def image_transform(size: int, normalization: str = "none") -> Callable[[Any], Tensor]:
    """From a PIL image to (3, size, size); without normalisation in [0, 1], as the paper's protocol has it."""
    return _Transform(size, normalization)
