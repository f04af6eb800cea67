"""From a folder of images to predictions, a plan and an exported file, by the commands alone; and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import fpet
from fpet import cli

COLOURS = {"bär": (220, 30, 30), "cat": (30, 200, 30), "dog": (30, 30, 220)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve noisy images, each of a colour of its own."""
    root = tmp_path_factory.mktemp("photos")
    g = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            pixels = torch.tensor(colour) + torch.randint(-25, 26, (48, 60, 3), generator=g)
            Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def tuned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on them, moved after training."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), root / "backbone.pth")
    arguments = ["--data", "folder", "--data-dir", str(photos), "--model", "test_vit", "--weights", str(root / "backbone.pth")]
    arguments += ["--image-size", "96", "--epochs", "3", "--batch-size", "8", "--lr", "0.01", "--warmup-epochs", "0.5"]
    assert cli.main(["train", *arguments, "--no-progress", "--output", str(root / "first")]) == 0
    shutil.move(root / "first", root / "elsewhere")
    return root / "elsewhere"


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == status
    caught = capsys.readouterr()
    return caught.out if status == 0 else caught.err


def test_predictions_have_names_and_probabilities(
    photos: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = said(capsys, "predict", str(tuned), str(photos / "bär"), "--format", "jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 12 and all(abs(sum(c["probability"] for c in row["classes"]) - 1) < 1e-5 for row in rows)
    assert sum(row["classes"][0]["name"] == "bär" for row in rows) >= 10
    loaded = fpet.load_run(tuned)
    assert loaded.class_names == tuple(sorted(COLOURS))
    image = loaded.transform(Image.open(photos / "bär" / "0.png").convert("RGB"))
    with torch.no_grad():
        expected = loaded.model(image[None]).softmax(-1)[0].max()
    assert rows[0]["classes"][0]["probability"] == pytest.approx(float(expected), abs=1e-5)

    (tmp_path / "bad.png").write_text("no image")
    one = str(photos / "cat" / "3.png")
    assert "bad.png: can't be read" in said(capsys, "predict", str(tuned), one, "bad.png", status=1)
    assert cli.main(["predict", str(tuned), one, "bad.png", "--damaged", "skip", "--format", "csv", "--out", "out.csv"]) == 1
    with open("out.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert table[0]["class_1"] == "cat" and "can't be read" in table[1]["error"] and table[1]["class_1"] == ""
    assert "--out: out.csv exists" in said(capsys, "predict", str(tuned), one, "--out", "out.csv", status=1)
    assert "cat" in said(capsys, "predict", str(tuned), one, "--top", "1")


def test_a_plan_of_a_run_is_judged_on_its_test_images(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plan.png"
    out = said(
        capsys, "plan", "--run", str(tuned), "--layers", "1,3,1+3", "--seconds", "0.2", "--batch-size", "2", "--max-drop", "100",
        "--plot", str(plot),
    )  # fmt: skip
    assert "accuracy" in out and "1+3" in out and "Recommended: --layer" in out and plot.is_file()
    rows = [
        json.loads(line)
        for line in said(
            capsys, "plan", "--model", "test_vit", "--layers", "2", "--seconds", "0.1", "--batch-size", "1", "--json"
        ).splitlines()
    ]
    assert [row["layers"] for row in rows] == [[], [2]] and rows[1]["agreement"] is None


def test_a_run_is_exported_once(photos: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "exported.pt2"
    out = said(capsys, "export", str(tuned), "--out", str(target), "--images", str(photos / "dog"), "--count", "3")
    assert "compared on 3 images" in out and "100 % the same class" in out
    told = json.loads((tmp_path / "exported.pt2.json").read_text(encoding="utf-8"))
    assert told["class_names"] == sorted(COLOURS) and told["preprocessing"]["size"] == [96, 96]
    assert "exported.pt2 exists" in said(
        capsys, "export", str(tuned), "--out", str(target), "--images", str(photos / "dog"), status=1
    )


def test_a_run_shows_what_it_merges(
    photos: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "picture: 3-groups.png" in said(capsys, "visualize", str(photos / "dog" / "3.png"), "--run", str(tuned))
    with Image.open("3-groups.png") as drawn:
        assert drawn.width > drawn.height > 90, "the original stands beside the groups"
    again = ("visualize", str(photos / "dog" / "3.png"), "--run", str(tuned))
    assert "3-groups.png is there already" in said(capsys, *again, status=1)


def test_a_file_alone_is_put_on_the_backbone_it_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    fpet.freeze(fpet.add_adapters(fpet.apply(model, layer=2, refinement=True), "lora"))
    fpet.save(model, tmp_path / "m.safetensors", class_names=["a", "b", "c"], metadata={"author": "me"})
    found = fpet.load_model(tmp_path / "m.safetensors", tmp_path / "backbone.pth")
    assert found.class_names == ("a", "b", "c") and found.metadata == {"author": "me"}
    image = found.transform(Image.new("RGB", (300, 200), "green"))
    with torch.no_grad():
        torch.testing.assert_close(found.model(image[None]), model.eval()(image[None]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere", "file.txt"], "nowhere does not exist"),
        (["predict", ".", "x.png"], "x.png does not exist"),
        (["predict", ".", "."], "no images in this folder"),
        (["export", "."], "expected a finished run"),
        (["export", "file.txt"], "damaged or not safetensors"),
        (["plan", "--model", "resnet18"], "ResNet can't be merged"),
        (["plan", "--model", "vit_tyni"], "timm has no model 'vit_tyni'"),
        (["plan", "--model", "test_vit", "--layers", "2;3"], "--layers: expected layers such as 3,6"),
        (["plan", "--model", "test_vit", "--max-drop", "1"], "--max-drop: needs images"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    error = said(capsys, *arguments, status=1)
    assert message in error and error.count("\n") == 1
