"""What a run leaves in its folder, and whose folder it is."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

import fpet
from fpet.files import checkpoint
from fpet.train import Config, ConfigError, evaluate_run, pretrain, train


def test_a_run_leaves_all_that_is_promised(config: Config) -> None:
    result = train(config)
    folder = Path(config.output)
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert float(rows[-1]["train_loss"]) == result.train_loss
    assert json.loads((folder / "result.json").read_text())["accuracy"] == result.accuracy
    assert Config.from_json((folder / "config.json").read_text()) == config
    assert evaluate_run(folder).accuracy == pytest.approx(result.accuracy)
    assert f"{100 * result.accuracy:.2f} %" in result.table()
    assert len(checkpoint.checkpoints(folder)) == config.keep_checkpoints
    # the tuned file alone, on the bare backbone, is the model
    model = fpet.load(pretrain.load_backbone(Path(config.weights), 16), folder / "model.safetensors")
    assert model.fpet_config.layers == (3,)
    assert result.refinement == 2 * 32 * 32 and result.head == 16 * 65


def test_another_runs_folder_is_refused(config: Config) -> None:
    train(config)
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(lr: 0.01, 0.1\)"):
        train(dataclasses.replace(config, lr=0.1))
    with pytest.raises(ConfigError, match="resume is off"):
        train(dataclasses.replace(config, resume=False))
