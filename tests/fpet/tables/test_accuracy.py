"""Accuracies in ``fpet tables``: embedded, untuned and on data that is at hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

NEEDED = ("timm", "tqdm", "safetensors")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"not installed: {', '.join(missing)} (extra 'fpet')", allow_module_level=True)

from fpet import comparators, data  # noqa: E402
from fpet.tables import accuracy, render  # noqa: E402
from fpet.tables import command as tables  # noqa: E402
from fpet.tables.measure import Variant  # noqa: E402
from fpet.train import pretrain  # noqa: E402
from fpet.train.config import ConfigError  # noqa: E402
from tables_support import columns, ran  # noqa: E402

TINY_RUN = ("epochs=1", "warmup_epochs=0.5", "train_count=40", "test_count=20", "batch_size=20", "pretrain_steps=1")


def test_embedded_accuracies_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tables, "REDUCTIONS", {name: "" for name in ("fpet", "none", "avg-pool")})
    settings = [part for setting in TINY_RUN for part in ("--set", setting)]
    arguments = [
        "--tables",
        "3",
        "--measure",
        "none",
        "--accuracy",
        "embedded",
        "--tasks",
        "count",
        "--seeds",
        "0,1",
        *settings,
    ]
    arguments += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.jsonl")]
    assert ran(*arguments) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["reduction"] for r in rows] == ["fpet", "none", "avg-pool"]
    for row in rows:
        for seed, value in enumerate(row["measured"]["accuracies"]):
            folder = tmp_path / "runs" / "embedded" / "count" / f"bi-adaptformer-{row['reduction']}-{seed}"
            assert value == pytest.approx(100 * json.loads((folder / "result.json").read_text())["accuracy"])
    assert "Embedded task count, bi-adaptformer" in said and "Order of the means: " in said
    monkeypatch.setattr(accuracy, "train", lambda config: pytest.fail("what is finished is not trained again"))


def test_untuned_accuracies_are_of_each_reduction_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = data.PretrainingData()

    def random_backbone(steps: int, seed: int) -> tuple[Any, str, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pretrain.embedded_backbone(source.num_classes), source.source, 0.1

    def mean_score(model: Any, images: Tensor) -> float:  # tells models apart that classify alike
        assert not model.training
        with torch.no_grad():
            return model(images).double().mean().item()

    monkeypatch.setattr(pretrain, "pretrain", random_backbone)
    monkeypatch.setattr(accuracy, "TEST_COUNT", 50)
    monkeypatch.setattr(accuracy, "evaluate", lambda m, d: SimpleNamespace(accuracy=mean_score(m, d.images)))
    arguments = ["--tables", "3", "--measure", "none", "--accuracy", "untuned", "--seeds", "0,1", "--set", "pretrain_steps=40"]
    arguments += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.jsonl")]
    assert ran(*arguments) == 0
    assert ", untuned; test accuracy in %" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {row["reduction"]: row["measured"]["accuracies"] for row in rows}
    assert set(found) == set(accuracy.UNTUNED)
    for seed in (0, 1):
        images = source.batch(50, torch.Generator().manual_seed(1_000_003 + seed))[0]
        for name in found:
            model = random_backbone(40, seed)[0].eval()
            expected = mean_score(model if name == "none" else comparators.apply_reduction(model, name), images)
            assert found[name][seed] == pytest.approx(100 * expected, rel=1e-5), (name, seed)
        assert len({values[seed] for values in found.values()}) == len(found)
    monkeypatch.setattr(pretrain, "pretrain", lambda *args: pytest.fail("what is there is not trained again"))
    assert ran(*arguments) == 0


def test_spread_and_differences_by_hand() -> None:
    def row(reduction: str, *values: float) -> dict[str, Any]:
        return {"model": "embedded", "task": "count", "method": "lora", "reduction": reduction, "measured": {"accuracies": list(values)}}  # fmt: skip

    text = render.embedded_table([row("none", 60.0, 70.0), row("fpet", 61.0, 73.0), row("tome", 40.0)])
    found = columns(text)
    assert found["tokens"] == ["fpet", "none", "tome"] and found["mean %"] == ["67.00", "65.00", "40.00"]
    lines = [line for line in text.splitlines() if line.startswith("| fpet")]
    assert [c.strip() for c in lines[0].strip("|").split("|")] == ["fpet", "61.0", "73.0", "67.00", "8.49", "+2.00", "1.41"]
    assert text.endswith("Order of the means: fpet > none > tome")


def write_few_shot(root: Path) -> None:
    """Food101's lists in the format of the few-shot tasks: one image a class."""
    from PIL import Image

    lists = root / "food101" / "annotations"
    lists.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (40, 30), (60 * i, 30, 90)).save(root / "food101" / f"{i}.png")
    for name in ("train_meta.list.num_shot_1.seed_0", "val_meta.list", "test_meta.list"):
        (lists / name).write_text("".join(f"{i}.png {i}\n" for i in range(4)))


def test_accuracies_on_data_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_few_shot(tmp_path)
    settings = ("shots=1", "epochs=1", "warmup_epochs=0.5", "batch_size=4", "pretrained=false", "workers=0")
    arguments = ["--tables", "A2", "--models", "tiny", "--measure", "none", "--accuracy", "data", "--family", "fgvc"]
    arguments += [*("--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.jsonl"))]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert ran(*arguments) == 0
    said = capsys.readouterr()
    assert "left out: accuracy on oxford-pets" in said.err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["layer"], r["hidden_dim"]) for r in rows] == [(None, None), (None, 1), (3, None)]
    for row in rows:
        assert row["accuracies"].keys() == {"food101"} and row["conditions"]["accuracy"]["tasks"] == "1 of 5"
        assert row["measured"]["accuracy"] == row["accuracies"]["food101"][0]
    assert columns(said.out)["accuracy %, here"] == [f"{r['measured']['accuracy']:.1f}" for r in rows]


def test_scales_are_swept_where_a_method_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Any] = []
    monkeypatch.setattr(accuracy, "sweep", lambda config, scales: swept.append(scales) or SimpleNamespace(accuracy=0.5))
    monkeypatch.setattr(accuracy, "train", lambda config: SimpleNamespace(accuracy=0.25))
    write_few_shot(tmp_path)
    for method, expected in (("lora", 50.0), ("ssf", 25.0)):
        variant = Variant("tiny", method, "none")
        found = accuracy.on_data(variant, "fgvc", ["food101"], tmp_path, [0, 1], tmp_path / "runs", {}, print, [0.1, 1.0])
        assert found == {"food101": [expected, expected]}
    assert swept == [[0.1, 1.0]] * 2


def test_vtab_is_averaged_over_its_groups() -> None:
    assert accuracy.vtab_mean({"cifar": 80.0, "dtd": 60.0, "eurosat": 90.0, "clevr_count": 50.0}) == pytest.approx(70.0)
    assert accuracy.vtab_mean({"food101": 80.0, "oxford-pets": 60.0}) == 70.0


def test_settings_of_runs() -> None:
    found = accuracy.parse_settings(["epochs=3", "refine=false", "lr=1e-3", "weights=w.npz", "checkpoint-steps=5"])
    assert found == {"epochs": 3, "refine": False, "lr": 1e-3, "weights": "w.npz", "checkpoint_steps": 5}
    for wrong in ("epochs", "epoch=3", "epochs=three", "refine=maybe"):
        with pytest.raises(ConfigError, match=r"--set: expected .*, got"):
            accuracy.parse_settings([wrong])
