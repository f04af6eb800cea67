"""The Python blocks of README and docs run as they stand, page by page, each page in one namespace and a folder of its own.

A page may take for granted what ``GIVEN`` names: files of the reader's, and what its text says that the reader has. Weights are
random, as nothing is downloaded here, and runs are short. A block that needs files which only others publish says so behind the
word python, and is compiled but not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import fpet
from fpet import deploy
from fpet.train import Config

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python(| \(not run: [^)\n]+\))\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(p.relative_to(ROOT)): p
    for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(p.read_text())
}


def photo(*_: Any) -> dict[str, Any]:
    Image.effect_noise((120, 90), 80).convert("RGB").save("photo.jpg")
    return {}


def own_images(namespace: dict[str, Any]) -> dict[str, Any]:
    """Folders of photos, and the run that the page's commands make of them."""
    from fpet.cli import main

    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for i in range(8):
            Image.effect_noise((60, 50), 80).convert("RGB").save(f"photos/{name}/{i}.png")
    Path("new").mkdir()
    Image.effect_noise((60, 50), 80).convert("RGB").save("new/1.jpg")
    torch.save(timm.create_model("test_vit").state_dict(), "backbone.pth")
    command = "train --data folder --data-dir photos --model test_vit --weights backbone.pth --batch-size 4 --no-progress"
    assert main([*command.split(), "--epochs", "1", "--output", "runs/photos"]) == 0
    return {}


def flowers(namespace: dict[str, Any]) -> dict[str, Any]:
    """The run of :func:`own_images` under another name, and a picture."""
    own_images(namespace)
    Path("runs/photos").rename("runs/flowers")
    Path("new/1.jpg").rename("rose.jpg")
    return {}


def exported(namespace: dict[str, Any]) -> dict[str, Any]:
    """Files of all formats."""
    model = fpet.apply(timm.create_model("test_vit", num_classes=3).eval(), layer=2)
    images = torch.rand(2, 3, 160, 160)
    for name, (file, _) in deploy.FORMATS.items():
        deploy.export(model, file, format=name, images=images)
    return {"images": images}


def tuned_files(namespace: dict[str, Any]) -> dict[str, Any]:
    model = timm.create_model("vit_base_patch16_224", pretrained=True)
    for name in ("cifar", "svhn"):
        tuned = fpet.freeze(fpet.add_adapters(fpet.apply(fpet.remove(model), layer=6), "lora"))
        fpet.save(tuned, f"{name}.safetensors")
        fpet.remove_adapters(model)
    return {"images": torch.rand(3, 3, 224, 224)}


def step(namespace: dict[str, Any]) -> dict[str, Any]:
    model = timm.create_model("test_vit", num_classes=3)
    criterion = torch.nn.functional.cross_entropy
    return {"model": model, "images": torch.rand(2, 3, 160, 160), "labels": torch.tensor([0, 2]), "criterion": criterion}


GIVEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "README.md": lambda _: {"x": torch.randn(2, 197, 768), "key": torch.randn(2, 197, 64)},
    "docs/adapters.md": flowers,
    "docs/deploy.md": exported,
    "docs/models.md": lambda _: {"images": torch.rand(1, 3, 224, 224)},
    "docs/own_images.md": own_images,
    "docs/serving.md": tuned_files,
    "docs/train.md": step,
    "docs/visualize.md": photo,
}


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights, the same for the same name; short runs."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def seeded(name: str, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = create(name, pretrained=False, **{**arguments, "num_classes": 0})
            model = create(name, pretrained=False, **arguments)
        model.load_state_dict(backbone.state_dict(), strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", seeded)
    names = Config.__init__.__code__.co_varnames[1 : 1 + len(Config.__init__.__defaults__ or ())]
    short = {"epochs": 1, "train_count": 80, "test_count": 20, "pretrain_steps": 2, "progress": False}
    values = tuple(short.get(name, value) for name, value in zip(names, Config.__init__.__defaults__ or (), strict=True))
    monkeypatch.setattr(Config.__init__, "__defaults__", values)


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize("page", list(PAGES))
def test_python_blocks_run_as_they_stand(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    namespace |= GIVEN.get(page, lambda _: {})(namespace)
    text = PAGES[page].read_text()
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))
        code = compile("\n" * line + block[2], page, "exec")
        if not block[1]:
            exec(code, namespace)
