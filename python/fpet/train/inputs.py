"""The data of a run: what becomes of its images, and in which order and weight they come."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from .. import data
from ..data.preprocessing import Preprocessing
from .config import EMBEDDED_MODEL, OWN_DATA, Config, ConfigError

__all__ = [
    "Seeded",
    "augmentation",
    "check_data",
    "class_counts",
    "labels_of",
    "load_data",
    "mixing",
    "preprocessing",
    "resolve",
    "seeded",
]

_EMBEDDED = Preprocessing((32, 32), 1.0, "squash", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def resolve(config: Config) -> Config:
    """``config`` with what it leaves to the model and to the data filled in: size, learning rate, warm-up and so on.

    The peak learning rate is 0.01 for the embedded backbone and 0.001 for any other, as in Table A8; the warm-up a tenth of the
    epochs; the protocol "honest" for images of one's own, where nothing was published to compare with.

    Raises:
        ConfigError: timm does not know the model.
    """
    own = config.data in OWN_DATA
    defaults: dict[str, Any] = {
        "image_size": preprocessing(config).size[0],
        "lr": 1e-2 if config.model == EMBEDDED_MODEL else 1e-3,
        "warmup_epochs": config.epochs / 10,
        "protocol": "honest" if own else "paper",
        "augment": "flips" if own else "none",
    }
    return dataclasses.replace(config, **{name: v for name, v in defaults.items() if getattr(config, name) is None})


def preprocessing(config: Config) -> Preprocessing:
    """What is done to an image before the model sees it, in evaluation.

    Raises:
        ConfigError: timm does not know the model.
    """
    found = _EMBEDDED
    if config.model != EMBEDDED_MODEL:
        known = timm.models.get_pretrained_cfg(config.model) if timm.is_model(config.model) else None
        if known is None:
            raise ConfigError(f"model: expected {EMBEDDED_MODEL!r} or a model that timm knows, got {config.model!r}")
        values = resolve_data_config({}, pretrained_cfg=known.to_dict())
        found = Preprocessing(
            size=tuple(values["input_size"][1:]), crop_pct=float(values["crop_pct"]), crop_mode=str(values["crop_mode"]),
            interpolation=str(values["interpolation"]), mean=tuple(values["mean"]), std=tuple(values["std"]),
            channels=int(values["input_size"][0]),
        )  # fmt: skip
    if config.image_size is not None:
        found = dataclasses.replace(found, size=(config.image_size, config.image_size))
    if config.resize == "square":  # NOAH's protocol
        found = dataclasses.replace(found, crop_pct=1.0, crop_mode="squash", interpolation="bicubic")
    if config.normalize != "model":
        mean, std = data.NORMALIZATIONS[config.normalize] or (_EMBEDDED.mean, _EMBEDDED.std)
        found = dataclasses.replace(found, mean=mean, std=std)
    return found


def augmentation(config: Config) -> Any:
    """From a PIL image to what training sees; None where that is what evaluation sees.

    Raises:
        ConfigError: timm has no such augmentation.
    """
    if config.augment in (None, "none") and not config.random_erasing:
        return None
    seen = preprocessing(config)
    chosen: dict[str, Any] = {"re_prob": config.random_erasing, "re_mode": "pixel", "color_jitter": None}
    if config.augment in (None, "none"):
        return transforms.Compose([seen.transform(), RandomErasing(config.random_erasing, mode="pixel", device="cpu")])
    if config.augment != "flips":
        chosen |= {"auto_augment": config.augment}
    try:
        return seen.transform(training=True, **chosen)
    except Exception as error:  # timm asserts, or raises what its parser trips over
        raise ConfigError(
            f"augment: expected none, flips or what timm takes, such as rand-m9-mstd0.5, got {config.augment!r}"
        ) from error


def load_data(config: Config) -> data.Splits:
    """The images that ``config``, after :func:`resolve`, names; with the honest protocol validation images are held out.

    Raises:
        ValueError, FileNotFoundError: a list, a folder or a file is missing or damaged; names it.
    """
    seen = preprocessing(config)
    both = data.Transforms(seen.transform(), train=augmentation(config))
    splits = data.load(config.data, config.task, config.data_dir or "", transforms=both, options=_options(config))
    if config.data == "shapes" and seen != _EMBEDDED:
        train, val, test = (None if part is None else _Drawn(part, seen) for part in (splits.train, splits.val, splits.test))
        assert train is not None and test is not None
        return splits._replace(train=train, val=val, test=test)
    return splits


def check_data(config: Config) -> dict[str, list[str]]:
    """What is missing or damaged in the data, by task: every task of VTAB-1K, the one of ``config`` elsewhere."""
    task = None if config.data == "vtab1k" else config.task
    return data.check(config.data, task, config.data_dir or "", _options(config))


def _options(config: Config) -> data.DataOptions:
    names = {f.name for f in dataclasses.fields(data.DataOptions)} - {"validate"}
    return data.DataOptions(validate=config.protocol == "honest", **{name: getattr(config, name) for name in names})


class _Drawn:
    """Drawn images, as a model of another size takes them."""

    def __init__(self, images: Any, seen: Preprocessing) -> None:
        self.images, self.seen = images, seen

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.images[index]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.seen.mean, self.seen.std))
        image = F.interpolate(image[None], self.seen.size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        return (image - mean) / std, label

    def label(self, index: int) -> Any:
        return int(self.images.labels[index])


# --- what is drawn in training -------------------------------------------------------------------------------------------


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """What torch, numpy and Python draw inside depends on ``numbers`` alone; their own generators stay where they are."""
    seed = random.Random(repr(numbers)).getrandbits(32)
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


class Seeded:
    """A data set whose augmentation depends on seed, epoch and image alone: not on workers, processes or a resume."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed, self.epoch, index):
            return self.dataset[index]


def mixing(config: Config, num_classes: int) -> Any:
    """timm's Mixup for mixup and cutmix; None where neither is asked for."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes
    )


def labels_of(dataset: Any) -> Tensor:
    """(N,) classes or (N, C) vectors, without reading images where the data set allows that."""
    if isinstance(dataset, data.TensorTask):
        return dataset.labels
    if isinstance(dataset, torch.utils.data.Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if hasattr(dataset, "label"):
        return torch.stack([torch.as_tensor(dataset.label(i)) for i in range(len(dataset))])
    for name in ("targets", "labels"):
        if (found := getattr(dataset, name, None)) is not None:
            return torch.as_tensor(found)
    return torch.stack([torch.as_tensor(dataset[i][1]) for i in range(len(dataset))])


def class_counts(dataset: Any, num_classes: int) -> Tensor:
    """(C,) how many images of each class there are, at least one, float64."""
    labels = labels_of(dataset)
    counts = labels.sum(0) if labels.dim() == 2 else torch.bincount(labels.long(), minlength=num_classes)
    return counts.double().clamp(min=1)
