"""What a run leaves in its folder, and whose folder it is."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import timm
import torch

import fpet
from fpet.files import checkpoint
from fpet.train import Config, ConfigError, evaluate_run, pretrain, train
from fpet.train.inputs import resolve


def test_a_run_leaves_all_that_is_promised(config: Config) -> None:
    result = train(config)
    folder = Path(config.output)
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert float(rows[-1]["train_loss"]) == result.train_loss
    assert json.loads((folder / "result.json").read_text())["accuracy"] == result.accuracy
    assert Config.from_json((folder / "config.json").read_text()).settings() == resolve(config).settings()
    assert (folder / "curves.png").stat().st_size > 1000 and (folder / "confusion.png").stat().st_size > 1000
    scores = json.loads((folder / "result.json").read_text())["scores"]
    confusion = torch.tensor(scores["confusion"])
    assert confusion.sum() == config.test_count and confusion.trace() / confusion.sum() == pytest.approx(result.accuracy)
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


# --- a folder that anything may have happened to -------------------------------------------------------------------------


def test_a_run_that_failed_leaves_its_folder_usable(config: Config) -> None:
    """It has claimed the folder, and trained nothing worth keeping."""
    with pytest.raises(RuntimeError, match="the loss is"):
        train(dataclasses.replace(config, lr=1e30))
    assert (Path(config.output) / "config.json").is_file()
    assert train(config).accuracy is not None
    assert Config.from_json((Path(config.output) / "config.json").read_text()).lr == resolve(config).lr


def test_a_backbone_of_another_pretraining_is_not_taken(config: Config) -> None:
    with pytest.raises(RuntimeError, match="the loss is"):
        train(dataclasses.replace(config, weights=None, pretrain_steps=1, lr=1e30))
    path = Path(config.output) / "backbone.safetensors"
    before = path.read_bytes()
    train(dataclasses.replace(config, weights=None, pretrain_steps=2, epochs=1, warmup_epochs=0.0))
    assert path.read_bytes() != before


@pytest.fixture
def foreign(config: Config, tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """A run on a ViT of timm with weights from a file, or with none."""
    model = timm.create_model("test_vit", img_size=32, num_classes=16)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    chosen = {"weights": "weights.pth"} if request.param == "weights" else {"weights": None, "pretrained": False}
    return dataclasses.replace(
        config, model="test_vit", image_size=32, output="run", epochs=1, warmup_epochs=0.0, eval_batch_size=8, **chosen
    )


@pytest.mark.parametrize("foreign", ["weights", "no-pretrained"], indirect=True)
def test_a_finished_run_is_evaluated_from_anywhere(foreign: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved, from another folder, read-only, its weights gone."""
    monkeypatch.chdir(tmp_path)
    expected = train(foreign).accuracy
    (tmp_path / "weights.pth").unlink()
    torch.rand(3)
    moved, elsewhere = tmp_path / "archive" / "of runs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "run", moved)
    shutil.rmtree(tmp_path / "run")
    for text in ("config.json", "result.json"):
        assert str(tmp_path) not in (moved / text).read_text()
    monkeypatch.chdir(elsewhere)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    real = os.access
    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))
    before = {path: path.stat().st_mtime_ns for path in moved.iterdir()}
    assert evaluate_run(moved).accuracy == pytest.approx(expected)
    assert evaluate_run(Path("..") / "archive" / "of runs", reduction="none").images == foreign.test_count
    assert {path: path.stat().st_mtime_ns for path in moved.iterdir()} == before


def test_a_run_without_its_backbone_says_what_it_lacks(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_vit", img_size=32, num_classes=16)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    settings = dataclasses.replace(
        config, model="test_vit", image_size=32, weights="weights.pth", keep_backbone=False, epochs=1, warmup_epochs=0.0
    )
    expected = train(settings).accuracy
    assert not (Path(config.output) / "backbone.safetensors").exists()
    (tmp_path / "weights.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(ConfigError, match=r"weights: expected a file, got 'weights.pth'"):
        evaluate_run(config.output)
    assert evaluate_run(config.output, weights="moved.pth").accuracy == pytest.approx(expected)
