"""Flickr30K's format, and drawn pairs in it."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from fpet.data import captions as drawn
from fpet.data import flickr30k

inputs = pytest.importorskip("fpet.retrieval.inputs", reason="fpet.retrieval needs transformers")


def write_list(root, entries):
    (root / flickr30k.LIST_NAME).write_text(json.dumps({"images": entries}))


@pytest.fixture
def mini(tmp_path):
    """Two images by hand, as the published list has them."""
    images = tmp_path / flickr30k.IMAGE_FOLDER
    images.mkdir()
    entries = []
    for number, split in enumerate(("train", "test")):
        Image.new("L", (9, 7), 40 * number).save(images / f"{number}.jpg")
        sentences = [
            {"tokens": ["a"], "raw": f"A (very)  Grey: image, number {number}.", "sentid": 2 * number + i, "imgid": number}
            for i in range(2)
        ]
        entries.append({"sentids": [0], "imgid": number, "sentences": sentences, "split": split, "filename": f"{number}.jpg"})
    write_list(tmp_path, entries)
    return tmp_path, entries


def test_the_published_format(mini):
    root, _ = mini
    split = flickr30k.load_split(root, "test", inputs.image_transform(8))
    assert len(split) == 2 and split.image_of == [0, 0] and split.files[0].name == "1.jpg"
    assert split.captions == ["a very grey image, number 1"] * 2
    image, caption, number = split[1]
    assert image.shape == (3, 8, 8) and caption == split.captions[1] and number == 0
    mean, std = torch.tensor(inputs.MEAN), torch.tensor(inputs.STD)
    assert torch.allclose(image[:, 4, 4], (40 / 255 - mean) / std, atol=0.05)
    assert flickr30k.check_folder(root, sizes={"train": 1, "test": 1}) == []
    assert flickr30k.clean_caption("one two three", 2) == "one two"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root, e: (root / flickr30k.LIST_NAME).unlink(), "no such file"),
        (lambda root, e: (root / flickr30k.LIST_NAME).write_text("{"), "expected JSON"),
        (lambda root, e: (root / flickr30k.LIST_NAME).write_text("[]"), '"images"'),
        (lambda root, e: write_list(root, [e[0], {"filename": "1.jpg", "split": "test"}]), r"images\[1\].*'sentences'"),
        (lambda root, e: write_list(root, [{**e[0], "sentences": []}]), r"images\[0\].*at least one caption"),
        (lambda root, e: write_list(root, [{**e[0], "split": 3}]), r"images\[0\].*strings"),
        (lambda root, e: write_list(root, [{**e[0], "filename": "../0.jpg"}]), "without folders"),
    ],
)
def test_lists_that_are_refused(mini, damage, message):
    root, entries = mini
    damage(root, entries)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        flickr30k.load_split(root, "train", inputs.image_transform(8))
    (wrong,) = flickr30k.check_folder(root)
    assert str(root) in wrong


def test_splits_and_folders_that_are_not_there(mini):
    root, _ = mini
    for arguments, message in ((("dev",), "expected one of train, val, test"), (("val",), "images of split 'val', got none")):
        with pytest.raises(ValueError, match=message):
            flickr30k.load_split(root, *arguments, inputs.image_transform(8))
    with pytest.raises(FileNotFoundError, match="folder of images"):
        flickr30k.load_split(root, "test", inputs.image_transform(8), image_folder="other")


def test_the_checker_names_what_is_wrong(mini):
    root, entries = mini
    images = root / flickr30k.IMAGE_FOLDER
    (images / "0.jpg").write_bytes((images / "0.jpg").read_bytes()[:200])
    write_list(root, [*entries, {**entries[0], "split": "dev"}, {**entries[0], "filename": "2.jpg"}])
    wrong = "\n".join(flickr30k.check_folder(root))
    for part in (
        "expected 29000 images of split 'train', got 2", "expected 1014 images of split 'val', got 0",
        "4 images have not 5 captions", "unknown splits dev", "1 images are listed more than once, such as 0.jpg",
        "1 of 3 images are missing, such as 2.jpg", "0.jpg: can't be read as an image",
    ):  # fmt: skip
        assert part in wrong, part
    assert "can't be read" not in "\n".join(flickr30k.check_folder(root, decode=False))
    (wrong,) = flickr30k.check_folder(root, image_folder="other", sizes={"train": 2, "test": 1, "dev": 1})[-1:]
    assert "no such folder" in wrong


def test_drawn_pairs(tmp_path):
    folder = drawn.write_folder(tmp_path / "pairs", {"train": 5, "val": 2, "test": 4}, size=16)
    assert flickr30k.check_folder(folder, sizes={"train": 5, "val": 2, "test": 4}) == []
    every = [flickr30k.load_split(folder, name, inputs.image_transform(16)).captions for name in flickr30k.SPLITS]
    first = [caption for captions in every for caption in captions[::3]]
    assert len(set(first)) == len(first) == 11
    assert {word for captions in every for caption in captions for word in caption.split()} <= set(drawn.WORDS)
    with pytest.raises(ValueError, match="at most 2592 images"):
        drawn.write_folder(folder, {"train": 3000})


def test_a_drawing_shows_what_its_caption_says():
    for what in range(0, 2592, 37):
        image, captions = drawn.draw_pair(what, torch.Generator().manual_seed(what))
        words = captions[0].split()
        first, second = drawn.COLOURS[words[1]], drawn.COLOURS[words[-2]]
        halves = image.split(16, dim=1 if "above" in words else 2)
        for half, colour in zip(halves, (first, second), strict=True):
            distance = (half - torch.tensor(colour)[:, None, None]).square().sum(0)
            assert (distance < 0.02).sum() > 8, captions
