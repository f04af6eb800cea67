"""A method and two reductions registered from outside the package are known wherever the built-in ones are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fpet
from fpet import cli, comparators
from fpet.adapters import METHODS
from fpet.comparators import REDUCTIONS
from fpet.plugins import import_plugin
from fpet.train import Config, compare, evaluate_run, train

OWN = '''"""A researcher's module."""
import torch
from torch import nn

import fpet
from fpet.adapters import PETModule, attach
from fpet.comparators import Reducer
from fpet_kernels import Merged


class Sequential(PETModule):
    """y + s * up(gelu(down(y))) behind the MLP."""

    def __init__(self, width, hidden_dim, scale):
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(width, hidden_dim, bias=False), nn.Linear(hidden_dim, width, bias=False), scale
        nn.init.zeros_(self.up.weight)

    def forward(self, y):
        return y + self.scale * self.up(torch.nn.functional.gelu(self.down(y)))


@fpet.register_method("own-sequential", hidden_dim=4, scale=0.5, trains=lambda name: name.endswith("norm1.bias"))
def sequential(model, config):
    for block in model.blocks:
        attach(block.mlp, "sequential", Sequential(model.embed_dim, config.hidden_dim, config.scale), acts="output")


class Gain(PETModule):
    """w * y behind attention, one w for all."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, y):
        return y * self.gain


@fpet.register_method("own-gain", fold=lambda model: [
    (b.attn.proj, b.attn.proj.weight.double() * b.attn.gain.gain.double(), b.attn.proj.bias.double() * b.attn.gain.gain.double())
    for b in model.blocks
])
def gain(model, config):
    for block in model.blocks:
        attach(block.attn, "gain", Gain(), acts="output")


@fpet.register_reduction("own-strided", "every second patch goes")
def strided(tokens, key):
    x, size, prefix, _ = tokens
    keep = torch.cat((torch.arange(prefix), torch.arange(prefix, x.shape[1], 2))).to(x.device)
    match = torch.full(x.shape[:2], -1, device=x.device)
    match[:, keep] = torch.arange(len(keep), device=x.device)
    return Merged(x[:, keep], size[:, keep], match)


@fpet.register_reduction("own-learned", "half the patches, weighed by a learned score", everywhere=False)
class Learned(Reducer, nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Parameter(torch.zeros(1))

    def forward(self, tokens, key, refinement):
        x, size, prefix, _ = tokens
        first, second = x[:, prefix::2], x[:, prefix + 1 :: 2]
        weight = torch.sigmoid(self.score)
        out = torch.cat((x[:, :prefix], weight * first + (1 - weight) * second), 1)
        match = torch.cat((torch.arange(prefix), prefix + torch.arange(x.shape[1] - prefix) // 2)).to(x.device)
        match = match.expand(len(x), -1)
        counted = torch.zeros(len(x), out.shape[1], 1, device=x.device).scatter_add(1, match[:, :, None], size)
        return Merged(out, counted, match)

    __call__ = nn.Module.__call__
'''


@pytest.fixture(scope="module", autouse=True)
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own_methods_for_test.py"
    path.write_text(OWN)
    import_plugin(str(path))
    return path


def small(output: Path, backbone: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "output": str(output), "weights": str(backbone), "train_count": 60, "test_count": 40, "epochs": 1, "warmup_epochs": 0.5,
        "batch_size": 20, "progress": False, "method": "own-sequential",
    }  # fmt: skip
    return Config(**(settings | changes))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fpet.train import pretrain

    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    pretrain.save_backbone(pretrain.pretrain(2)[0], path)
    return path


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5).eval()


def test_the_views_show_what_is_registered_later() -> None:
    assert {"own-sequential", "own-gain"} <= set(METHODS) and {"own-strided", "own-learned"} <= set(REDUCTIONS)
    assert METHODS["own-sequential"].defaults.hidden_dim == 4
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["lora"]  # type: ignore[index]
    with pytest.raises(ValueError, match="bits: the method 'own-sequential' has none, got 4"):
        fpet.add_adapters(vit(), "own-sequential", bits=4)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match=r"'lora' is registered already, by fpet\.adapters\.methods"):

        @fpet.register_method("lora")
        def lora(model: Any, config: Any) -> None: ...

    with pytest.raises(ValueError, match="'tome' is registered already"):

        @fpet.register_reduction("tome")
        def tome(tokens: Any, key: Any) -> Any: ...

    for _ in range(2):  # a notebook's cell that runs twice

        @fpet.register_method("own-again", hidden_dim=1)
        def again(model: Any, config: Any) -> None: ...

    with pytest.raises(ValueError, match="dropout: expected a probability"):
        fpet.register_method("own-wrong", dropout=2.0)


@pytest.mark.parametrize("reduction", ["fpet", "own-strided", "own-learned"])
def test_own_method_and_reduction_freeze_count_save_and_load(reduction: str, tmp_path: Path) -> None:
    model, x = vit(), torch.randn(2, 3, 160, 160)
    plain = model(x)
    fpet.add_adapters(model, "own-sequential", hidden_dim=3)
    torch.testing.assert_close(model(x), plain)
    comparators.apply_reduction(model, reduction, layer=2)
    fpet.freeze(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("sequential" in n for n in trained) == 2 * 6 and sum("norm1.bias" in n for n in trained) == 6
    assert ("blocks.2.reducer.score" in trained) == (reduction == "own-learned")
    counted = fpet.count_parameters(model)
    assert counted.adapters == 6 * (2 * 3 * 64 + 64)
    assert (counted.refinement > 0) == (reduction != "own-strided")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    expected = model(x)
    fpet.save(model, tmp_path / "own.safetensors")
    loaded = fpet.load(vit(), tmp_path / "own.safetensors")
    torch.testing.assert_close(loaded(x), expected)
    assert {n for n, p in fpet.freeze(loaded).named_parameters() if p.requires_grad} == trained
    fpet.remove_adapters(comparators.remove_reduction(loaded))
    assert not any("sequential" in n or "reducer" in n for n, _ in loaded.named_parameters())


def test_own_method_folds() -> None:
    model, x = fpet.add_adapters(vit(), "own-gain"), torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.gain.gain.fill_(1.3)
    expected = model(x)
    torch.testing.assert_close(fpet.fold(model)(x), expected)
    assert not any("gain" in n for n, _ in model.named_parameters())


def test_runs_train_compare_and_are_evaluated(tmp_path: Path, backbone: Path) -> None:
    result = train(small(tmp_path / "run", backbone, reduction="own-learned"))
    assert result.refinement == 1 and "own-learned: half the patches" in result.table()
    assert evaluate_run(tmp_path / "run").accuracy == pytest.approx(result.accuracy)
    found = compare(small(tmp_path / "several", backbone), ["fpet", "own-strided", "own-learned"], [0])
    assert set(found) == {"fpet", "own-strided", "own-learned"}


def test_the_command_takes_a_plugin(tmp_path: Path, backbone: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    words = [
        "train", "--method", "own-sequential", "--reduction", "own-strided", "--plugin", str(own), "--epochs", "1", "--warmup-epochs",
        "0.5", "--train-count", "60", "--test-count", "40", "--batch-size", "20", "--no-progress", "--weights", str(backbone),
        "--output", str(output),
    ]  # fmt: skip
    # A process of its own: nothing is registered there.
    where = [str(Path(fpet.__file__).parents[1]), str(Path(fpet.__file__).parents[2])]
    start = f"import sys; sys.path[:0] = {where!r}; from fpet.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((output / "config.json").read_text())["method"] == "own-sequential"
    without = subprocess.run(
        [sys.executable, "-c", start, "evaluate", str(output)], capture_output=True, text=True, cwd=tmp_path
    )
    assert without.returncode == 1 and "own-sequential" in without.stderr
    named = subprocess.run(
        [sys.executable, "-c", start, "evaluate", str(output), f"--plugin={own.stem}"],
        capture_output=True,
        text=True,
        cwd=own.parent,
    )
    assert named.returncode == 0, named.stderr
    assert cli.main(["train", "--plugin", "no_such_module"]) == 1
    assert "--plugin: expected a module to import, got 'no_such_module'" in capsys.readouterr().err


def test_a_file_names_the_module_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fpet.freeze(fpet.add_adapters(vit(), "own-sequential"))
    fpet.save(model, tmp_path / "own.safetensors")
    known = {name: method for name, method in METHODS.items() if not name.startswith("own-")}
    monkeypatch.setattr("fpet.files.saving.METHODS", known)
    with pytest.raises(
        ValueError, match="needs the method 'own-sequential', which is not registered: import own_methods_for_test first"
    ):
        fpet.load(vit(), tmp_path / "own.safetensors")


def test_tables_measure_what_is_registered() -> None:
    from fpet.tables import measure
    from fpet.tables.measure import Variant

    plain = measure.gmac(Variant("tiny", "own-sequential", "none"))
    assert measure.gmac(Variant("tiny", "own-sequential", "own-strided", 3)) < 0.85 * plain
