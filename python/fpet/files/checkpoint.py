"""Checkpoints that survive: each is complete under its name or not there, and a damaged one is found out and passed over."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .atomic import write_atomically

__all__ = ["CheckpointError", "checkpoints", "load_newest", "read", "remember_rng", "restore_rng", "write"]

_MAGIC = b"fpet-run-1 "


class CheckpointError(ValueError):
    """A file that is no checkpoint, or a damaged one."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*.ckpt") if (m := re.fullmatch(r"step-(\d+)\.ckpt", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def write(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes ``state`` as the checkpoint of ``step``; then, and only then, removes all but the ``keep`` newest.

    Raises:
        OSError: it could not be written; all earlier ones are still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = folder / f"step-{step:08d}.ckpt"
    write_atomically(path, _MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """The state that :func:`write` was given, on the CPU.

    Raises:
        CheckpointError: the file is damaged or of another kind.
    """
    try:
        head, _, data = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not head.startswith(_MAGIC):
        raise CheckpointError(f"{path} is no checkpoint of a run")
    if hashlib.sha256(data).hexdigest().encode() != head[len(_MAGIC) :]:
        raise CheckpointError(f"{path} is damaged: its contents are not those that were written")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole; None where there is none at all.

    A warning names each damaged one passed over, which is renamed to ``….damaged``, lest it count as the newest later on.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found, damaged = checkpoints(folder), []
    for path in found:
        try:
            state = read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; going back to the one before", RuntimeWarning, stacklevel=2)
            damaged.append(path)
            continue
        for other in damaged:
            other.rename(other.with_suffix(".damaged"))
        return path, state
    if found:
        raise CheckpointError(f"{folder}: all {len(found)} checkpoints are damaged; remove them to start over")
    return None


def remember_rng() -> dict[str, Any]:
    """States of torch's random generators, of the CPU and of the current CUDA device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Undoes what was drawn since :func:`remember_rng`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
