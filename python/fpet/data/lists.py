"""Tasks given as lists of "path label" lines: VTAB-1K in NOAH's folders, and the five FGVC few-shot tasks.

VTAB-1K: ``DATA_DIR/TASK/{train800,val200,train800val200,test}.txt``, paths relative to ``DATA_DIR/TASK``.
FGVC: ``DATA_DIR/TASK/annotations/{train_meta.list.num_shot_S.seed_K,val_meta.list,test_meta.list}``, likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from .base import Splits
from .image_set import ImageSet, Sample
from .images import find_damaged

__all__ = [
    "FGVC_TASKS", "VTAB_TASKS", "ImageList", "ListedTask", "check_fgvc", "check_folder", "fgvc", "read_list", "read_text",
    "vtab",
]  # fmt: skip


class ListedTask(NamedTuple):
    """Attributes: num_classes; test, how many test images the published split has (None: not checked); group of VTAB."""

    num_classes: int
    test: int | None = None
    group: str = ""


VTAB_TASKS = {
    "cifar": ListedTask(100, 10000, "natural"),
    "caltech101": ListedTask(102, 6084, "natural"),
    "dtd": ListedTask(47, 1880, "natural"),
    "oxford_flowers102": ListedTask(102, 6149, "natural"),
    "oxford_iiit_pet": ListedTask(37, 3669, "natural"),
    "svhn": ListedTask(10, 26032, "natural"),
    "sun397": ListedTask(397, 21750, "natural"),
    "patch_camelyon": ListedTask(2, 32768, "specialized"),
    "eurosat": ListedTask(10, 5400, "specialized"),
    "resisc45": ListedTask(45, 6300, "specialized"),
    "diabetic_retinopathy": ListedTask(5, 42670, "specialized"),
    "clevr_count": ListedTask(8, 15000, "structured"),
    "clevr_dist": ListedTask(6, 15000, "structured"),
    "dmlab": ListedTask(6, 22735, "structured"),
    "kitti": ListedTask(4, 711, "structured"),
    "dsprites_loc": ListedTask(16, 73728, "structured"),
    "dsprites_ori": ListedTask(16, 73728, "structured"),
    "smallnorb_azi": ListedTask(18, 12150, "structured"),
    "smallnorb_ele": ListedTask(9, 12150, "structured"),
}
"""The 19 tasks, by the name of their folder, in the order of the paper's table."""

FGVC_TASKS = {
    "fgvc-aircraft": ListedTask(100),
    "food101": ListedTask(101),
    "oxford-flowers102": ListedTask(102),
    "oxford-pets": ListedTask(37),
    "standford-cars": ListedTask(196),  # spelled as in the published lists
}

_VTAB_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}


class ImageList(ImageSet):
    """Image files, each with one label. ``transform`` makes a (3, H, W) tensor of a PIL image in RGB."""

    def __init__(self, samples: Iterable[tuple[str | Path, int]], transform: Callable[[Image.Image], Tensor]) -> None:
        super().__init__([Sample(str(path), (label,)) for path, label in samples], transform)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError: there is none. ValueError: it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}") from error


def read_list(path: Path, root: Path, num_classes: int) -> list[tuple[Path, int]]:
    """(file, label) of every line of a list; the files are not looked at.

    Raises:
        FileNotFoundError: no list. ValueError: a line is not "path label", or the label is not in range(num_classes).
    """
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{path}:{number}: expected 'path label', got {line!r}")
        if int(label) >= num_classes:
            raise ValueError(f"{path}:{number}: expected a label in range({num_classes}), got {label}")
        samples.append((root / name.strip(), int(label)))
    if not samples:
        raise ValueError(f"{path}: expected 'path label' lines, got an empty list")
    return samples


Transform = Callable[[Image.Image], Tensor]


def vtab(root: Path, task: str, transform: Transform, *, train: Transform | None = None, validate: bool) -> Splits:
    """A VTAB-1K task: train800val200 and test; with ``validate`` train800, val200 and test. ``train``: of training images."""
    folder = root / task
    names = ("train800", "val200", "test") if validate else ("train800val200", None, "test")
    lists = [None if name is None else folder / f"{name}.txt" for name in names]
    return _splits(task, folder, VTAB_TASKS[task].num_classes, lists, transform, train)


def fgvc(
    root: Path, task: str, transform: Transform, *, train: Transform | None = None, shots: int = 16, list_seed: int = 0,
    validate: bool,
) -> Splits:  # fmt: skip
    """A few-shot task: ``shots`` (1, 2, 4, 8 or 16) images a class, the ``list_seed``-th draw (0, 1 or 2)."""
    lists = _fgvc_lists(root / task, shots, list_seed)
    if not validate:
        lists[1] = None
    return _splits(task, root / task, FGVC_TASKS[task].num_classes, lists, transform, train)


def _fgvc_lists(folder: Path, shots: int, list_seed: int) -> list[Path | None]:
    names = (f"train_meta.list.num_shot_{shots}.seed_{list_seed}", "val_meta.list", "test_meta.list")
    return [folder / "annotations" / name for name in names]


def _splits(
    task: str, folder: Path, classes: int, lists: Sequence[Path | None], transform: Transform, train: Transform | None
) -> Splits:
    """The data sets of the lists of training, validation (or None) and test images."""
    tuned, val, test = (
        None if path is None else ImageList(read_list(path, folder, classes), how)
        for path, how in zip(lists, (train or transform, transform, transform), strict=True)
    )
    assert tuned is not None and test is not None
    return Splits(task, classes, tuned, val, test)


def check_folder(root: Path, tasks: list[str] | None = None, *, decode: bool = True) -> dict[str, list[str]]:
    """What is missing or damaged in a VTAB-1K folder, by task; an empty list for a task that is whole.

    Args:
        root: of the tasks' folders. tasks: which; None: all 19.
        decode: open every image, which takes minutes for the whole of it; otherwise only look whether it is there.
    """
    return {task: _check_task(root / task, VTAB_TASKS[task], decode) for task in tasks or VTAB_TASKS}


def check_fgvc(root: Path, task: str, shots: int = 16, list_seed: int = 0) -> list[str]:
    """What is missing or damaged of a few-shot task: lists that can't be read, images that are missing or can't be opened."""
    folder, classes = root / task, FGVC_TASKS[task].num_classes
    wrong: list[str] = []
    files: set[Path] = set()
    for path in _fgvc_lists(folder, shots, list_seed):
        assert path is not None
        try:
            files.update(file for file, _ in read_list(path, folder, classes))
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    missing, unreadable = find_damaged(sorted(files), True)
    if missing:
        wrong.append(f"{folder}: {len(missing)} of {len(files)} images are missing, such as {missing[0]}")
    return wrong + unreadable


def _check_task(folder: Path, task: ListedTask, decode: bool) -> list[str]:
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    wrong: list[str] = []
    lists: dict[str, list[tuple[Path, int]]] = {}
    for name, expected in (*_VTAB_SIZES.items(), ("test", task.test)):
        try:
            lists[name] = read_list(folder / f"{name}.txt", folder, task.num_classes)
        except (OSError, ValueError) as error:
            wrong.append(str(error))
            continue
        if expected is not None and len(lists[name]) != expected:
            wrong.append(f"{folder / name}.txt: expected {expected} images, got {len(lists[name])}")
        repeated = [path for path, count in Counter(path for path, _ in lists[name]).items() if count > 1]
        if repeated:
            wrong.append(f"{folder / name}.txt: {len(repeated)} images are there more than once, such as {repeated[0].name}")
    if _VTAB_SIZES.keys() <= lists.keys() and sorted(lists["train800"] + lists["val200"]) != sorted(lists["train800val200"]):
        wrong.append(f"{folder}/train800val200.txt: expected the images and labels of train800.txt and val200.txt together")
    tuned = {path for name in _VTAB_SIZES for path, _ in lists.get(name, [])}
    if shared := tuned & {path for path, _ in lists.get("test", [])}:
        wrong.append(f"{folder}/test.txt: {len(shared)} images are training images too, such as {min(shared).name}")
    files = sorted({path for samples in lists.values() for path, _ in samples})
    missing, unreadable = find_damaged(files, decode)
    if missing:
        wrong.append(f"{folder}: {len(missing)} of {len(files)} images are missing, such as {missing[0]}")
    return wrong + unreadable
