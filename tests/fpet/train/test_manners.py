"""What a run says and leaves when nobody watches, when it is interrupted, and when it goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fpet.files import checkpoint
from fpet.train import pretrain
from fpet.train.progress import Progress, duration

PROGRAM = """
import signal, sys
from fpet.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_piped_run_says_a_line_per_epoch_at_once_ends_with_130_and_goes_on(backbone: str, tmp_path: Path) -> None:
    """``--epochs 3`` alone: the warm-up follows."""
    options = [
        "--task=location", "--train-count=64", "--test-count=16", "--batch-size=16", f"--weights={backbone}", "--no-pictures",
        f"--output={tmp_path / 'run'}",
    ]  # fmt: skip
    running = start(*options, "--epochs=400")
    assert running.stderr is not None
    said: list[str] = []
    for line in running.stderr:  # arrives while the run goes on
        said.append(line)
        if line.startswith("epoch 3 of 400"):
            break
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    out, rest = running.communicate(timeout=60)
    text = "".join(said)
    assert running.returncode == 130 and out == ""
    assert rest.splitlines()[-1] == "fpet train: interrupted; what was finished stays" and "Traceback" not in rest
    assert re.search(r"^learning rate +0.01$", text, re.M) and re.search(r"^images +32×32, squashed", text, re.M)
    assert re.search(r"^epoch 1 of 400: train loss [\d.]+, train accuracy [\d.]+ %, \d+ s$", text, re.M), text
    assert text.index("learning rate") < text.index("epoch 1 of")
    assert checkpoint.load_newest(tmp_path / "run") is not None

    again = start(*options, "--epochs=400")
    assert again.stderr is not None
    for line in again.stderr:
        if line.startswith("epoch "):
            assert int(line.split()[1]) > 3, "it went on"
            break
    again.kill()
    again.communicate(timeout=60)


def test_the_duration_comes_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock) if step in (2, 8) else 0.0))
    step = 0
    with Progress("tuning", 1000, 100) as progress:
        for step in range(1, 20):
            progress.step(100 + step)
    assert capsys.readouterr().err == "tuning: 892 steps left, about 5 min, 0.33 s a step\n"
    assert [duration(s) for s in (3, 89.6, 600, 9000)] == ["3 s", "90 s", "10 min", "2.5 h"]
    with Progress("tuning", 1000, on=False) as silent:
        silent.step(8)
        silent.say("nothing")
    assert capsys.readouterr().err == ""


def test_pretraining_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "_CHECKPOINT_STEPS", 2)
    whole = pretrain.pretrain(5, batch_size=4)[0].state_dict()
    seen: list[int] = []

    def interrupt(step: int, loss: float, accuracy: float) -> None:
        seen.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(5, batch_size=4, folder=tmp_path, report=interrupt)
    again = pretrain.pretrain(5, batch_size=4, folder=tmp_path, report=lambda step, *_: seen.append(step))[0].state_dict()
    assert seen == [0, 1, 2, 2, 3, 4]
    assert all(torch.equal(whole[name], value) for name, value in again.items())


def test_checkpoints_of_another_pretraining_are_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "_CHECKPOINT_STEPS", 2)
    pretrain.pretrain(4, batch_size=4, folder=tmp_path)
    steps: list[int] = []
    pretrain.pretrain(3, batch_size=4, folder=tmp_path, report=lambda step, *_: steps.append(step))
    assert steps == [0, 1, 2]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002.ckpt"]
