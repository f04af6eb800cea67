"""Sets of image files with their labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .base import Splits
from .images import UnreadableImage, read_image

__all__ = ["ImageSet", "Sample", "keep_readable", "why_unreadable"]


class Sample(NamedTuple):
    """Attributes: name, the path of the image, or what messages call it; labels, class indices, one or, with several labels an
    image, any number; open, returns a path or an open file where the name is no path."""

    name: str
    labels: tuple[int, ...]
    open: Callable[[], str | IO[bytes]] | None = None

    def image(self) -> Image.Image:
        """8-bit RGB; errors as :func:`fpet.data.read_image`."""
        return read_image(self.name if self.open is None else self.open(), self.name)


class ImageSet:
    """Map-style: image (3, H, W), and its class or, with several labels an image, a float vector (classes,) of 0 and 1."""

    def __init__(
        self, samples: Iterable[Sample], transform: Callable[[Image.Image], Tensor], num_classes: int | None = None
    ) -> None:
        """num_classes: None for one class an image."""
        self.samples, self.transform, self.num_classes = list(samples), transform, num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.transform(self.samples[index].image()), self.label(index)

    def label(self, index: int) -> Any:
        """The label alone, without reading the image."""
        labels = self.samples[index].labels
        if self.num_classes is None:
            return labels[0]
        return torch.zeros(self.num_classes).index_fill_(0, torch.tensor(labels, dtype=torch.int64), 1.0)


def why_unreadable(sample: Sample) -> str | None:
    """Why an image can't be read; None if it can."""
    try:
        sample.image()
    except (OSError, UnreadableImage) as error:
        return str(error)
    return None


def keep_readable(splits: Splits, damaged: str) -> Splits:
    """With ``damaged`` "skip", opens every image and leaves out what can't be read, with a warning that names it.

    Raises:
        ValueError: nothing is left of a part or, in training, of a class; or ``damaged`` is neither "error" nor "skip".
    """
    if damaged not in ("error", "skip"):
        raise ValueError(f"damaged: expected 'error' or 'skip', got {damaged!r}")
    if damaged == "error":
        return splits
    before: Any = splits
    train, test = _readable(before.train, "train"), _readable(before.test, "test")
    val = None if before.val is None else _readable(before.val, "val")
    lost = {c for s in before.train.samples for c in s.labels} - {c for s in train.samples for c in s.labels}
    if lost:
        names = [str(c) if splits.class_names is None else splits.class_names[c] for c in sorted(lost)]
        raise ValueError(f"data_dir: no readable training images of {', '.join(names)} are left")
    return splits._replace(train=train, val=val, test=test)


def _readable(images: ImageSet, part: str) -> ImageSet:
    reasons = [why_unreadable(sample) for sample in images.samples]
    wrong = [reason for reason in reasons if reason is not None]
    if not wrong:
        return images
    if len(wrong) == len(reasons):
        raise ValueError(f"data_dir: none of the {len(reasons)} images of part {part!r} can be read, such as {wrong[0]}")
    text = "\n  ".join(wrong)
    warnings.warn(
        f"{len(wrong)} of {len(reasons)} images are left out of part {part!r}:\n  {text}", RuntimeWarning, stacklevel=4
    )
    kept: Sequence[Sample] = [s for s, reason in zip(images.samples, reasons, strict=True) if reason is None]
    return ImageSet(kept, images.transform, images.num_classes)
