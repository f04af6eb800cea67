"""Images of one's own, from the folder to the scores, with everything that training adds to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from fpet import data
from fpet.train import Config, ConfigError, evaluate_run, train
from fpet.train.inputs import class_counts, resolve
from train_support import Stopped, assert_same_end, stop_after

CLASSES = {"blau": 14, "grün": 10, "rot": 6}
SETTINGS: dict[str, Any] = dict(
    data="folder", model="test_vit", pretrained=False, image_size=32, epochs=2, batch_size=4, lr=1e-3, progress=False,
    test_fraction=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("bilder"), numpy.random.default_rng(0)
    for channel, (name, count) in enumerate(CLASSES.items()):
        (root / name).mkdir()
        for i in range(count):
            pixels = draw.integers(0, 90, (40, 50 + i, 3), dtype=numpy.uint8)
            pixels[..., 2 - channel] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> Config:
    return Config(data_dir=str(images), output=str(tmp_path / "run"), **SETTINGS)


def test_a_folder_of_images_is_trained_with_all_that_timm_adds(settings: Config) -> None:
    config = dataclasses.replace(
        settings, augment="rand-m5-mstd0.5", random_erasing=0.3, mixup=0.2, cutmix=0.5, label_smoothing=0.1, class_weights=True,
        accumulate=2, epochs=4, lr=3e-3,
    )  # fmt: skip
    result = train(config)
    found = json.loads((Path(config.output) / "result.json").read_text())
    assert found["scores"].keys() == {"macro_f1", "calibration_error", "per_class", "confusion"}
    assert len(found["scores"]["per_class"]) == 3 and result.val_accuracy is not None
    assert result.config.protocol == "honest"
    score = evaluate_run(config.output)
    assert score.accuracy == pytest.approx(result.accuracy) and score.more["macro_f1"] == pytest.approx(
        found["scores"]["macro_f1"]
    )
    header = (Path(config.output) / "log.csv").read_text().splitlines()[0]
    assert "val_macro_f1" in header and "val_calibration_error" in header


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_runs_end_the_same_however_often_they_were_stopped(settings: Config, workers: int) -> None:
    config = dataclasses.replace(settings, augment="rand-m5-mstd0.5", mixup=0.4, checkpoint_steps=2, balanced_sampling=True)
    whole = dataclasses.replace(config, output=settings.output + "-whole")
    train(whole)
    config = dataclasses.replace(config, workers=workers)
    with pytest.raises(Stopped):
        train(config, on_step=stop_after(3))
    torch.rand(5), numpy.random.rand(3)
    train(config)
    assert_same_end(config, whole)


def test_balanced_sampling_brings_every_class_equally_often(settings: Config) -> None:
    from fpet.train.build import build_model
    from fpet.train.classification import Classification
    from fpet.train.inputs import labels_of, load_data

    config = resolve(dataclasses.replace(settings, balanced_sampling=True))
    splits = load_data(config)
    task = Classification(build_model(config, 3), config, splits, torch.device("cpu"))
    drawn = torch.cat([task.order(0, epoch) for epoch in range(200)])
    shares = torch.bincount(labels_of(splits.train)[drawn], minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.03)
    assert torch.equal(task.order(0, 7), task.order(0, 7))
    weighted = Classification(
        build_model(config, 3),
        dataclasses.replace(config, balanced_sampling=False, class_weights=True),
        splits,
        torch.device("cpu"),
    )
    counts = class_counts(splits.train, 3)
    assert (weighted.weights.double() * counts).sum() == pytest.approx(len(splits.train))
    assert torch.allclose(weighted.weights.double() * counts, (weighted.weights.double() * counts).mean())


def test_several_labels_an_image(images: Path, tmp_path: Path) -> None:
    rows, names = ["path,label"], list(CLASSES)
    for i, name in enumerate(names):
        for j in range(CLASSES[name]):
            also = [names[(i + 1) % 3]] if j % 2 else []
            rows.append(f"{images / name / f'{j}.png'},{'|'.join([name, *also])}")
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8")
    config = Config(
        **SETTINGS | {"data": "csv", "multi_label": True, "class_weights": True},
        data_dir=str(tmp_path / "list.csv"),
        output=str(tmp_path / "run"),
    )
    result = train(config)
    assert result.scores.keys() == {"macro_f1", "mean_average_precision", "per_class"}
    assert evaluate_run(config.output).more["mean_average_precision"] == pytest.approx(result.scores["mean_average_precision"])
    for change in ({"mixup": 0.1}, {"label_smoothing": 0.1}, {"balanced_sampling": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))}: expected .* with multi_label"):
            train(dataclasses.replace(config, **change))


def test_any_map_style_data_set_is_trained(tmp_path: Path) -> None:
    class Mine:
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((3, 32, 32), index % 2 - 0.5), index % 2

    splits = data.Splits("mine", 2, Mine(), None, Mine(), ("dark", "bright"))
    config = Config(**SETTINGS | {"protocol": "paper"}, output=str(tmp_path / "run"))
    result = train(config, splits=splits)
    assert result.scores["confusion"] and evaluate_run(config.output, splits=splits).accuracy == result.accuracy
    with pytest.raises(ConfigError, match="data_dir: expected the folder of folder, got None"):
        train(config)
