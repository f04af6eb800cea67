"""Names and probabilities for images: :func:`predict`, and the command ``fpet predict RUN IMAGE|FOLDER``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import UnreadableImage, image_files, read_image
from .loading import open_tuned

__all__ = ["Prediction", "add_arguments", "predict", "run"]


class Prediction(NamedTuple):
    """Attributes: file; names and probabilities of the best classes, best first; error, why the file could not be read, or
    None."""

    file: Path
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str | None = None


def predict(
    model: nn.Module,
    files: Iterable[str | Path],
    *,
    transform: Callable[[Any], Tensor],
    class_names: Sequence[str],
    multi_label: bool = False,
    top: int = 5,
    batch_size: int = 32,
    damaged: str = "error",
) -> Iterator[Prediction]:
    """The best classes of each file, in the order of the files.

    Args:
        model: a classifier, on the device and in the dtype it is to run in. transform: from a PIL image to (3, H, W).
        class_names: by label. multi_label: every class has a probability of its own (sigmoid instead of softmax).
        top: how many classes. damaged: "error" raises at a file that can't be read; "skip" yields it with its error.

    Raises:
        UnreadableImage, FileNotFoundError: see ``damaged``. ValueError: an argument, or as many names as the model has outputs
            are not given.
    """
    if damaged not in ("error", "skip"):
        raise ValueError(f"damaged: expected 'error' or 'skip', got {damaged!r}")
    if top < 1 or batch_size < 1:
        raise ValueError(f"top, batch_size: expected at least 1, got {top} and {batch_size}")
    like = next(model.parameters())
    remaining = iter(files)
    while chosen := list(islice(remaining, batch_size)):
        images, errors = [], {}
        for file in chosen:
            try:
                images.append(transform(read_image(file)))
            except (UnreadableImage, OSError) as error:
                if damaged == "error":
                    raise
                errors[str(file)] = str(error)
        rows = iter(_scores(model, torch.stack(images).to(like.device, like.dtype), multi_label) if images else ())
        for file in chosen:
            if str(file) in errors:
                yield Prediction(Path(file), (), (), errors[str(file)])
                continue
            row = next(rows)
            if len(row) != len(class_names):
                raise ValueError(f"class_names: expected a name for each of the {len(row)} outputs, got {len(class_names)}")
            best = row.topk(min(top, len(row)))
            yield Prediction(Path(file), tuple(class_names[i] for i in best.indices.tolist()), tuple(best.values.tolist()))


def _scores(model: nn.Module, images: Tensor, multi_label: bool) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(images).float()
    finally:
        model.train(training)
    return (logits.sigmoid() if multi_label else logits.softmax(-1)).cpu()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet predict RUN IMAGE|FOLDER …``."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a finished run, or the model file of one")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders that are searched for them")
    parser.add_argument("--top", type=int, default=5, help="classes for each image (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "csv", "jsonl"), default="text", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE", help="write there instead of the screen; must not exist")
    parser.add_argument("--damaged", choices=("error", "skip"), default="error", help="stop at an image that can't be read, or say so and go on (default: %(default)s)")  # fmt: skip  # noqa: E501
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--weights", help="file of the backbone's weights, where it is not where the run found it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Prints or writes a line per image; 1 where an image was skipped."""
    if options.top < 1 or options.batch_size < 1:
        raise ValueError("--top, --batch-size: expected at least 1")
    files = image_files(options.images)
    if options.out is not None and Path(options.out).exists():
        raise FileExistsError(f"--out: {options.out} exists; choose another name")
    loaded = open_tuned(options.run_folder, weights=options.weights, device=options.device)
    found = predict(
        loaded.model, files, transform=loaded.transform, class_names=loaded.class_names,
        multi_label=loaded.multi_label, top=options.top, batch_size=options.batch_size, damaged=options.damaged,
    )  # fmt: skip
    if options.out is None:
        return _write(found, options.format, options.top, sys.stdout)
    with open(options.out, "x", encoding="utf-8", newline="") as out:
        return _write(found, options.format, options.top, out)


def _write(found: Iterable[Prediction], format: str, top: int, out: Any) -> int:
    table: Any = csv.writer(out)
    if format == "csv":
        table.writerow(["file", *(f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "probability")), "error"])
    skipped = False
    for one in found:
        skipped = skipped or one.error is not None
        pairs = list(zip(one.names, one.probabilities, strict=True))
        if format == "csv":
            cells = [cell for name, p in pairs for cell in (name, f"{p:.6f}")]
            table.writerow([one.file, *cells, *[""] * (2 * (top - len(pairs))), one.error or ""])
        elif format == "jsonl":
            line = {"file": str(one.file), "classes": [{"name": name, "probability": p} for name, p in pairs]}
            out.write(json.dumps(line if one.error is None else {**line, "error": one.error}, ensure_ascii=False) + "\n")
        else:
            text = one.error or ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)
            out.write(f"{text}\n" if one.error else f"{one.file}: {text}\n")
        out.flush()
    return int(skipped)
