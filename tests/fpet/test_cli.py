"""The command ``fpet``: its table, ``fpet visualize`` on files, ``fpet doctor``, and errors of one line."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import timm
import torch
from PIL import Image

import fpet
import fpet_kernels.__main__
from fpet import cli
from fpet.visualization import sheet

MODEL = "test_vit"  # timm's smallest: 160 pixels, 16 a patch, 6 blocks


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a photo in it: left half dark, right half light, noise over it."""
    monkeypatch.chdir(tmp_path)
    pixels = numpy.random.default_rng(0).integers(0, 60, (90, 120, 3), dtype=numpy.uint8)
    pixels[:, 60:] += 180
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def backbone(tmp_path: Path) -> tuple[torch.nn.Module, str]:
    """A model and the file of its weights."""
    torch.manual_seed(3)
    model = timm.create_model(MODEL)
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    return model.eval(), "backbone.pth"


def ran(*arguments: str) -> int:
    return cli.main(["visualize", *arguments])


def test_picture_and_report(backbone: tuple[torch.nn.Module, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, weights = backbone
    assert ran("photo.png", "--model", MODEL, "--layer", "2", "--weights", weights, "--groups-only") == 0
    said = capsys.readouterr().out
    expected = fpet.visualize(fpet.apply(model, layer=2), Image.open("photo.png"))
    with Image.open("photo-groups.png") as drawn:
        assert numpy.array_equal(numpy.asarray(drawn), numpy.asarray(expected.picture))
    report = expected.report
    assert "10×10 patches in 50 groups" in said and "photo-groups.png" in said and "random" not in said
    assert f"layer 2: 101 tokens → 51; cosine similarity of merged pairs {report['mean_similarity']:.3f}" in said
    sizes, groups = (line.split()[1:] for line in said.splitlines()[1:3])
    assert {int(s): int(g) for s, g in zip(sizes, groups, strict=True)} == report["group_sizes"]
    arguments = ("photo.png", "--model", MODEL, "--layer", "2", "--weights", weights)
    assert ran(*arguments) == 1 and "--overwrite" in capsys.readouterr().err
    with Image.open("photo-groups.png") as untouched:
        assert untouched.size == expected.picture.size
    assert ran(*arguments, "--overwrite") == 0
    with Image.open("photo-groups.png") as drawn:
        assert numpy.array_equal(numpy.asarray(drawn), numpy.asarray(sheet(expected, Image.open("photo.png"))))


def test_options_reach_the_model_and_json_comes_out(
    backbone: tuple[torch.nn.Module, str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = backbone[1]
    options = (
        "--layer",
        "1,3",
        "--image-size",
        "96,128",
        "--similarity",
        "dot",
        "--no-normalize",
        "--zoom",
        "3",
        "--groups-only",
    )
    assert ran("photo.png", "--model", MODEL, "--weights", weights, *options, "--json", "--out", "o.jpg") == 0
    said = json.loads(capsys.readouterr().out)
    model = timm.create_model(MODEL, img_size=(96, 128), pretrained=True, pretrained_cfg_overlay={"file": weights}).eval()
    fpet.apply(model, layer=(1, 3), similarity="dot")
    expected = fpet.visualize(model, Image.open("photo.png"), mean=(0, 0, 0), std=(1, 1, 1))
    assert said["source_map"] == expected.source_map.tolist() and said["grid"] == [6, 8]
    assert [m["layer"] for m in said["merges"]] == [1, 3] and said["similarity"] == "dot"
    with Image.open(said["picture"]) as drawn:
        assert drawn.size == (384, 288) and drawn.format == "JPEG"


def test_default_layer_is_the_middle_and_random_weights_are_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("photo.png", "--model", MODEL) == 0
    said = capsys.readouterr().out
    assert "layer 3:" in said and "random" in said


def test_checkpoint_brings_its_layers(backbone: tuple[torch.nn.Module, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, weights = backbone
    fpet.add_adapters(model, "adaptformer")
    fpet.apply(model, layer=(2, 4), refinement=True)
    with torch.no_grad():
        for layer in (2, 4):
            torch.nn.init.normal_(model.blocks[layer].refinement.adapter_up.weight)
    fpet.save(fpet.freeze(model), "tuned.safetensors")
    arguments = ("photo.png", "--model", MODEL, "--weights", weights, "--checkpoint", "tuned.safetensors")
    assert ran(*arguments, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    expected = fpet.visualize(model.eval(), Image.open("photo.png"))
    assert said["source_map"] == expected.source_map.tolist()
    assert said["mean_similarity"] == pytest.approx(expected.report["mean_similarity"], abs=1e-5)

    assert ran(*arguments, "--layer", "1", "--overwrite") == 1
    assert "merges at [2, 4]" in capsys.readouterr().err
    assert ran("photo.png", "--model", MODEL, "--checkpoint", "tuned.safetensors", "--overwrite") == 1  # another backbone
    assert "frozen weights" in capsys.readouterr().err


def test_checkpoint_without_merging_takes_the_layer_given(
    backbone: tuple[torch.nn.Module, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, weights = backbone
    fpet.save(fpet.freeze(fpet.apply(fpet.add_adapters(model, "lora"))), "tuned.safetensors")
    assert ran("photo.png", "--model", MODEL, "--weights", weights, "--checkpoint", "tuned.safetensors", "--layer", "1") == 0
    assert "layer 1:" in capsys.readouterr().out


FAILURES = {
    "no such picture": (("gone.png", "--model", MODEL), "gone.png"),
    "no picture": (("notes.txt", "--model", MODEL), "notes.txt"),
    "no such model": (("photo.png", "--model", "vit_of_nowhere"), "vit_of_nowhere"),
    "a model that can't merge": (("photo.png", "--model", "test_convnext"), "ConvNeXt"),
    "no such layer": (("photo.png", "--model", MODEL, "--layer", "6"), "range(6)"),
    "no such checkpoint": (("photo.png", "--model", MODEL, "--checkpoint", "gone.safetensors"), "gone.safetensors"),
    "no checkpoint": (("photo.png", "--model", MODEL, "--checkpoint", "notes.txt"), "notes.txt"),
    "no such weights": (("photo.png", "--model", MODEL, "--weights", "gone.pth"), "gone.pth"),
    "weights twice": (("photo.png", "--model", MODEL, "--weights", "notes.txt", "--pretrained"), "--weights"),
    "no picture's name": (("photo.png", "--model", MODEL, "--out", "groups.txt"), "--out"),
    "onto itself": (("photo.png", "--model", MODEL, "--out", "./photo.png"), "another file"),
    "no such folder": (("photo.png", "--model", MODEL, "--out", "gone/groups.png"), "gone"),
    "zoom": (("photo.png", "--model", MODEL, "--zoom", "0"), "zoom"),
    "device": (("photo.png", "--model", MODEL, "--device", "moon"), "moon"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line_that_names_the_cause(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("no picture, no checkpoint")
    arguments, cause = FAILURES[case]
    assert ran(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("fpet visualize: ") and cause in captured.err and "Traceback" not in captured.err
    assert not Path("photo-groups.png").exists() and captured.out == ""


def test_traceback_on_request() -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "visualize", "gone.png", "--model", MODEL])


MISUSES = {
    "no command": ([], "COMMAND"),
    "unknown command": (["paint"], "paint"),
    "no model": (["visualize", "photo.png"], "--model"),
    "layer": (["visualize", "photo.png", "--model", MODEL, "--layer", "six"], "'six'"),
    "image size": (["visualize", "photo.png", "--model", MODEL, "--image-size", "1,2,3"], "'1,2,3'"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_explained(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, cause = MISUSES[case]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and cause in capsys.readouterr().err


def test_help_lists_every_command_and_imports_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "broken", cli.Command("no.such.module", "never imported for help"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(name in said and command.summary.split()[0] in said for name, command in cli.COMMANDS.items())


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0 and f"fpet {name}" in capsys.readouterr().out


TYPOS = {
    "option": (["train", "--lerning-rate", "1"], "usage: fpet train", None),
    "option, near": (["train", "--epoks", "1"], "usage: fpet train", "--epochs"),
    "choice": (["train", "--method", "bi-adaptfromer"], "usage: fpet train", "bi-adaptformer"),
    "command": (["trian"], "usage: fpet ", "train"),
    "inner option": (["retrieval", "check", "--data-dri", "x"], "usage: fpet retrieval check", "--data-dir"),
}


@pytest.mark.parametrize("case", TYPOS)
def test_a_typo_is_met_with_the_usage_of_the_command_and_the_nearest_word(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, usage, near = TYPOS[case]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(usage)
    assert (f"did you mean {near}?" in said) == (near is not None), said


def test_settings_are_named_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--warmup-epochs", "-1", "--keep-checkpoints", "0"]) == 1
    said = capsys.readouterr().err
    assert "--warmup-epochs: expected" in said and "--keep-checkpoints: expected" in said and "warmup_epochs" not in said


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fpet_kernels.__main__, "report", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.splitlines() == ["fpet doctor: interrupted; what was finished stays"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"fpet {fpet.__version__}\n"
    assert fpet.__version__ == fpet_kernels.__version__


def test_help_and_import_take_no_torch() -> None:
    program = (
        "import sys, fpet, fpet.cli\ntry: fpet.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False
    )
    assert done.returncode == 0


def test_the_package_has_every_public_name_and_nothing_hides_a_module() -> None:
    assert set(fpet.__all__) <= set(dir(fpet)) and all(getattr(fpet, name) is not None for name in fpet.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        fpet.no_such_name  # noqa: B018
    for found in pkgutil.walk_packages(fpet.__path__, "fpet."):
        room, _, name = found.name.rpartition(".")
        if found.name.endswith("__main__") or room == "fpet.huggingface" or name == "uniadapter":
            continue
        module = importlib.import_module(found.name)
        assert getattr(sys.modules[room], name) is module, f"{found.name} is hidden by {getattr(sys.modules[room], name)}"


def test_doctor_is_that_of_the_kernel_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"status": 1, "hello": "world"}
    monkeypatch.setattr(fpet_kernels.__main__, "report", lambda: facts)
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == facts


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fpet", "visualize"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "fpet visualize" in done.stderr
