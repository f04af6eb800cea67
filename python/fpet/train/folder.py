"""The folder of a run: whose it is, and what may be written into it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from ..files.checkpoint import checkpoints
from .processes import first_decides, place

__all__ = ["MODEL", "SETTINGS", "claim", "is_held", "refuse", "unwritable"]

SETTINGS, MODEL = "config.json", "model.safetensors"


def is_held(folder: Path) -> bool:
    """Whether a run has left something here that its settings belong to: a checkpoint or a tuned model.

    Settings alone are those of a run that failed before it had trained anything.
    """
    return (folder / MODEL).is_file() or bool(checkpoints(folder))


def claim(folder: Path, settings: dict[str, Any], *, free: Collection[str] = (), resume: bool = True) -> None:
    """Makes the folder that of the run with these settings; every process has to ask.

    Args:
        settings: as they are written, JSON. free: names of those that may differ when a run goes on.
        resume: without, the folder must not hold anything.

    Raises:
        ValueError: it is another run's; it stays as it is.
    """
    refuse(folder, settings, free=free, resume=resume)
    if place()[0] == 0 and not is_held(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SETTINGS, json.dumps(settings, indent=1).encode())


def refuse(folder: Path, settings: dict[str, Any], *, free: Collection[str] = (), resume: bool = True) -> None:
    """Raises as :func:`claim` does, and where nothing could be written; changes nothing."""
    refusal = _refusal(folder, settings, free, resume) if place()[0] == 0 else None
    refusal = first_decides(refusal)
    if refusal is not None:
        raise ValueError(refusal)


def unwritable(folder: Path) -> str | None:
    """Why a folder can't be made or written into; None if it can."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return f"output: {there} is no folder that can be written to"
    return None


def _refusal(folder: Path, settings: dict[str, Any], free: Collection[str], resume: bool) -> str | None:
    if (reason := unwritable(folder)) is not None:
        return reason
    if not is_held(folder):
        return None
    if not resume and checkpoints(folder):
        return f"output: {folder} holds checkpoints, and resume is off; choose another folder or remove them"
    try:
        there = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"output: {folder} holds a run whose {SETTINGS} can't be read ({error}); choose another folder"
    here = json.loads(json.dumps(settings))
    different = [
        f"{name}: {there.get(name)!r}, {here.get(name)!r}"
        for name in sorted({*there, *here} - set(free))
        if there.get(name) != here.get(name)
    ]
    if different:
        return f"output: {folder} holds a run with other settings ({'; '.join(different)}); choose another folder"
    return None
