"""Images of one's own: a folder per class, and how such images are split and checked."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from .base import DataOptions, Splits
from .image_set import ImageSet, Sample, keep_readable, why_unreadable

__all__ = ["SPLIT_NAMES", "FoundImages", "datasets", "image_files", "problems", "read", "split"]

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
"""What the parts of a split may be called, in lower case, and what they are called here."""


class FoundImages(NamedTuple):
    """What a family found. Attributes: source, for messages; classes, their names; parts: "train", "val", "test", or "all" for
    images that nothing splits; multi_label."""

    source: str
    classes: tuple[str, ...]
    parts: dict[str, list[Sample]]
    multi_label: bool = False


@cache
def _extensions() -> frozenset[str]:
    Image.init()
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def read(place: str | Path, multi_label: bool = False) -> FoundImages:
    """The images of ``place``: ``CLASS/…``, or ``train/CLASS/…`` with ``test/``, ``val/`` or both beside it.

    Classes are the names of the folders, sorted. Images may lie deeper, and links are followed. Hidden files and folders, and
    files with no ending of an image, are passed over.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder. ValueError: no classes, a class without images, or classes in
            another part that training does not have.
    """
    root = Path(place)
    if multi_label:
        raise ValueError("multi_label: a folder per class gives every image one class; list several with --data csv")
    if not root.exists():
        raise FileNotFoundError(f"data_dir: {root} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"data_dir: expected a folder with a folder per class, got the file {root}")
    named: dict[str, Path] = {}
    for entry in _folders(root):
        if part := SPLIT_NAMES.get(entry.name.lower()):
            if part in named:
                raise ValueError(f"data_dir: {named[part]} and {entry} are both the part '{part}'; keep one")
            named[part] = entry
    if "train" not in named:  # or a class is called "test"
        named = {"all": root}
    elif others := [entry.name for entry in _folders(root) if entry not in named.values()]:
        raise ValueError(f"data_dir: expected only train, val and test in {root}, got {', '.join(others)} too")
    classes = {part: {entry.name: entry for entry in _folders(where)} for part, where in named.items()}
    first = "all" if "all" in named else "train"
    names = tuple(sorted(classes[first]))
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise ValueError(f"data_dir: expected at least two folders in {named[first]}, one per class, got {found}")
    for part, there in classes.items():
        if unknown := sorted(set(there) - set(names)):
            raise ValueError(f"data_dir: {named[part]} has classes that {named[first]} lacks: {', '.join(unknown)}")
    parts = {
        part: [
            Sample(str(path), (label,)) for label, name in enumerate(names) if name in there for path in _images(there[name])
        ]
        for part, there in classes.items()
    }
    return FoundImages(str(root), names, parts)


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _images(root: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for where, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(where, name)
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in _extensions()
        ]
    return found


def image_files(places: Iterable[str | Path]) -> list[Path]:
    """The files named, and the images in the folders named, deeper ones too, each folder sorted.

    Raises:
        FileNotFoundError: a place does not exist. ValueError: a folder holds no images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist")
        inside = _images(place) if place.is_dir() else [place]
        if not inside:
            raise ValueError(f"{place}: no images in this folder")
        found += inside
    return found


def split(found: FoundImages, options: DataOptions) -> FoundImages:
    """``found`` with a training and a test part, and a validation part where ``options.validate`` asks for one.

    Parts that are there stay. A missing one is drawn from the training images: the same fraction of every class, by
    ``split_seed`` alone. Validation images stand in for a test part that is missing.

    Raises:
        ValueError: a class is without training images, or has too few to give each part one.
    """
    for name in ("val_fraction", "test_fraction"):
        if not 0 < getattr(options, name) < 1:
            raise ValueError(f"{name}: expected a fraction in (0, 1), got {getattr(options, name)}")
    parts = dict(found.parts)
    first = "all" if "all" in parts else "train"
    _expect_every_class(found, parts[first])
    if first == "all":
        parts["train"] = parts.pop("all")
    if not parts.get("test"):
        if parts.get("val"):
            parts["test"] = parts.pop("val")
        else:
            parts["train"], parts["test"] = _draw(found, parts["train"], options.test_fraction, options.split_seed, "test")
    if options.validate and not parts.get("val"):
        # Another seed than the test part's: the same order would leave out the same places of every class.
        parts["train"], parts["val"] = _draw(found, parts["train"], options.val_fraction, options.split_seed + 1, "val")
    if not options.validate:
        parts["train"] = parts["train"] + parts.pop("val", [])
    _expect_every_class(found, parts["train"])
    return found._replace(parts=parts)


def _expect_every_class(found: FoundImages, samples: Iterable[Sample]) -> None:
    present = {label for sample in samples for label in sample.labels}
    if empty := [name for label, name in enumerate(found.classes) if label not in present]:
        listed = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise ValueError(f"data_dir: no training images of {listed} in {found.source}")


def _draw(
    found: FoundImages, samples: list[Sample], fraction: float, seed: int, part: str
) -> tuple[list[Sample], list[Sample]]:
    """(kept, drawn): ``fraction`` of every class, at least one; images of several classes count with their first."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.labels[0] if sample.labels else -1].append(index)
    drawn: set[int] = set()
    for label, members in sorted(groups.items()):
        if len(members) < 2 and not found.multi_label:
            raise ValueError(
                f"data_dir: class {found.classes[label]!r} has one image left, too few to draw a {part} part from; add images, "
                f"or make the part yourself ({found.source})"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        drawn.update(random.Random(f"{seed} {label}").sample(members, count))
    return [s for i, s in enumerate(samples) if i not in drawn], [s for i, s in enumerate(samples) if i in drawn]


def datasets(
    found: FoundImages, train: Callable[[Any], Tensor], evaluation: Callable[[Any], Tensor], options: DataOptions
) -> Splits:
    """The parts of :func:`split` as data sets."""
    count = len(found.classes)
    parts = {
        name: ImageSet(samples, train if name == "train" else evaluation, count if found.multi_label else None)
        for name, samples in found.parts.items()
    }
    name = Path(found.source).name
    splits = Splits(name, count, parts["train"], parts.get("val"), parts["test"], found.classes, found.multi_label)
    return keep_readable(splits, options.damaged)


def problems(read: Callable[[], FoundImages], options: DataOptions) -> list[str]:
    """What keeps the images from being loaded, and which can't be read; a line each."""
    try:
        found = split(read(), replace(options, validate=False))
    except (OSError, ValueError, ImportError) as error:
        return [str(error)]
    return [reason for samples in found.parts.values() for sample in samples if (reason := why_unreadable(sample)) is not None]
