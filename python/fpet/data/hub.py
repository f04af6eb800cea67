"""Data sets of Hugging Face's library ``datasets``: a folder that ``save_to_disk`` wrote, or a name on the Hub."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import IO, Any

from .folder import SPLIT_NAMES, FoundImages
from .image_set import Sample

__all__ = ["read"]


def read(place: str | Path, multi_label: bool = False) -> FoundImages:
    """The images and labels of a data set with one column of images and one of classes.

    Raises:
        ImportError: the library is missing. FileNotFoundError, ConnectionError: there is no such data set, or no network.
        ValueError: no column of images, or none of labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--data huggingface needs the package datasets: pip install datasets") from error

    if Path(place).is_dir():
        loaded = datasets.load_from_disk(str(place))
    else:
        loaded = datasets.load_dataset(str(place))
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"all": loaded}
    named = {SPLIT_NAMES.get(name.lower(), name): part for name, part in parts.items()}
    if len(named) == 1:
        named = {"all": next(iter(named.values()))}
    elif unknown := sorted(set(named) - {"train", "val", "test"}):
        raise ValueError(f"data_dir: expected the splits train, validation and test in {place}, got {', '.join(unknown)} too")
    if "all" not in named and "train" not in named:
        raise ValueError(f"data_dir: expected a split train in {place}, got {', '.join(parts)}")
    first: Any = next(iter(named.values()))
    images, labels = _columns(first.features, datasets, place, multi_label)
    feature = first.features[labels]
    feature = getattr(feature, "feature", feature)  # of a sequence
    values = {name: part[labels][:] for name, part in named.items()}
    if isinstance(feature, datasets.ClassLabel):
        classes, index = tuple(feature.names), None
    else:
        texts = {str(v) for column in values.values() for value in column for v in (value if multi_label else [value])}
        classes = tuple(sorted(texts))
        index = {name: label for label, name in enumerate(classes)}
    if len(classes) < 2:
        raise ValueError(f"data_dir: expected at least two classes in column {labels!r} of {place}, got {len(classes)}")

    def encode(value: Any, where: str) -> tuple[int, ...]:
        chosen = tuple(v if index is None else index[str(v)] for v in (value if multi_label else [value]))
        if any(not isinstance(v, int) or not 0 <= v < len(classes) for v in chosen):
            raise ValueError(f"{where}: expected a class in range({len(classes)}), got {value!r}")
        return chosen

    found: dict[str, list[Sample]] = {}
    for name, part in named.items():
        raw = part.cast_column(images, datasets.Image(decode=False))  # so that one reader reads all images
        found[name] = [
            Sample(where, encode(value, where), partial(_open, raw, images, i))
            for i, value in enumerate(values[name])
            for where in [f"{place}[{name!r}][{i}]"]
        ]
    return FoundImages(str(place), classes, found, multi_label)


def _open(part: Any, column: str, index: int) -> str | IO[bytes]:
    value = part[index][column]
    return io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]


def _columns(features: Any, datasets: Any, place: str | Path, multi_label: bool) -> tuple[str, str]:
    """The names of the column of images and of the column of labels."""
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(pictures) != 1:
        raise ValueError(f"data_dir: expected one column of images in {place}, got {len(pictures)} of {', '.join(features)}")
    kinds = {name: getattr(feature, "feature", feature) for name, feature in features.items()}  # of a sequence: of its items
    classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    named = classes or [name for name in features if name in ("label", "labels", "class", "target", "fine_label")]
    preferred = [name for name in named if name in ("label", "labels")] or named
    if not preferred:
        raise ValueError(f"data_dir: expected a column of classes called label in {place}, got {', '.join(features)}")
    sequence = hasattr(features[preferred[0]], "feature")
    if sequence != multi_label:
        wanted = "several labels an image (--multi-label)" if sequence else "one label an image"
        raise ValueError(f"multi_label: column {preferred[0]!r} of {place} has {wanted}")
    return pictures[0], preferred[0]
