"""Data: generated tasks are what their labels say, lists in the published formats, the checker, the order of images."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from fpet import data
from fpet.data import check_folder, epoch_order, image_transform, shapes_task
from fpet.data.lists import VTAB_TASKS, read_list
from fpet.data.shapes import KINDS, SHAPE_TASKS, Shapes, draw
from fpet.train.config import Config
from fpet.train.inputs import load_data


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- generated -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(SHAPE_TASKS))
def test_generated_tasks_are_reproducible_and_balanced(task: str) -> None:
    found, again, other = shapes_task(task, 600, 1), shapes_task(task, 600, 1), shapes_task(task, 600, 2)
    assert torch.equal(found.images, again.images) and not torch.equal(found.images, other.images)
    assert found.images.shape == (600, 3, 32, 32) and found.images.min() >= 0 and found.images.max() <= 1
    counts = torch.bincount(found.labels, minlength=SHAPE_TASKS[task][1])
    assert len(counts) == SHAPE_TASKS[task][1]
    assert counts.min() > 300 / len(counts)


def test_labels_say_what_is_drawn() -> None:
    shapes, label = SHAPE_TASKS["count"][0](200, generator())
    assert torch.equal((shapes.radius > 0).sum(1) - 1, label)

    shapes, label = SHAPE_TASKS["distance"][0](200, generator())
    apart = (shapes.center[:, 0] - shapes.center[:, 1]).norm(dim=1)
    assert torch.equal(((apart - 5) / 5).floor().long(), label)
    assert shapes.center.min() > 1 and shapes.center.max() < 31

    shapes, label = SHAPE_TASKS["location"][0](200, generator())
    column, row = ((shapes.center[:, 0] - 2) / 7).floor().long().unbind(1)
    assert torch.equal(4 * row + column, label)

    shapes, label = SHAPE_TASKS["orientation"][0](200, generator())
    assert torch.equal((shapes.angle[:, 0] / (math.pi / 8)).round().long() % 8, label)


def test_shapes_lie_where_they_are_said_to() -> None:
    """The centre of mass of what differs from the same picture without the shape."""
    for kind in range(len(KINDS)):
        center = torch.tensor([[[20.0, 11.0]]])
        shapes = Shapes(center, torch.tensor([[4.0]]), torch.zeros(1, 1), torch.tensor([[kind]]))
        image = draw(shapes, generator()) - draw(shapes._replace(radius=torch.zeros(1, 1)), generator())
        weight = image.abs().sum(1)[0]
        axis = torch.arange(32) + 0.5
        x, y = (weight.sum(0) * axis).sum() / weight.sum(), (weight.sum(1) * axis).sum() / weight.sum()
        assert abs(x - 20) < 0.7 and abs(y - 11) < 1.2, KINDS[kind]
        assert weight[:5].max() < 1e-4 and (image >= -1e-6).all()


def test_pretraining_digits_are_endless_and_reproducible() -> None:
    for source in ("digits", "shapes"):
        if source == "digits":
            pytest.importorskip("sklearn")
        images, labels, factors = (found := data.PretrainingData(source)).batch(32, g := generator())
        again = data.PretrainingData(source).batch(32, generator())
        assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
        assert factors.shape == (32, 4) and factors.abs().max() <= 1.2
        assert images.shape == (32, 3, 32, 32) and labels.max() < found.num_classes
        assert not torch.equal(found.batch(32, g)[0], images)


def test_order_is_a_new_permutation_each_epoch() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], epoch_order(100, 0, 0))


# --- lists ---------------------------------------------------------------------------------------------------------------


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value % 256, 0, 255)).save(path)


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    """KITTI's folder with 5 + 3 tuning images and 4 test images."""
    folder = tmp_path / "kitti"
    lines = {"train800": [], "val200": [], "test": []}
    for split, count in (("train800", 5), ("val200", 3), ("test", 4)):
        for i in range(count):
            name = f"images/{'test' if split == 'test' else 'train'}/{split} {i}.png"
            write_image(folder / name, 10 * i)
            lines[split].append(f"{name} {i % 4}")
        (folder / f"{split}.txt").write_text("\n".join(lines[split]) + "\n")
    (folder / "train800val200.txt").write_text("\n".join(lines["train800"] + lines["val200"]) + "\n")
    return tmp_path


def config(root: Path, **changes: object) -> Config:
    return dataclasses.replace(Config(data="vtab1k", task="kitti", data_dir=str(root), image_size=8), **changes)  # type: ignore[arg-type]


def test_vtab_splits_follow_the_protocol(vtab: Path) -> None:
    paper, honest = load_data(config(vtab)), load_data(config(vtab, protocol="honest"))
    assert (len(paper.train), paper.val, len(paper.test), paper.num_classes) == (8, None, 4, 4)
    assert (len(honest.train), len(honest.val), len(honest.test)) == (5, 3, 4)
    image, label = honest.train[2]
    assert image.shape == (3, 8, 8) and label == 2
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([20 / 255, 0.0, 1.0]))


def test_batches_of_files_with_and_without_workers(vtab: Path) -> None:
    splits = load_data(config(vtab))
    before = torch.get_rng_state()
    found = {workers: list(data.batches(splits.train, [[3, 1], [7, 0]], workers=workers)) for workers in (0, 1)}
    assert torch.equal(before, torch.get_rng_state())
    for batches in found.values():
        assert [batch.labels.tolist() for batch in batches] == [[3, 1], [2, 0]]
        assert batches[0].images.shape == (2, 3, 8, 8)
    assert torch.equal(found[0][1].images, found[1][1].images)


@pytest.mark.parametrize(("how", "white"), [("none", 1.0), ("half", 1.0), ("imagenet", (1 - 0.485) / 0.229)])
def test_normalisation(how: str, white: float) -> None:
    found = image_transform(4, how)(Image.new("RGB", (9, 5), "white"))
    assert found.shape == (3, 4, 4)
    torch.testing.assert_close(found[0], torch.full((4, 4), white))


def test_a_run_on_a_vtab_folder(vtab: Path, tmp_path: Path) -> None:
    from fpet.train import train

    result = train(
        config(
            vtab, image_size=32, model="vit_tiny_patch16_224", pretrained=False, layer=6, batch_size=4, epochs=1,
            warmup_epochs=0.0, output=str(tmp_path / "run"), protocol="honest", progress=False,
        )
    )  # fmt: skip
    assert result.accuracy in (0, 0.25, 0.5, 0.75, 1) and result.val_accuracy is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/a.png", "expected 'path label'"),
        ("images/a.png 4", r"expected a label in range\(4\), got 4"),
        ("", "empty list"),
    ],
)
def test_damaged_lists_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "train800.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "train800.txt", tmp_path, 4)


def test_the_nineteen_tasks() -> None:
    assert len(VTAB_TASKS) == 19
    groups = [task.group for task in VTAB_TASKS.values()]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]


def test_checker_finds_what_is_missing_and_damaged(vtab: Path) -> None:
    found = check_folder(vtab, ["kitti", "cifar"])
    assert found["cifar"] == [f"{vtab / 'cifar'}: no such folder"]
    sizes = [line for line in found["kitti"] if "expected" in line]
    assert len(sizes) == len(found["kitti"]) == 4  # the lists are short, and nothing else is wrong
    assert any("expected 1000 images, got 8" in line for line in sizes)

    folder = vtab / "kitti"
    (folder / "images/train/train800 0.png").unlink()
    whole = (folder / "images/test/test 1.png").read_bytes()
    (folder / "images/test/test 1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "test.txt").write_text((folder / "test.txt").read_text() + "images/train/val200 0.png 0\n")
    (folder / "val200.txt").write_text("images/train/val200 0.png 1\n")
    text = "\n".join(check_folder(vtab, ["kitti"])["kitti"])
    assert "1 of 12 images are missing" in text and "train800 0.png" in text
    assert "test 1.png: can't be read as an image" in text
    assert "1 images are training images too" in text
    assert "the images and labels of train800.txt and val200.txt together" in text
    assert "can't be read" not in "\n".join(check_folder(vtab, ["kitti"], decode=False)["kitti"])


def test_checker_passes_a_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "kitti"
    write_image(folder / "images/0.png", 0)
    train = [f"images/{i}.png {i % 4}" for i in range(1000)]
    test = [f"images/t{i}.png {i % 4}" for i in range(711)]
    for name in train + test:
        path = folder / name.split()[0]
        if not path.exists():
            path.symlink_to(folder / "images/0.png")
    for name, lines in {"train800": train[:800], "val200": train[800:], "train800val200": train, "test": test}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    assert check_folder(tmp_path, ["kitti"]) == {"kitti": []}


def test_few_shot_lists(tmp_path: Path) -> None:
    lists = tmp_path / "food101" / "annotations"
    lists.mkdir(parents=True)
    for name, count in (("train_meta.list.num_shot_2.seed_1", 4), ("val_meta.list", 2), ("test_meta.list", 3)):
        for i in range(count):
            write_image(tmp_path / "food101" / f"{name}/{i}.jpg", i)
        (lists / name).write_text("".join(f"{name}/{i}.jpg {i}\n" for i in range(count)))
    some = config(tmp_path, data="fgvc", task="food101", shots=2, list_seed=1, protocol="honest")
    splits = load_data(some)
    assert (len(splits.train), len(splits.val), len(splits.test), splits.num_classes) == (4, 2, 3, 101)
    assert splits.test[1][1] == 1
    with pytest.raises(FileNotFoundError, match="num_shot_16"):
        load_data(dataclasses.replace(some, shots=16))


def test_torchvision_sets_that_are_not_there(tmp_path: Path) -> None:
    for task in ("cifar100", "svhn"):
        with pytest.raises(FileNotFoundError, match=f"data_dir: expected torchvision's files of {task}"):
            load_data(config(tmp_path, data="torchvision", task=task))


def test_svhn_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in SVHN's own format, with ten images; only its checksum is not the published one's."""
    io = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    for split in ("train", "test"):
        pixels = torch.arange(10).repeat(32, 32, 3, 1).to(torch.uint8).numpy()
        io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": torch.arange(1, 11)[:, None].numpy()})
    splits = load_data(config(tmp_path, data="torchvision", task="svhn", protocol="honest"))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.num_classes) == (8, 2, 10, 10)
    assert splits.test[9][1] == 0, "SVHN's label 10 is the digit zero"
    image, label = splits.train[0]
    assert image.shape == (3, 8, 8) and image.max() * 255 == pytest.approx((label - 1) % 10)
