"""Runs that take a second, and what two of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpet.files import checkpoint
from fpet.train import Config

TINY = dict(task="location", train_count=48, test_count=24, batch_size=16, epochs=2, warmup_epochs=1.0, progress=False)


class Stopped(Exception):
    """Instead of a kill."""


def stop_after(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Stopped

    return on_step


def tuned(config: Config) -> dict[str, Tensor]:
    """Of the newest checkpoint."""
    return checkpoint.load_newest(Path(config.output))[1]["tuned"]


def leaves(state: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every tensor and number of a checkpoint, by where it is; no time."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if key != "seconds":
                yield from leaves(value, (*path, key))
    else:
        yield path, state


def assert_same_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Bit for bit."""
    first, second = dict(leaves(one)), dict(leaves(two))
    assert first.keys() == second.keys()
    for path, value in first.items():
        assert torch.equal(value, second[path]) if isinstance(value, Tensor) else value == second[path], path


def assert_same_end(first: Config, second: Config) -> None:
    (_, one), (_, two) = (checkpoint.load_newest(Path(c.output)) for c in (first, second))
    assert_same_state(one, two)
