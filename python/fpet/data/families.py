"""The families of data sets, by name: what each needs, how it is loaded and how it is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import folder, hub, lists, table
from .base import DataOptions, Splits, TensorTask, epoch_order
from .image_set import keep_readable
from .images import normalize
from .shapes import SHAPE_TASKS, shapes_task

__all__ = ["FAMILIES", "Family", "Transforms", "check", "load", "task_names"]


class Transforms(NamedTuple):
    """What becomes of an image.

    Attributes:
        evaluation: from an RGB PIL image to a tensor (3, H, W). train: likewise, for training images; None: as evaluation.
        normalization: name in :data:`fpet.data.NORMALIZATIONS`, for families whose images are tensors from the start.
    """

    evaluation: Callable[[Any], Tensor]
    train: Callable[[Any], Tensor] | None = None
    normalization: str = "none"

    @property
    def training(self) -> Callable[[Any], Tensor]:
        return self.evaluation if self.train is None else self.train


class Family(NamedTuple):
    """Attributes: summary; load(task, place, transforms, options); check(task, place, options), the problems by task; tasks it
    has, none where the data is one task; place, what ``data_dir`` has to be: "folder", "file", "name" (a folder, or a name on
    the Hub), or "" for none."""

    summary: str
    load: Callable[[str, str, Transforms, DataOptions], Splits]
    check: Callable[[str | None, str, DataOptions], dict[str, list[str]]]
    tasks: tuple[str, ...] = ()
    place: str = "folder"


def task_names(family: str) -> tuple[str, ...]:
    """The tasks of a family, none where its data is one task; ValueError where there is no such family."""
    return _family(family).tasks


def load(
    family: str, task: str = "", place: str | Path = "", *, transforms: Transforms, options: DataOptions | None = None
) -> Splits:
    """Training, validation and test images. Without ``options.validate`` validation images are training images too.

    Args:
        family: a key of :data:`FAMILIES`. task: one of its tasks. place: ``data_dir``: see :class:`Family`.

    Raises:
        ValueError, FileNotFoundError: a list, a folder or a file is missing or damaged; names it.
    """
    return _family(family).load(task, str(place), transforms, options or DataOptions())


def check(
    family: str, task: str | None = None, place: str | Path = "", options: DataOptions | None = None
) -> dict[str, list[str]]:
    """What is missing or damaged, by task, after opening every image; an empty list for what is whole.

    Args: as :func:`load`. task: None for all tasks of the family.
    """
    return _family(family).check(task, str(place), options or DataOptions())


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"data: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def _by_class(module: Any) -> tuple[Callable[..., Splits], Callable[..., dict[str, list[str]]]]:
    """Loader and checker of a module whose ``samples(place, options)`` are split by :mod:`fpet.data.folder`."""

    def load(task: str, place: str, transforms: Transforms, options: DataOptions) -> Splits:
        found = folder.split(module.read(place, options.multi_label), options)
        return folder.datasets(found, transforms.training, transforms.evaluation, options)

    def check(task: str | None, place: str, options: DataOptions) -> dict[str, list[str]]:
        return {place: folder.problems(lambda: module.read(place, options.multi_label), options)}

    return load, check


def _vtab(task: str, place: str, transforms: Transforms, options: DataOptions) -> Splits:
    found = lists.vtab(Path(place), task, transforms.evaluation, train=transforms.train, validate=options.validate)
    return keep_readable(found, options.damaged)


def _fgvc(task: str, place: str, transforms: Transforms, options: DataOptions) -> Splits:
    found = lists.fgvc(
        Path(place), task, transforms.evaluation, train=transforms.train, shots=options.shots, list_seed=options.list_seed,
        validate=options.validate,
    )  # fmt: skip
    return keep_readable(found, options.damaged)


def _shapes(task: str, place: str, transforms: Transforms, options: DataOptions) -> Splits:
    classes, how = SHAPE_TASKS[task][1], transforms.normalization
    # The drawing does not depend on the run's seed: seeds are compared on the same images.
    tuning, test = shapes_task(task, options.train_count, 1), shapes_task(task, options.test_count, 2)
    tuning.images, test.images = normalize(tuning.images, how), normalize(test.images, how)
    if not options.validate:
        return Splits(task, classes, tuning, None, test)
    left = options.train_count * 4 // 5  # as train800 and val200
    train = TensorTask(tuning.images[:left], tuning.labels[:left])
    return Splits(task, classes, train, TensorTask(tuning.images[left:], tuning.labels[left:]), test)


def _torchvision(task: str, place: str, transforms: Transforms, options: DataOptions) -> Splits:
    from torchvision.datasets import CIFAR100, SVHN

    def part(name: str, transform: Callable[[Any], Tensor]) -> Any:
        if task == "cifar100":
            return CIFAR100(place, train=name == "train", transform=transform)
        return SVHN(place, split=name, transform=transform)

    try:
        train, seen, test = (
            part(name, transform)
            for name, transform in (
                ("train", transforms.training),
                ("train", transforms.evaluation),
                ("test", transforms.evaluation),
            )
        )
    except RuntimeError as error:
        raise FileNotFoundError(f"data_dir: expected torchvision's files of {task} in {place}: {error}") from error
    names = tuple(train.classes) if task == "cifar100" else tuple(map(str, range(10)))
    if not options.validate:
        return Splits(task, len(names), train, None, test, names)
    order = epoch_order(len(train), 0, 0).tolist()  # a fixed fifth is left out
    left = len(order) * 4 // 5
    subset = torch.utils.data.Subset
    return Splits(task, len(names), subset(train, order[:left]), subset(seen, order[left:]), test, names)


def _check_by_loading(family: str) -> Callable[[str | None, str, DataOptions], dict[str, list[str]]]:
    """A checker for families whose own loader checks files by their digests, or that have no files."""

    def check(task: str | None, place: str, options: DataOptions) -> dict[str, list[str]]:
        wrong: dict[str, list[str]] = {}
        for name in FAMILIES[family].tasks if task is None else (task,):
            try:
                FAMILIES[family].load(name, place, Transforms(lambda image: image), options)
                wrong[name] = []
            except (OSError, ValueError) as error:
                wrong[name] = [str(error)]
        return wrong

    return check


def _check_vtab(task: str | None, place: str, options: DataOptions) -> dict[str, list[str]]:
    return lists.check_folder(Path(place), None if task is None else [task])


def _check_fgvc(task: str | None, place: str, options: DataOptions) -> dict[str, list[str]]:
    names = lists.FGVC_TASKS if task is None else (task,)
    return {name: lists.check_fgvc(Path(place), name, options.shots, options.list_seed) for name in names}


FAMILIES: Mapping[str, Family] = {
    "shapes": Family(
        "drawn shapes, made on the spot",
        _shapes,
        _check_by_loading("shapes"),
        tuple(name for name in SHAPE_TASKS if name != "kind"),
        "",
    ),
    "folder": Family("images of your own, a folder per class", *_by_class(folder)),
    "csv": Family("images of your own, listed in a CSV file", *_by_class(table), place="file"),
    "huggingface": Family("a data set of Hugging Face's library datasets", *_by_class(hub), place="name"),
    "vtab1k": Family("VTAB-1K in NOAH's folders", _vtab, _check_vtab, tuple(lists.VTAB_TASKS)),
    "torchvision": Family("CIFAR-100 and SVHN", _torchvision, _check_by_loading("torchvision"), ("cifar100", "svhn")),
    "fgvc": Family("the five FGVC few-shot tasks", _fgvc, _check_fgvc, tuple(lists.FGVC_TASKS)),
}
