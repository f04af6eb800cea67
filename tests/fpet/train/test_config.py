"""Settings that are refused, presets, the schedule."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fpet.train import Config, ConfigError, learning_rate, train
from fpet.train.config import add_arguments, from_arguments
from fpet.train.inputs import resolve


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": "fast"}, "lr: expected float or None, got 'fast'"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"task": "where"}, "task: expected one of count"),
        ({"method": "adapter"}, "method: expected one of"),
        ({"bits": 3}, "bits: expected one of"),
        ({"method": "ssf", "scale": 2.0}, "scale: the method 'ssf' has none"),
        ({"layer": 6}, r"layer: expected .*range\(6\).*got 6"),
        ({"reduction": "tome", "layer": 9}, r"layer: expected .*range\(6\)"),
        ({"batch_size": 49}, "batch_size: expected at most the 48 training images"),
        ({"batch_size": 15, "accumulate": 2}, "batch_size: expected a multiple of 1 processes × 2 parts"),
        ({"warmup_epochs": 2.0}, "warmup_epochs: expected less than the 2 epochs"),
        ({"model": "vit_hug_patch16"}, "model: expected 'embedded' or a model that timm knows"),
        ({"model": "resnet18", "image_size": 224}, "model|img_size"),
        ({"data": "vtab1k", "task": "cifar"}, "data_dir: expected the folder of vtab1k, got None"),
        ({"weights": "nowhere.safetensors"}, "weights: expected a file"),
        ({"output": "/dev/null/run"}, "output: .*no folder that can be written to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configuration_is_refused_before_any_work(config: Config, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **change))
    assert not Path(config.output).exists()


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Config(lr=-1.0, epochs=0, seed=-1).check()
    assert {line.partition(":")[0] for line in str(error.value).splitlines()} >= {"lr", "epochs", "seed"}


def test_presets() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paper = from_arguments(parser.parse_args(["--preset", "paper", "--task", "kitti"]))
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (100, 64, 1e-3, 1e-4)
    paper = resolve(paper)
    assert (paper.warmup_epochs, paper.warmup_lr, paper.min_lr, paper.drop_path) == (10, 1e-6, 1e-5, 0.1)
    assert (paper.image_size, paper.normalize, paper.layer, paper.task) == (224, "none", 6, "kitti")
    assert from_arguments(parser.parse_args([])) == Config()


def test_schedule() -> None:
    paper = Config(epochs=100, warmup_epochs=10.0, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    assert learning_rate(paper, 0) == 1e-6
    assert learning_rate(paper, 10) == pytest.approx(1e-3)
    assert learning_rate(paper, 100) == pytest.approx(1e-5)
    assert learning_rate(paper, 55) == pytest.approx((1e-3 + 1e-5) / 2)
    rates = [learning_rate(paper, e / 2) for e in range(201)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
