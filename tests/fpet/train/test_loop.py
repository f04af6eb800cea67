"""Runs that end the same however often they were stopped."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpet.files import checkpoint
from fpet.train import Config, ConfigError, train
from train_support import Stopped, assert_same_end, stop_after


@pytest.mark.parametrize("step", [3, 5])
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
        "import os, signal, sys\nfrom fpet.train import Config\nfrom fpet.train import train\n"
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


def test_divergence_is_an_error(config: Config) -> None:
    with pytest.raises(RuntimeError, match=r"the loss is .* at step"):
        train(dataclasses.replace(config, lr=1e30, epochs=3))
