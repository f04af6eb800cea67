"""Data sets: the embedded generated tasks, VTAB-1K in NOAH's folders, CIFAR-100, SVHN and the FGVC few-shot tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Batch, Dataset, Splits, TensorTask, batches, epoch_order
from .digits import PretrainingData
from .lists import FGVC_TASKS, VTAB_TASKS, ImageList, check_folder
from .shapes import SHAPE_TASKS, draw, shapes_task

if TYPE_CHECKING:
    from ..train.config import Config

__all__ = [
    "FAMILIES",
    "FGVC_TASKS",
    "SHAPE_TASKS",
    "VTAB_TASKS",
    "Batch",
    "Dataset",
    "ImageList",
    "PretrainingData",
    "Splits",
    "TensorTask",
    "batches",
    "check_folder",
    "draw",
    "epoch_order",
    "image_transform",
    "load",
    "shapes_task",
    "task_names",
]

_TASKS: dict[str, tuple[str, ...]] = {
    "shapes": tuple(name for name in SHAPE_TASKS if name != "kind"),
    "vtab1k": tuple(VTAB_TASKS),
    "torchvision": ("cifar100", "svhn"),
    "fgvc": tuple(FGVC_TASKS),
}
FAMILIES = tuple(_TASKS)

_NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def task_names(family: str) -> tuple[str, ...]:
    """The tasks of a family; ValueError where there is no such family."""
    if family not in _TASKS:
        raise ValueError(f"data: expected one of {', '.join(FAMILIES)}, got {family!r}")
    return _TASKS[family]


def normalize(images: Tensor, how: str) -> Tensor:
    """(…, 3, H, W) in [0, 1], less mean and over standard deviation: "none", "imagenet", or "half" (to [−1, 1])."""
    if how == "none":
        return images
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in _NORMALIZATION[how])
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


def load(config: Config) -> Splits:
    """The data of a run. With the honest protocol a validation set is left out of the training set.

    Raises:
        ValueError, FileNotFoundError: a list or a file is missing or damaged; says which.
    """
    validate = config.protocol == "honest"
    transform = image_transform(config.image_size, config.normalize)
    if config.data == "shapes":
        return _shapes(config, validate)
    assert config.data_dir is not None
    root = Path(config.data_dir)
    if config.data == "vtab1k":
        from .lists import vtab

        return vtab(root, config.task, transform, validate=validate)
    if config.data == "fgvc":
        from .lists import fgvc

        return fgvc(root, config.task, transform, shots=config.shots, list_seed=config.list_seed, validate=validate)
    return _torchvision(config, root, transform, validate)


def _shapes(config: Config, validate: bool) -> Splits:
    classes = SHAPE_TASKS[config.task][1]
    # The drawing does not depend on the run's seed: seeds are compared on the same images.
    tuning, test = shapes_task(config.task, config.train_count, 1), shapes_task(config.task, config.test_count, 2)
    tuning.images, test.images = normalize(tuning.images, config.normalize), normalize(test.images, config.normalize)
    if not validate:
        return Splits(config.task, classes, tuning, None, test)
    left = config.train_count * 4 // 5  # as train800 and val200
    train = TensorTask(tuning.images[:left], tuning.labels[:left])
    return Splits(config.task, classes, train, TensorTask(tuning.images[left:], tuning.labels[left:]), test)


def _torchvision(config: Config, root: Path, transform: Callable[[Any], Tensor], validate: bool) -> Splits:
    from torchvision.datasets import CIFAR100, SVHN

    try:
        if config.task == "cifar100":
            train, test = (CIFAR100(str(root), train=part, transform=transform) for part in (True, False))
        else:
            train, test = (SVHN(str(root), split=part, transform=transform) for part in ("train", "test"))
    except RuntimeError as error:
        raise FileNotFoundError(f"data_dir: expected torchvision's files of {config.task} in {root}: {error}") from error
    classes = 100 if config.task == "cifar100" else 10
    if not validate:
        return Splits(config.task, classes, train, None, test)
    order = epoch_order(len(train), 0, 0).tolist()  # a fixed fifth is left out
    left = len(order) * 4 // 5
    subset = torch.utils.data.Subset
    return Splits(config.task, classes, subset(train, order[:left]), subset(train, order[left:]), test)
