"""Images of one's own: folders, CSV files and Hugging Face data sets give the same images, split the same way, or a clear error."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fpet import data
from fpet.data import DataOptions, Transforms, UnreadableImage, image_transform

TRANSFORMS = Transforms(image_transform(8))
VALIDATE = DataOptions(validate=True)
COLOURS = {"bär": (255, 0, 0), "cat": (0, 255, 0), "dog": (0, 0, 255)}


def fill(root: Path, counts: dict[str, int], part: str = "") -> Path:
    """Images of the class's colour with its number in the blue-green of one pixel, so that each is another."""
    for name, count in counts.items():
        (root / part / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = Image.new("RGB", (10, 8), COLOURS[name])
            image.putpixel((0, 0), (i, i, i))
            image.save(root / part / name / f"{part}ü {i}.png")
    return root


def load(family: str, place: Path | str, options: DataOptions | None = None) -> data.Splits:
    return data.load(family, "", place, transforms=TRANSFORMS, options=options)


def names(dataset: Any) -> set[str]:
    return {sample.name for sample in dataset.samples}


def labels(dataset: Any) -> Counter[int]:
    return Counter(dataset.label(i) for i in range(len(dataset)))


def test_a_folder_per_class_is_split_by_class_and_seed(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 40, "dog": 20, "bär": 10})
    splits = load("folder", tmp_path, VALIDATE)
    assert splits.class_names == ("bär", "cat", "dog") and splits.num_classes == 3
    assert labels(splits.test) == {0: 2, 1: 8, 2: 4}
    assert labels(splits.val) == {0: 1, 1: 3, 2: 2}
    assert labels(splits.train) == {0: 7, 1: 29, 2: 14}
    assert not names(splits.train) & names(splits.val) and not names(splits.train) & names(splits.test)
    image, label = splits.train[0]
    assert image.shape == (3, 8, 8) and label == 0 and image[0].mean() > 0.9 and image[2].mean() < 0.1

    again, other = load("folder", tmp_path, VALIDATE), load("folder", tmp_path, DataOptions(validate=True, split_seed=1))
    assert names(again.test) == names(splits.test) != names(other.test)
    everything = load("folder", tmp_path)
    assert everything.val is None and names(everything.train) == names(splits.train) | names(splits.val)


def test_parts_that_are_there_stay(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("Validation", 2), ("test", 3)):
        fill(tmp_path, {"cat": count, "dog": count}, part)
    splits = load("folder", tmp_path, VALIDATE)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 4, 6)
    assert len(load("folder", tmp_path).train) == 16


def test_validation_stands_in_for_a_test_part(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 20, "dog": 20}, "train")
    fill(tmp_path, {"cat": 2}, "val")
    splits = load("folder", tmp_path, VALIDATE)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (36, 4, 2)


def test_links_endings_and_hidden_files(tmp_path: Path) -> None:
    fill(tmp_path / "set", {"cat": 5, "dog": 5})
    folder = tmp_path / "set" / "cat"
    (folder / "deeper").mkdir()
    (folder / "ü 0.png").rename(folder / "deeper" / "Zero.PNG")
    (folder / "loop").symlink_to(tmp_path / "set" / "cat")
    (tmp_path / "elsewhere").mkdir()
    (folder / "ü 1.png").rename(tmp_path / "elsewhere" / "one.png")
    (folder / "one.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    for name in ("notes.txt", ".hidden.png", "._ü 2.png", "Thumbs.db"):
        (folder / name).write_text("no image")
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / "__MACOSX").mkdir()
    splits = load("folder", tmp_path / "set")
    assert splits.class_names == ("cat", "dog") and len(splits.train) + len(splits.test) == 10
    assert data.check("folder", None, tmp_path / "set") == {str(tmp_path / "set"): []}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "at least two folders"),
        ({"cat": 5}, "only 'cat'"),
        ({"cat": 5, "dog": 0}, "no training images of dog"),
        ({"cat": 5, "dog": 1}, "'dog' has one image left"),
    ],
)
def test_what_makes_no_task_is_refused_before_any_work(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    fill(tmp_path, counts)
    with pytest.raises(ValueError, match=message):
        load("folder", tmp_path)
    assert any(message.split(" of ")[-1] in line for line in data.check("folder", None, tmp_path)[str(tmp_path)])


def test_other_misplaced_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("folder", tmp_path / "typo")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="folder per class, got the file"):
        load("folder", tmp_path / "file")
    fill(tmp_path / "set", {"cat": 3, "dog": 3}, "train")
    fill(tmp_path / "set", {"cat": 3, "bär": 3}, "test")
    with pytest.raises(ValueError, match=r"classes that .* lacks: bär"):
        load("folder", tmp_path / "set")
    fill(tmp_path / "set", {"dog": 3})
    with pytest.raises(ValueError, match=r"only train, val and test in .*, got dog too"):
        load("folder", tmp_path / "set")


def test_damaged_images_are_named_and_left_out_by_choice(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 6, "dog": 6})
    (tmp_path / "cat" / "bad.png").write_text("no image")
    splits = load("folder", tmp_path)
    everything = [splits.train, splits.test]
    with pytest.raises(UnreadableImage, match=r"bad\.png"):
        for part in everything:
            list(data.batches(part, [range(len(part))]))
    with pytest.raises(UnreadableImage, match=r"^[^\n]*bad\.png: can't be read as an image: [^\n]*$"):
        for part in everything:
            list(data.batches(part, [range(len(part))], workers=1))
    with pytest.warns(RuntimeWarning, match=r"1 of \d+ images are left out of part 'train|test'.*\n.*bad\.png"):
        kept = load("folder", tmp_path, DataOptions(damaged="skip"))
    assert len(kept.train) + len(kept.test) == 12
    assert len(data.check("folder", None, tmp_path)[str(tmp_path)]) == 1
    for path in (tmp_path / "dog").iterdir():
        path.write_text("no image")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no readable training images of dog"):
        warnings.simplefilter("ignore")
        load("folder", tmp_path, DataOptions(damaged="skip"))


@pytest.mark.parametrize(
    ("heading", "line", "encoding"),
    [
        ("path,label", "{path},{label}", "utf-8"),
        ("label;File", "{label};{path}", "utf-8-sig"),
        ("class\tfilename", "{label}\t{path}", "utf-8"),
        ("path,label,split", '"{path}",{label},', "utf-8"),
    ],
)
def test_csv_gives_what_folders_give(tmp_path: Path, heading: str, line: str, encoding: str) -> None:
    fill(tmp_path, {"cat": 8, "bär": 8})
    lines = [line.format(path=f"{name}/ü {i}.png", label=name) for name in ("bär", "cat") for i in range(8)]
    if heading.endswith("split"):
        lines = [text + ("test" if i % 4 == 0 else "train") for i, text in enumerate(lines)]
    (tmp_path / "list.csv").write_text("\n".join([heading, *lines]) + "\n", encoding=encoding)
    splits = load("csv", tmp_path / "list.csv")
    assert splits.class_names == ("bär", "cat")
    assert (len(splits.train), len(splits.test)) == (12, 4)
    for part in (splits.train, splits.test):
        for i in range(len(part)):
            image, label = part[i]
            assert image[:, 4, 4].argmax() == label  # red bears, green cats
    assert data.check("csv", None, tmp_path / "list.csv") == {str(tmp_path / "list.csv"): []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "headings path and label, got an empty file"),
        (b"a.png,cat\nb.png,dog\n", "headings path and label, got a.png, cat"),
        (b"path,label\na.png,\n", r"list\.csv:2: expected a path and a label"),
        (b"path,label\na.png,cat\n", "at least two classes, got cat"),
        (b"path,label\na.png,cat\nb.png,dog\n", "2 of 2 images are missing, such as .*a.png"),
        (b"path,label,split\na.png,cat,trian\n", r"list\.csv:2: expected split to be train, val or test, got 'trian'"),
        (b"path,label,split\na.png,cat,test\nb.png,dog,test\n", "lines with split train"),
        ("path,label\nä.png,cat\n".encode("latin-1"), "expected UTF-8 text, got byte 0xe4"),
    ],
)
def test_damaged_csv_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("csv", tmp_path / "list.csv")
    with pytest.raises(ValueError, match="expected a CSV file, got the folder"):
        load("csv", tmp_path)


def test_several_labels_an_image(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 8, "dog": 8})
    lines = [f"{name}/ü {i}.png,{name}{'|small' if i % 2 else ''}" for name in ("cat", "dog") for i in range(8)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines, "cat/ü 0.png,"]))
    splits = load("csv", tmp_path / "list.csv", DataOptions(multi_label=True))
    assert splits.multi_label and splits.class_names == ("cat", "dog", "small")
    found = [splits.train.label(i) for i in range(len(splits.train))]
    assert all(label.dtype == torch.float32 and label.shape == (3,) for label in found)
    assert {tuple(label.tolist()) for label in found} >= {(1, 0, 0), (1, 0, 1), (0, 1, 0), (0, 1, 1)}
    with pytest.raises(ValueError, match="one class; list several with --data csv"):
        load("folder", tmp_path, DataOptions(multi_label=True))


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="--data huggingface needs the package datasets")
    fill(tmp_path, {"cat": 10, "dog": 10})
    paths = sorted(map(str, (tmp_path / "cat").iterdir())) + sorted(map(str, (tmp_path / "dog").iterdir()))
    marks = ["cat"] * 10 + ["dog"] * 10
    for kind in (datasets.ClassLabel(names=["cat", "dog"]), datasets.Value("string")):
        values = [["cat", "dog"].index(m) for m in marks] if isinstance(kind, datasets.ClassLabel) else marks
        made = datasets.Dataset.from_dict(
            {"image": paths, "label": values}, features=datasets.Features(image=datasets.Image(), label=kind)
        )
        where = tmp_path / f"saved-{type(kind).__name__}"
        made.save_to_disk(str(where))
        splits = load("huggingface", where, VALIDATE)
        assert splits.class_names == ("cat", "dog")
        assert (len(splits.train), len(splits.val), len(splits.test)) == (14, 2, 4)
        for i in range(len(splits.train)):
            image, label = splits.train[i]
            assert image[1:, 4, 4].argmax() == label
        assert data.check("huggingface", None, where) == {str(where): []}

    parts = datasets.DatasetDict({"train": made, "validation": made.select(range(8, 12)), "test": made.select(range(9, 12))})
    parts.save_to_disk(str(tmp_path / "parts"))
    splits = load("huggingface", tmp_path / "parts", VALIDATE)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (20, 4, 3)
    made.remove_columns("image").save_to_disk(str(tmp_path / "blind"))
    with pytest.raises(ValueError, match="one column of images"):
        load("huggingface", tmp_path / "blind")
    made.rename_column("label", "taste").save_to_disk(str(tmp_path / "unnamed"))
    with pytest.raises(ValueError, match="a column of classes"):
        load("huggingface", tmp_path / "unnamed")


def test_every_family_has_a_checker(tmp_path: Path) -> None:
    assert data.check("shapes", "count") == {"count": []}
    assert "cifar100" in str(data.check("torchvision", "cifar100", tmp_path)["cifar100"])
    assert len(data.check("fgvc", "food101", tmp_path)["food101"]) == 3
    assert "no such folder" in data.check("vtab1k", "kitti", tmp_path)["kitti"][0]
    with pytest.raises(ValueError, match="data: expected one of"):
        data.check("folders")
