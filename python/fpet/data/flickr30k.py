"""Flickr30K with Karpathy's split: images with five captions each.

``DATA_DIR/dataset_flickr30k.json``: ``{"images": [{"filename", "split", "sentences": [{"raw"}, …]}, …]}``, and the images in
``DATA_DIR/flickr30k-images``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .images import find_damaged, read_image
from .lists import read_text

__all__ = ["IMAGE_FOLDER", "LIST_NAME", "SIZES", "SPLITS", "ImageTextSplit", "check_folder", "clean_caption", "load_split"]

LIST_NAME = "dataset_flickr30k.json"
IMAGE_FOLDER = "flickr30k-images"
SPLITS = ("train", "val", "test")
SIZES = {"train": 29000, "val": 1014, "test": 1000}
"""Images of the published split."""
CAPTIONS_PER_IMAGE = 5


class ImageTextSplit:
    """Images and their captions.

    Attributes:
        files: of the images. captions: all of them, cleaned. image_of: for every caption, the index of its image.
    """

    def __init__(
        self, files: list[Path], captions: list[str], image_of: list[int], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.files, self.captions, self.image_of, self.transform = files, captions, image_of, transform

    def __len__(self) -> int:
        """How many captions there are."""
        return len(self.captions)

    def image(self, index: int) -> Tensor:
        """(3, H, W): what ``transform`` makes of image ``index``, read as RGB."""
        return self.transform(read_image(self.files[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, str, int]:
        """A caption with its image: (3, H, W), the caption, the index of the image."""
        number = self.image_of[index]
        return self.image(number), self.captions[index], number


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower case, punctuation to blanks, at most ``max_words`` words: what BLIP is fed."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:max_words])


def load_split(
    root: str | Path, split: str, transform: Callable[[Image.Image], Tensor], *, max_words: int = 30,
    list_name: str = LIST_NAME, image_folder: str = IMAGE_FOLDER,
) -> ImageTextSplit:  # fmt: skip
    """A split of the data set in ``root``; images are opened when they are asked for.

    Raises:
        ValueError: no such split, or the list is not of this format; says where. FileNotFoundError: no list, or no folder of
            images.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    root = Path(root)
    entries = _read_list(root / list_name)
    if not (root / image_folder).is_dir():
        raise FileNotFoundError(f"root: expected a folder of images {root / image_folder}, got none")
    files: list[Path] = []
    captions: list[str] = []
    image_of: list[int] = []
    for name, kind, sentences in entries:
        if kind != split:
            continue
        image_of += [len(files)] * len(sentences)
        captions += [clean_caption(sentence, max_words) for sentence in sentences]
        files.append(root / image_folder / name)
    if not files:
        raise ValueError(f"{root / list_name}: expected images of split {split!r}, got none")
    return ImageTextSplit(files, captions, image_of, transform)


def check_folder(
    root: str | Path, *, decode: bool = True, sizes: dict[str, int] | None = None, list_name: str = LIST_NAME,
    image_folder: str = IMAGE_FOLDER,
) -> list[str]:  # fmt: skip
    """What is missing or damaged in ``root``, a line each; an empty list where it is whole.

    Args:
        decode: open every image, which takes minutes; otherwise only look whether it is there.
        sizes: images per split to expect; None: those of the published split, with five captions each.
    """
    root = Path(root)
    try:
        entries = _read_list(root / list_name)
    except (OSError, ValueError) as error:
        return [str(error)]
    wrong: list[str] = []
    found = Counter(kind for _, kind, _ in entries)
    for split, expected in (SIZES if sizes is None else sizes).items():
        if found[split] != expected:
            wrong.append(f"{root / list_name}: expected {expected} images of split {split!r}, got {found[split]}")
    if sizes is None and (odd := [name for name, _, sentences in entries if len(sentences) != CAPTIONS_PER_IMAGE]):
        wrong.append(f"{root / list_name}: {len(odd)} images have not {CAPTIONS_PER_IMAGE} captions, such as {odd[0]}")
    if unknown := sorted(found.keys() - set(SPLITS)):
        wrong.append(f"{root / list_name}: unknown splits {', '.join(unknown)}")
    if repeated := [name for name, count in Counter(name for name, _, _ in entries).items() if count > 1]:
        wrong.append(f"{root / list_name}: {len(repeated)} images are listed more than once, such as {repeated[0]}")
    folder = root / image_folder
    if not folder.is_dir():
        return [*wrong, f"{folder}: no such folder"]
    files = sorted({folder / name for name, _, _ in entries})
    missing, unreadable = find_damaged(files, decode)
    if missing:
        wrong.append(f"{folder}: {len(missing)} of {len(files)} images are missing, such as {missing[0].name}")
    return wrong + unreadable


def _read_list(path: Path) -> list[tuple[str, str, list[str]]]:
    """(file name, split, captions) of every image."""
    if not path.is_file():
        raise FileNotFoundError(f"root: expected Karpathy's list {path}, got no such file")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise ValueError(f'{path}: expected {{"images": [...]}} with at least one image')
    return [_read_entry(path, number, entry) for number, entry in enumerate(images)]


def _read_entry(path: Path, number: int, entry: Any) -> tuple[str, str, list[str]]:
    try:
        name, split, sentences = entry["filename"], entry["split"], [sentence["raw"] for sentence in entry["sentences"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: images[{number}]: expected filename, split and sentences with raw, got no {error}"
        ) from error
    if not all(isinstance(text, str) for text in (name, split, *sentences)):
        raise ValueError(f"{path}: images[{number}]: expected filename, split and captions as strings")
    if not sentences:
        raise ValueError(f"{path}: images[{number}]: expected at least one caption, got none")
    if Path(name).name != name:
        raise ValueError(f"{path}: images[{number}]: expected a file name without folders, got {name!r}")
    return name, split, sentences
