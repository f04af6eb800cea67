"""Images of one's own, listed in a CSV file: a path, a label and, if you like, a split per line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from .folder import SPLIT_NAMES, FoundImages
from .image_set import Sample
from .lists import read_text

__all__ = ["COLUMNS", "read"]

COLUMNS = {
    "path": ("path", "image", "image_path", "file", "filepath", "file_name", "filename"),
    "label": ("label", "labels", "class", "target"),
    "split": ("split", "set", "subset", "partition"),
}
"""The columns, and what their headings may be, in any case."""


def read(place: str | Path, multi_label: bool = False) -> FoundImages:
    """The images that the CSV file ``place`` lists; its first line is the heading, see :data:`COLUMNS`.

    Paths are relative to the file's folder. Cells are separated by commas, semicolons or tabs. Classes are the labels, sorted.
    With ``multi_label`` a label names any number of classes, separated by "|".

    Raises:
        FileNotFoundError: the file or images are missing. ValueError: the file is not as described; names the line.
    """
    path = Path(place)
    if path.is_dir():
        raise ValueError(f"data_dir: expected a CSV file, got the folder {path}; for a folder per class use --data folder")
    if not path.is_file():
        raise FileNotFoundError(f"data_dir: the CSV file {path} does not exist")
    lines = read_text(path).splitlines()
    heading = next((line for line in lines if line.strip()), "")
    separator = max(",;\t", key=heading.count)
    rows = csv.DictReader(lines, delimiter=separator)
    columns = _columns(path, rows.fieldnames or [])
    texts: list[tuple[str, tuple[str, ...], str]] = []
    for row in rows:
        where = f"{path}:{rows.line_num}"
        name, label = ((row.get(columns[kind]) or "").strip() for kind in ("path", "label"))
        labels = tuple(dict.fromkeys(filter(None, map(str.strip, label.split("|"))))) if multi_label else (label,)
        if not name or not (label or multi_label):
            raise ValueError(f"{where}: expected a path and a label, got {name!r} and {label!r}")
        part = (row.get(columns["split"]) or "").strip().lower() if "split" in columns else "all"
        if part != "all" and part not in SPLIT_NAMES:
            raise ValueError(f"{where}: expected split to be train, val or test, got {part!r}")
        texts.append((name, labels, SPLIT_NAMES.get(part, "all")))
    classes = tuple(sorted({label for _, labels, _ in texts for label in labels}))
    if len(classes) < 2:
        raise ValueError(f"{path}: expected at least two classes, got {', '.join(classes) or 'no lines'}")
    index = {name: label for label, name in enumerate(classes)}
    parts: dict[str, list[Sample]] = {}
    for name, labels, part in texts:
        image = str(path.parent / name)
        parts.setdefault(part, []).append(Sample(image, tuple(index[label] for label in labels)))
    if "all" not in parts and "train" not in parts:
        raise ValueError(f"{path}: expected lines with split train, got none")
    missing = [sample.name for samples in parts.values() for sample in samples if not Path(sample.name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(texts)} images are missing, such as {missing[0]}")
    return FoundImages(str(path), classes, parts, multi_label)


def _columns(path: Path, headings: Sequence[str]) -> dict[str, str]:
    """The heading of every column that is there, by what it holds."""
    named = {heading.strip().lower(): heading for heading in headings if heading}
    found = {kind: named[name] for kind, names in COLUMNS.items() for name in reversed(names) if name in named}
    for kind in ("path", "label"):
        if kind not in found:
            raise ValueError(
                f"{path}: expected a first line with the headings path and label, got {', '.join(headings) or 'an empty file'}"
            )
    return found
