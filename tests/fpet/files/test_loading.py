"""A file or a run's folder gives the model, its transform and its class names."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import fpet
from fpet.data import image_transform
from fpet.data.preprocessing import Preprocessing
from fpet.train import Config, evaluate_run, pretrain, train


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", **({"num_classes": 3} | arguments)).eval()


def tuned(path: Path, **arguments: Any) -> Any:
    model = fpet.freeze(fpet.apply(fpet.add_adapters(vit(**arguments), "lora"), 2, refinement=True))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    fpet.save(model, path, class_names=["a", "b", "ç"], metadata={"by": "me"})
    return model


@pytest.mark.parametrize("arguments", [{}, {"img_size": 96}, {"in_chans": 1}, {"global_pool": "avg", "img_size": (64, 96)}])
def test_a_file_says_how_to_make_its_model(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = tuned(tmp_path / "a.safetensors", **arguments)
    # The backbone's weights as anyone would have them: a file of timm's own model.
    save_file({n: v.contiguous() for n, v in vit(**arguments).state_dict().items()}, tmp_path / "backbone.safetensors")
    found = fpet.load_model(tmp_path / "a.safetensors", tmp_path / "backbone.safetensors")
    assert found.class_names == ("a", "b", "ç") and found.metadata == {"by": "me"} and not found.model.training
    x = found.transform(picture())[None]
    side = arguments.get("img_size", 160)
    assert x.shape[1:] == (arguments.get("in_chans", 3), *(side if isinstance(side, tuple) else (side, side)))
    torch.testing.assert_close(found.model(x), model(x))
    given = fpet.load_model(tmp_path / "a.safetensors", vit(**arguments))
    torch.testing.assert_close(given.model(x), model(x))


def test_the_transform_is_timms(tmp_path: Path) -> None:
    model = tuned(tmp_path / "a.safetensors")
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config, is_training=False)
    found = fpet.load_model(tmp_path / "a.safetensors", vit())
    assert torch.equal(found.transform(picture()), expected(picture()))
    assert Preprocessing.from_dict(Preprocessing.of(model).asdict()) == Preprocessing.of(model)
    with pytest.raises(ValueError, match="preprocessing: expected the fields of Preprocessing"):
        Preprocessing.from_dict({"colour": 1})


@pytest.mark.parametrize("how", ["none", "imagenet", "half"])
def test_the_transform_of_runs_is_the_squashed_one(how: str) -> None:
    assert torch.equal(Preprocessing.squashed(48, how).transform()(picture()), image_transform(48, how)(picture()))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"expected a file with the weights of test_vit\.r160_in1k, got .*gone"):
        fpet.load_model(tmp_path / "a.safetensors", tmp_path / "gone.safetensors")

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(
        OSError, match=r"needs timm's weights test_vit\.r160_in1k, .*no network.*load_model\(path, backbone=FILE\)"
    ):
        fpet.load_model(tmp_path / "a.safetensors")
    own = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    fpet.save(fpet.freeze(fpet.add_adapters(own, "lora")), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="VisionTransformer, which timm has no name for; pass the bare backbone"):
        fpet.load_model(tmp_path / "own.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("runs")
    pretrain.save_backbone(pretrain.pretrain(2)[0], folder / "backbone.safetensors")
    config = Config(
        output=str(folder / "mine"), weights=str(folder / "backbone.safetensors"), train_count=60, test_count=40, epochs=1,
        warmup_epochs=0.5, batch_size=20, progress=False,
    )  # fmt: skip
    return folder, train(config).accuracy or 0.0


def test_a_run_can_be_moved_and_used_from_anywhere(
    run: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, accuracy = run
    shutil.copytree(folder, tmp_path / "there")
    shutil.move(folder / "backbone.safetensors", folder / "away.safetensors")
    try:
        monkeypatch.chdir(tmp_path)
        found = fpet.load_run("there/mine")
        x = found.transform(picture())[None]
        assert x.shape == (1, 3, 32, 32) and found.model(x).shape == (1, 8) and found.class_names is None
        assert evaluate_run("there/mine").accuracy == pytest.approx(accuracy)
        assert fpet.load_run(folder / "mine").model(x).shape == (1, 8), "the run has a copy of its own"
        (folder / "mine" / "backbone.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"weights: expected the backbone of .*; pass weights=FILE"):
            fpet.load_run(folder / "mine")
        again = fpet.load_run(folder / "mine", weights=folder / "away.safetensors")
        assert torch.equal(again.model(x), found.model(x))
        with pytest.raises(FileNotFoundError, match=r"expected a finished run with config\.json"):
            fpet.load_run(tmp_path)
    finally:
        shutil.move(folder / "away.safetensors", folder / "backbone.safetensors")


def test_runs_on_backbones_with_batch_norm_resume_and_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics are in the checkpoints and in the file."""
    save_file(
        {n: v.contiguous() for n, v in small_hybrid(num_classes=0).state_dict().items()}, tmp_path / "backbone.safetensors"
    )
    monkeypatch.setattr(
        "fpet.train.build._create", lambda config, num_classes, pretrained: small_hybrid(num_classes=num_classes)
    )
    for name, count in (("ä", 20), ("b", 20)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{i}.png")
    config = Config(
        model="vit_small_resnet26d_224", weights=str(tmp_path / "backbone.safetensors"), image_size=64, data="folder",
        data_dir=str(tmp_path / "images"), epochs=2, warmup_epochs=0.5, batch_size=8, progress=False, method="lora", layer=1, protocol="honest",
        output=str(tmp_path / "whole"),
    )  # fmt: skip
    whole = train(config)
    assert evaluate_run(config.output).accuracy == whole.accuracy

    class Stop(Exception): ...

    def stop(step: int) -> None:
        if step == 3:
            raise Stop

    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    with pytest.raises(Stop):
        train(broken, on_step=stop)
    assert train(broken).accuracy == whole.accuracy
    one, two = (fpet.files.modelfile.read_file(tmp_path / name / "model.safetensors")[1] for name in ("whole", "broken"))
    assert any("running_mean" in name for name in one)
    assert fpet.load_run(tmp_path / "whole").class_names == ("b", "ä")
    assert all(torch.equal(one[name], two[name]) for name in one)


def small_hybrid(num_classes: int) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_small_resnet26d_224", num_classes=num_classes, img_size=64, depth=2)
