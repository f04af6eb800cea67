"""Training: what learns and what stays, runs that end the same however often they were stopped, settings that are refused."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import fpet
from fpet.files import checkpoint
from fpet.train import build_model, compare, comparison_table, learning_rate, pretrain, run, sweep, train
from fpet.train.config import Config, ConfigError, add_arguments, from_arguments
from fpet.train.evaluation import evaluate_run
from fpet.train.run import add_arguments as add_train_arguments

TINY = dict(task="location", train_count=48, test_count=24, batch_size=16, epochs=2, warmup_epochs=1.0, progress=False)


class Stopped(Exception):
    """Instead of a kill."""


def stop_after(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Stopped

    return on_step


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    pretrain.save_backbone(pretrain.pretrain(3)[0], path)
    return str(path)


@pytest.fixture
def config(backbone: str, tmp_path: Path) -> Config:
    return Config(weights=backbone, output=str(tmp_path / "run"), **TINY)


def tuned(config: Config) -> dict[str, Tensor]:
    return checkpoint.load_newest(Path(config.output))[1]["tuned"]


def assert_same_end(first: Config, second: Config) -> None:
    (_, a), (_, b) = (checkpoint.load_newest(Path(c.output)) for c in (first, second))
    for name, value in a["tuned"].items():
        assert torch.equal(value, b["tuned"][name]), name
    for key, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name]), (key, name)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]] for state in (a, b)]
    assert rows[0] == rows[1]


# --- what a run leaves ---------------------------------------------------------------------------------------------------


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


def test_the_embedded_backbone_is_pretrained_once_and_recorded(config: Config) -> None:
    config = dataclasses.replace(config, weights=None, pretrain_steps=2, epochs=1, warmup_epochs=0.0)
    result = train(config)
    path = Path(config.output) / "backbone.safetensors"
    before = path.stat().st_mtime_ns
    assert "pre-trained on" in result.backbone and train(config).accuracy == result.accuracy
    assert path.stat().st_mtime_ns == before


def test_pretraining_learns_and_leaves_the_generator_alone() -> None:
    losses: list[float] = []
    before = torch.get_rng_state()
    pretrain.pretrain(25, batch_size=16, report=lambda step, loss, accuracy: losses.append(loss))
    assert torch.equal(before, torch.get_rng_state())
    again: list[float] = []
    pretrain.pretrain(2, batch_size=16, report=lambda step, loss, accuracy: again.append(loss))
    assert again[0] == losses[0] and all(0 < loss < 10 for loss in losses)


# --- what learns ---------------------------------------------------------------------------------------------------------


def test_the_backbone_stays_and_the_rest_moves(config: Config) -> None:
    torch.manual_seed(config.seed)
    start = build_model(config, 16)
    expected = {n: p.detach().clone() for n, p in start.named_parameters()}
    train(config)
    end = tuned(config)
    assert end.keys() == {n for n, p in start.named_parameters() if p.requires_grad}
    assert any("refinement" in n for n in end) and not any(".qkv." in n for n in end)
    moved = {n for n, v in end.items() if not torch.equal(v, expected[n])}
    assert moved == end.keys()


def test_keys_get_no_gradient_through_the_matching(config: Config) -> None:
    """With everything frozen but the merging block's qkv, its key part gets gradient through attention alone."""

    def key_gradient(reduction: str) -> Tensor:
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(config, reduction=reduction, drop_path=0.0), 16).eval()
        weight = model.blocks[3].attn.qkv.weight.requires_grad_(True)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        # The attention's own output cut off: only matching could carry a gradient.
        model.blocks[3].attn.proj.register_forward_hook(lambda module, args, out: out.detach())
        model(images).square().sum().backward()
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    assert not key_gradient("fpet").any()
    leaked = key_gradient("fpet-no-stop").view(3, 64, 64)
    assert leaked[1].any() and not leaked[0].any() and not leaked[2].any()


def test_refinement_lowers_the_loss(config: Config) -> None:
    """Nothing but the refinement is trained, so a lower loss is its doing."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, method="none", refinement_dropout=0.0), 16).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("refinement" in name)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(16, 64))
        for block in model.blocks[3:]:
            block.attn.qkv.weight.mul_(4)  # an untrained class token hardly looks at the patches
    images, labels = torch.rand(16, 3, 32, 32), torch.randint(16, (16,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == 2 * 32 * 32
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert min(losses) < losses[0]


def test_training_the_refinement_reaches_a_lower_loss_than_freezing_it() -> None:
    """Same seeds, same images, same steps; the head learns in both. Matches flip, so single runs scatter: the mean counts."""

    def lowest_loss(seed: int, refine: bool) -> float:
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=8
        )
        with torch.no_grad():  # weights with which attention and MLP do something
            for name, p in model.named_parameters():
                if p.dim() == 2:
                    p.copy_(torch.randn_like(p) * 1.5 / p.shape[1] ** 0.5)
                elif name == "pos_embed":
                    p.normal_()
        fpet.freeze(fpet.apply(model, 0, refinement={"dropout": 0.0, "bits": 32, "hidden_dim": 16})).train()
        refinement: Any = model.blocks[0].refinement
        before = [p.detach().clone() for p in refinement.parameters()]
        refinement.requires_grad_(refine)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.randn(48, 3, 16, 16, generator=generator), torch.randint(8, (48,), generator=generator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0)
        losses = []
        for _ in range(80):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for old, new in zip(before, refinement.parameters(), strict=True):
            assert torch.equal(old, new) != refine
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        return min(losses)

    trained, frozen = (sum(lowest_loss(seed, refine) for seed in range(4)) / 4 for refine in (True, False))
    assert trained < frozen - 0.02


def test_frozen_refinement_stays(config: Config) -> None:
    config = dataclasses.replace(config, refine=False, epochs=1, warmup_epochs=0.0)
    train(config)
    assert not any("refinement" in name for name in tuned(config))


def test_accumulation_and_checkpointing_change_nothing_but_rounding(config: Config) -> None:
    plain = dataclasses.replace(
        config, drop_path=0.0, dropout=0.0, refinement_dropout=0.0, lr=1e-3, epochs=1, warmup_epochs=0.0
    )
    train(plain)
    for name, change in {"accumulate": {"accumulate": 4}, "checkpointing": {"grad_checkpointing": True}}.items():
        other = dataclasses.replace(plain, output=f"{config.output}-{name}", **change)
        train(other)
        for key, value in tuned(plain).items():
            torch.testing.assert_close(tuned(other)[key], value, rtol=1e-3, atol=2e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("change", [{"amp": True}, {"method": "bi-lora"}, {"method": "vpt-deep", "hidden_dim": 2}], ids=str)
def test_other_settings_train(config: Config, change: dict[str, Any]) -> None:
    result = train(dataclasses.replace(config, epochs=1, warmup_epochs=0.0, **change))
    assert 0 <= result.accuracy <= 1 and result.train_loss < 5


def test_ltmp_trains_with_its_penalty_and_comes_back(config: Config) -> None:
    config = dataclasses.replace(config, reduction="ltmp", ltmp_target=0.1, accumulate=2)
    result = train(config)
    assert result.refinement == 2 * 6
    moved = [v for n, v in tuned(config).items() if n.endswith("thresholds.merge")]
    assert len(moved) == 6 and all(v < 0.9 for v in moved), "a tenth of the FLOPs needs lower thresholds"
    assert evaluate_run(config.output).accuracy == pytest.approx(result.accuracy)


def test_schedule() -> None:
    paper = Config(epochs=100, warmup_epochs=10.0, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    assert learning_rate(paper, 0) == 1e-6
    assert learning_rate(paper, 10) == pytest.approx(1e-3)
    assert learning_rate(paper, 100) == pytest.approx(1e-5)
    assert learning_rate(paper, 55) == pytest.approx((1e-3 + 1e-5) / 2)
    rates = [learning_rate(paper, e / 2) for e in range(201)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


# --- stopping and going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_ends_with_the_same_weights(config: Config, step: int) -> None:
    config = dataclasses.replace(config, checkpoint_steps=2, protocol="honest", train_count=60)
    whole = dataclasses.replace(config, output=config.output + "-whole")
    expected = train(whole)
    with pytest.raises(Stopped):
        train(config, on_step=stop_after(step))
    torch.rand(7)  # the generator is somewhere else by now
    result = train(config)
    assert_same_end(config, whole)
    assert (result.accuracy, result.val_accuracy, result.epoch) == (expected.accuracy, expected.val_accuracy, expected.epoch)


def test_a_killed_process_loses_nothing(config: Config) -> None:
    config = dataclasses.replace(config, checkpoint_steps=1)
    program = (
        "import os, signal, sys\nfrom fpet.config import Config\nfrom fpet.train import train\n"
        "def kill(step):\n    if step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(Config.from_json(sys.argv[1]), on_step=kill)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run([sys.executable, "-c", program, config.to_json()], env=environment, timeout=300, check=False)
    assert found.returncode == -signal.SIGKILL
    whole = dataclasses.replace(config, output=config.output + "-whole")
    train(whole)
    steps: list[int] = []
    train(config, on_step=steps.append)
    assert steps == [5, 6]
    assert_same_end(config, whole)


def test_a_damaged_checkpoint_is_passed_over(config: Config) -> None:
    whole = dataclasses.replace(config, output=config.output + "-whole")
    train(whole)
    config = dataclasses.replace(config, checkpoint_steps=1)
    with pytest.raises(Stopped):
        train(config, on_step=stop_after(5))
    newest = checkpoint.checkpoints(Path(config.output))[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    steps: list[int] = []
    with pytest.warns(RuntimeWarning, match=r"step-00000005.ckpt is damaged.*going back to the one before"):
        train(config, on_step=steps.append)
    assert steps == [5, 6]
    assert_same_end(config, whole)


def test_nothing_is_started_over_where_all_checkpoints_are_damaged(config: Config) -> None:
    train(config)
    for path in checkpoint.checkpoints(Path(config.output)):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning), pytest.raises(checkpoint.CheckpointError, match="checkpoints are damaged"):
        train(config)


def test_a_full_disk_loses_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(config.output)
    with pytest.raises(Stopped):
        train(config, on_step=stop_after(4))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.warns(RuntimeWarning, match="no checkpoint at step 6.*earlier ones stay"),
        pytest.raises(OSError, match="No space"),
    ):
        train(config)  # goes on to the end, and can't write the model
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr(os, "fsync", real)
    train(config)
    whole = dataclasses.replace(config, output=config.output + "-whole")
    train(whole)
    assert_same_end(config, whole)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_what_the_csv_has_also_after_resuming(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(config, logger="tensorboard", protocol="honest", train_count=60)
    with pytest.raises(Stopped):
        train(config, on_step=stop_after(4))
    train(config)
    events = EventAccumulator(str(Path(config.output) / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((Path(config.output) / "log.csv").open()))
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"epoch", "step"}
    for name in ("train_loss", "val_accuracy", "lr"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [int(row["step"]) for row in rows]
        assert [event.value for event in found] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)


def test_tensorboard_that_is_not_there_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    with pytest.raises(ConfigError, match="logger: 'tensorboard' needs the package tensorboard"):
        train(dataclasses.replace(config, logger="tensorboard"))


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
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


def test_another_runs_folder_is_refused(config: Config) -> None:
    train(config)
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(lr: 0.01, 0.1\)"):
        train(dataclasses.replace(config, lr=0.1))
    with pytest.raises(ConfigError, match="resume is off"):
        train(dataclasses.replace(config, resume=False))


def test_divergence_is_an_error(config: Config) -> None:
    with pytest.raises(RuntimeError, match=r"the loss is .* at step"):
        train(dataclasses.replace(config, lr=1e30, epochs=3))


# --- several runs, command line ------------------------------------------------------------------------------------------


def test_sweep_picks_on_validation_and_tests_once(config: Config) -> None:
    config = dataclasses.replace(config, epochs=1, warmup_epochs=0.0, train_count=60)
    result = sweep(config, [1.0, 0.1])
    trials = {s: json.loads((Path(config.output) / f"s-{s:g}" / "result.json").read_text()) for s in (0.1, 1.0)}
    assert all(trial["accuracy"] is None for trial in trials.values())
    best = max(trials, key=lambda s: trials[s]["val_accuracy"])
    assert result.config.scale == best and result.config.protocol == "paper" and result.accuracy is not None


def test_compare_shares_the_backbone(config: Config) -> None:
    config = dataclasses.replace(config, weights=None, pretrain_steps=2, epochs=1, warmup_epochs=0.0)
    found = compare(config, ["fpet", "avg-pool"], [0, 1])
    assert {name: len(values) for name, values in found.items()} == {"fpet": 2, "avg-pool": 2}
    assert len(list(Path(config.output).rglob("backbone.safetensors"))) == 1


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    return parser.parse_args(given)


def test_command_line(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "progress"]
    assert run(arguments("--no-progress", f"--weights={config.weights}", f"--output={config.output}", *options)) == 0
    assert "test accuracy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lr: expected a finite number"):
        run(arguments("--lr=-1"))
    with pytest.raises(ConfigError, match=r"--compare: expected some of fpet.*got magic"):
        run(arguments("--compare=fpet,magic"))
    with pytest.raises(ConfigError, match="--seeds: expected numbers"):
        run(arguments("--compare=fpet", "--seeds=a"))


def test_presets() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paper = from_arguments(parser.parse_args(["--preset", "paper", "--task", "kitti"]))
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (100, 64, 1e-3, 1e-4)
    assert (paper.warmup_epochs, paper.warmup_lr, paper.min_lr, paper.drop_path) == (10, 1e-6, 1e-5, 0.1)
    assert (paper.image_size, paper.normalize, paper.layer, paper.task) == (224, "none", 6, "kitti")
    assert from_arguments(parser.parse_args([])) == Config()


@pytest.mark.skipif("FPET_LONG_TESTS" not in os.environ, reason="takes five minutes; FPET_LONG_TESTS=1 runs it")
def test_merged_accuracy_is_within_a_point_of_unmerged_over_five_seeds(tmp_path: Path) -> None:
    """`fpet train --compare fpet,none --seeds 0,1,2,3,4`: the default task, merged in the middle block and not at all."""
    found = compare(Config(output=str(tmp_path / "compare"), progress=False), ["fpet", "none"], range(5))
    print(comparison_table(found))
    merged, plain = (sum(found[name]) / 5 for name in ("fpet", "none"))
    assert plain > 0.8
    assert merged > plain - 0.01
