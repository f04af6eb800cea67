"""Pictures in a run's folder: how training went, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

__all__ = ["draw_confusion", "draw_curves"]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no window and no global state

    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Losses, and everything else of the log between 0 and 1, by epoch."""
    figure = _figure(9, 4)
    losses, parts = figure.subplots(1, 2)
    epochs = [row["epoch"] + 1 for row in history]
    for name in history[0]:
        if name not in ("epoch", "step", "lr", "seconds"):
            axes = losses if name.endswith("loss") else parts
            axes.plot(epochs, [row[name] for row in history], marker=".", label=name.replace("_", " "))
    for axes, title in ((losses, "loss"), (parts, "accuracy and the like")):
        axes.set(xlabel="epoch", title=title)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str] | None, path: Path) -> None:
    """Rows are the images' classes, columns what the model says; shades are parts of a row, numbers are images."""
    counts = numpy.asarray(confusion, dtype=float)
    parts = counts / counts.sum(1, keepdims=True).clip(min=1)
    size = len(counts)
    side = min(4 + 0.35 * size, 20)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shown = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, fraction=0.04, label="part of the row")
    axes.set(xlabel="predicted", ylabel="class")
    if size <= 50:
        labels = [str(i) for i in range(size)] if names is None else list(names)
        axes.set_xticks(range(size), labels, rotation=90)
        axes.set_yticks(range(size), labels)
    if size <= 20:
        for i in range(size):
            for j in range(size):
                if counts[i, j]:
                    axes.text(
                        j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color="white" if parts[i, j] > 0.5 else "black"
                    )
    figure.savefig(path, dpi=120)
