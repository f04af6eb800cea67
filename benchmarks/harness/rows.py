"""Rows of figures: JSON lines, one per implementation and setting, and how tables group them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["Row", "default_path", "latest", "read", "write"]

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


def default_path(benchmark: str, device: torch.device) -> Path:
    return RESULTS / f"{benchmark}-{device.type}.jsonl"


def write(rows: Sequence[Row], benchmark: str, out: str | None, device: torch.device) -> Path | None:
    """Appends ``rows``; returns where, or None where there are none or ``out`` is "none"."""
    if out == "none" or not rows:
        return None
    path = Path(out) if out else default_path(benchmark, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def read(path: str, benchmark: str) -> list[Row]:
    """The rows of ``benchmark`` in a file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, filter(str.strip, lines)) if row["benchmark"] == benchmark]


def latest(rows: Iterable[Row], setting: Sequence[str], implementation: Sequence[str]) -> list[list[Row]]:
    """Rows with the same values of the fields ``setting`` together, the latest of each ``implementation``."""
    groups: dict[tuple, dict[tuple, Row]] = {}
    for row in rows:
        group = groups.setdefault(tuple(row[name] for name in setting), {})
        group[tuple(row[name] for name in implementation)] = row
    return [list(group.values()) for group in groups.values()]
