"""Two gloo processes under torch's own launcher: the single process's result, and resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpet.files import checkpoint
from fpet.train import pretrain, sharding, train
from fpet.train.config import Config, ConfigError
from fpet.train.evaluation import evaluate_run
from train_support import Stopped


def launch(config: Config) -> subprocess.CompletedProcess[str]:
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(config).items()
        if value is not None and not isinstance(value, bool)
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fpet", "train"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options, "--no-progress"], env=environment, timeout=500, capture_output=True, text=True, check=False
    )


@pytest.mark.alone
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    pretrain.save_backbone(pretrain.pretrain(2)[0], tmp_path / "backbone.safetensors")
    # Dropout draws differently in each process, so there is none.
    single = Config(
        weights=str(tmp_path / "backbone.safetensors"), output=str(tmp_path / "single"), train_count=60, test_count=25,
        batch_size=16, epochs=2, warmup_epochs=1.0, protocol="honest", drop_path=0.0, dropout=0.0, refinement_dropout=0.0,
        lr=1e-3, device="cpu", progress=False,
    )  # fmt: skip
    expected = train(single)
    double = dataclasses.replace(single, output=str(tmp_path / "double"), accumulate=2)
    done = launch(double)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    found = json.loads((tmp_path / "double" / "result.json").read_text())
    assert found["train_loss"] == pytest.approx(expected.train_loss, rel=1e-4)
    assert found["accuracy"] == pytest.approx(expected.accuracy, abs=1.01 / 25), "at most one near tie of 25 images"
    (_, one), (_, two) = (checkpoint.load_newest(tmp_path / name) for name in ("single", "double"))
    assert len(two["rng"]) == 2
    for name, value in one["tuned"].items():
        torch.testing.assert_close(two["tuned"][name], value, rtol=1e-3, atol=2e-4, msg=name)

    # What two processes began, one may end.
    last = checkpoint.checkpoints(tmp_path / "double")[0]
    last.unlink()
    with pytest.warns(RuntimeWarning, match="resumed with 1 processes instead of 2"):
        resumed = train(double)
    assert resumed.train_loss == pytest.approx(expected.train_loss, rel=1e-4)


@pytest.mark.alone
def test_sharded_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """FSDP2: the same numbers as a single process, checkpoints that hold whole tensors, and resuming under another number."""
    pretrain.save_backbone(pretrain.pretrain(2)[0], tmp_path / "backbone.safetensors")
    single = Config(
        weights=str(tmp_path / "backbone.safetensors"), output=str(tmp_path / "single"), train_count=60, test_count=25,
        batch_size=16, epochs=2, warmup_epochs=1.0, protocol="honest", drop_path=0.0, dropout=0.0, refinement_dropout=0.0,
        lr=1e-3, device="cpu", progress=False, method="lora", eval_batch_size=12,
    )  # fmt: skip
    expected = train(single)
    (_, one) = checkpoint.load_newest(tmp_path / "single")
    sharded = dataclasses.replace(single, output=str(tmp_path / "sharded"), accumulate=2, parallel="fsdp")

    def same_end() -> None:
        found = json.loads((tmp_path / "sharded" / "result.json").read_text())
        assert found["train_loss"] == pytest.approx(expected.train_loss, rel=1e-4)
        assert found["accuracy"] == pytest.approx(expected.accuracy, abs=1.01 / 25)
        (_, two) = checkpoint.load_newest(tmp_path / "sharded")
        for name, value in one["tuned"].items():
            assert type(two["tuned"][name]) is torch.Tensor
            torch.testing.assert_close(two["tuned"][name], value, rtol=1e-3, atol=2e-4, msg=name)
        for i, moments in one["optimizer"]["state"].items():
            torch.testing.assert_close(two["optimizer"]["state"][i]["exp_avg"], moments["exp_avg"], rtol=1e-2, atol=1e-5)

    # Two processes go on where one was, and one where two were.
    with pytest.raises(Stopped):
        train(sharded, on_step=stop_in_second_epoch)
    done = launch(dataclasses.replace(sharded, checkpoint_steps=1))
    assert done.returncode == 0, done.stderr
    assert "resumed with 2 processes instead of 1" in done.stderr
    same_end()
    assert evaluate_run(tmp_path / "sharded").accuracy == pytest.approx(expected.accuracy, abs=1.01 / 25)
    checkpoint.checkpoints(tmp_path / "sharded")[0].unlink()
    steps: list[int] = []
    with pytest.warns(RuntimeWarning, match="resumed with 1 processes instead of 2"):
        train(sharded, on_step=steps.append)
    assert steps == [6]
    same_end()


def stop_in_second_epoch(step: int) -> None:
    if step == 4:  # of three an epoch: the checkpoint after the first is there
        raise Stopped


def test_what_fsdp_can_not_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="compile: expected False with parallel='fsdp', got True"):
        Config(parallel="fsdp", compile=True, output=str(tmp_path)).check()
    with pytest.raises(ConfigError, match="parallel: expected one of ddp, fsdp, got 'zero'"):
        Config(parallel="zero", output=str(tmp_path)).check()

    def no_kernel(*_: object, **__: object) -> None:
        raise NotImplementedError("reduce_scatter")

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(sharding, "fully_shard", no_kernel)
        with pytest.raises(RuntimeError, match=r"parallel: FSDP2 over gloo does not run in torch .*reduce_scatter.*'ddp'"):
            sharding.shard(torch.nn.Sequential(), torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


def test_a_batch_that_can_not_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="batch_size: expected a multiple of 3 processes × 1 parts, got 64"):
        train(Config(output=str(tmp_path / "run")))
