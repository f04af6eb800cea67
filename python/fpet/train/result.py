"""What a run is going to do, and what it came to, in words."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Splits
from .config import OWN_DATA, REDUCTIONS, Config
from .inputs import preprocessing

__all__ = ["Result", "summary"]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        accuracy: on the test set, in [0, 1]; None where it was not asked for. val_accuracy: of the model that was kept, on
            the validation set; None without one. epoch: 0-based, after which that model was kept.
        train_loss: mean over the last epoch. trainable, adapters, refinement, head: numbers of parameters.
        adapter_bytes: of the tuned parameters as stored, head excluded. seconds: spent in training steps.
        backbone: what the backbone is and how it came about. config: of the run. scores: more of the test set, see
            :class:`fpet.train.metrics.Scores`.
    """

    config: Config
    accuracy: float | None
    val_accuracy: float | None
    epoch: int
    train_loss: float
    trainable: int
    adapters: int
    refinement: int
    head: int
    adapter_bytes: int
    seconds: float
    backbone: str
    scores: dict[str, Any]

    def table(self) -> str:
        """The summary, a line for each thing."""
        c = self.config
        rows = [
            ("task", f"{c.data}/{Path(c.data_dir or '').stem if c.data in OWN_DATA else c.task}, protocol {c.protocol}"),
            ("backbone", self.backbone),
            ("method", c.method),
            (
                "parameters",
                f"{self.adapters:,} of the method, {self.refinement:,} of the refinement, {self.head:,} of the head",
            ),
            ("tokens", f"{c.reduction}: {REDUCTIONS[c.reduction]}"),
            ("stored", f"{self.adapter_bytes / 1024:.1f} KiB without the head"),
            ("training", f"{c.epochs} epochs in {self.seconds:.0f} s, last loss {self.train_loss:.4f}"),
        ]
        if self.val_accuracy is not None:
            rows.append(("validation", f"{100 * self.val_accuracy:.2f} %, best after epoch {self.epoch + 1}"))
        if self.accuracy is not None:
            rows.append(("test accuracy", f"{100 * self.accuracy:.2f} %"))
            numbers = {name: value for name, value in self.scores.items() if isinstance(value, float)}
            rows.append(("test, more", ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())))
        rows.append(("folder", c.output))
        return "\n".join(f"{name:<14} {value}" for name, value in rows)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"config": self.config.settings()}, indent=1)


def summary(config: Config, splits: Splits, source: str) -> str:
    """What is going to be done, before it takes its time."""
    seen = preprocessing(config)
    parts = {"training": splits.train, "validation": splits.val, "test": splits.test}
    sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items() if part is not None)
    crop = "squashed to a square" if seen.crop_mode == "squash" else f"{seen.crop_mode} crop of {100 * seen.crop_pct:.3g} %"
    mixed = [name for name in ("random_erasing", "mixup", "cutmix", "label_smoothing") if getattr(config, name)]
    changes = [str(config.augment), *(f"{name.replace('_', ' ')} {getattr(config, name):g}" for name in mixed)]
    rows = {
        "data": f"{config.data}/{splits.name}: {sizes} images, {splits.num_classes} classes, protocol {config.protocol}",
        "backbone": source,
        "images": f"{seen.size[0]}×{seen.size[1]}, {crop}, {seen.interpolation}",
        "normalised": f"mean {_numbers(seen.mean)}, std {_numbers(seen.std)}",
        "augmentation": ", ".join(changes),
        "training": f"{config.epochs} epochs, {config.warmup_epochs:g} of them warm-up, batches of {config.batch_size}",
        "learning rate": f"{config.lr:g}",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items())


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.3g}" for v in values)
