"""Tunes a frozen backbone with a PET method and merged tokens; goes on where it was killed.

>>> from fpet.train import Config, train
>>> print(train(Config(output="runs/mine")).table())
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import comparators
from ..adapters.freezing import count_parameters
from ..comparators.ltmp import PENALTY
from ..data import Splits, batches
from ..data.preprocessing import Preprocessing
from ..files import saving
from ..files.atomic import write_atomically
from . import pretrain, sharding
from .build import build_model, embedded_weights, rehearse
from .config import EMBEDDED_MODEL, REDUCTIONS, Config, ConfigError
from .evaluation import Score, evaluate
from .folder import MODEL, claim
from .inputs import load_data
from .loop import Loop, Moment, Plan, Task
from .processes import launched_world, pick_device, place, process_group

__all__ = ["Result", "learning_rate", "train"]

log = logging.getLogger("fpet")


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        accuracy: on the test set, in [0, 1]; None where it was not asked for. val_accuracy: of the model that was kept, on
            the validation set; None without one. epoch: 0-based, after which that model was kept.
        train_loss: mean over the last epoch. trainable, adapters, refinement, head: numbers of parameters.
        adapter_bytes: of the tuned parameters as stored, head excluded. seconds: spent in training steps.
        backbone: what the backbone is and how it came about. config: of the run.
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

    def table(self) -> str:
        """The summary, a line for each thing."""
        c = self.config
        rows = [
            ("task", f"{c.data}/{c.task}, protocol {c.protocol}"),
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
        rows.append(("folder", c.output))
        return "\n".join(f"{name:<14} {value}" for name, value in rows)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def learning_rate(config: Config, epoch: float) -> float:
    """At a point of training in epochs: linear from warmup_lr to lr over the warm-up, then a cosine down to min_lr."""
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    done = min(1.0, (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def train(config: Config, *, test: bool = True, on_step: Callable[[int], None] | None = None) -> Result:
    """Runs ``config`` to its end, or from its newest checkpoint to its end, and leaves in ``config.output``:

    config.json, checkpoints (``step-*.ckpt``), log.csv, and at the end model.safetensors (see :func:`fpet.load`) and
    result.json. See :mod:`fpet.train.loop` for what is promised of a run that was killed.

    Args:
        test: evaluate on the test set at the end. on_step: called with the number of steps done, after each.

    Raises:
        ConfigError: a setting that can't be, or another run's folder; before any work. RuntimeError: the loss is not finite.
    """
    config.check(world_size=launched_world())
    rehearse(config)
    splits = load_data(config)
    if len(splits.train) < config.batch_size:
        raise ConfigError(f"batch_size: expected at most the {len(splits.train)} training images, got {config.batch_size}")
    device = pick_device(config.device)
    with process_group(device):
        return _train(config, splits, device, test, on_step)


def _train(
    config: Config, splits: Splits, device: torch.device, test: bool, on_step: Callable[[int], None] | None
) -> Result:  # fmt: skip
    folder = Path(config.output)
    try:
        claim(folder, dataclasses.asdict(config), free=Config.FREE, resume=config.resume)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    backbone = _ensure_backbone(config, folder)
    torch.manual_seed(config.seed)
    task = _Classification(config, splits, device)
    loop = Loop(task, _plan(config), folder=folder, device=device, on_step=on_step)
    task.tuned = loop.tuned
    loop.run()
    if task.best is not None:
        for name, parameter in loop.tuned.items():
            sharding.assign(parameter, task.best["tuned"][name])
        task.assign_statistics(task.best["statistics"])
    accuracy = task.score(splits.test).accuracy if test else None
    counts = count_parameters(task.model)
    result = Result(
        config=config, accuracy=accuracy, val_accuracy=None if task.best is None else task.best["accuracy"],
        epoch=config.epochs - 1 if task.best is None else task.best["epoch"],
        train_loss=loop.history[-1]["train_loss"], trainable=counts.trainable, adapters=counts.adapters,
        refinement=counts.refinement, head=counts.head, adapter_bytes=counts.adapter_bytes, seconds=loop.seconds,
        backbone=backbone,
    )  # fmt: skip
    tuned = loop.tuned_values()
    if loop.rank == 0:
        model = task.model
        if loop.sharded:  # files are written from a model with whole parameters
            model = build_model(config, splits.num_classes)
            model.load_state_dict(tuned | task.statistics(), strict=False)
        saving.save(
            model, folder / MODEL, class_names=splits.class_names,
            preprocessing=Preprocessing.squashed(config.image_size, config.normalize).asdict(),
        )  # fmt: skip
        write_atomically(folder / "result.json", result.to_json().encode())
    return result


def _plan(config: Config) -> Plan:
    return Plan(
        epochs=config.epochs, batch_size=config.batch_size, rate=lambda epoch: learning_rate(config, epoch),
        weight_decay=config.weight_decay, seed=config.seed, accumulate=config.accumulate, amp=config.amp,
        compile=config.compile, sharded=config.parallel == "fsdp", checkpoint_epochs=config.checkpoint_epochs,
        checkpoint_steps=config.checkpoint_steps, keep_checkpoints=config.keep_checkpoints, resume=config.resume,
        progress=config.progress, tensorboard=config.logger == "tensorboard",
    )  # fmt: skip


class _Classification(Task):
    """Images and their classes; keeps the tuned parameters of the epoch that is best on the validation set."""

    columns = ("loss", "accuracy")

    def __init__(self, config: Config, splits: Splits, device: torch.device) -> None:
        self.config, self.splits, self.device = config, splits, device
        self.model = self.network = build_model(config, splits.num_classes).to(device)
        self.items = len(splits.train)
        self.target = comparators.flops_target(self.model)
        self.identity = saving.backbone_hash(self.model)
        self.tuned: dict[str, nn.Parameter] = {}
        self.best: dict[str, Any] | None = None

    def feed(self, batches_: list[list[int]], share: slice, epoch: int) -> Iterator[Any]:
        own = [batch[share] for batch in batches_]
        return batches(self.splits.train, own, workers=self.config.workers, device=self.device)

    def parts(self, batch: Any, count: int) -> Iterable[Any]:
        images, labels = batch
        return zip(images.chunk(count), labels.chunk(count), strict=True)

    def loss(self, network: Any, part: Any, at: Moment) -> tuple[Tensor, Tensor]:
        images, labels = part
        scores, flops = (network(images), None) if self.target is None else network(images, with_flops=True)
        loss = F.cross_entropy(scores.float(), labels)
        if flops is not None:
            loss = loss + PENALTY * (flops - self.target) ** 2
        right, count = (scores.detach().argmax(1) == labels).sum(), len(labels)
        return loss, torch.stack((loss.detach().double() * count, right.double(), right.new_tensor(count).double()))

    def end_epoch(self, epoch: int) -> dict[str, float]:
        if self.splits.val is None:
            return {}
        score = self.score(self.splits.val)
        if self.best is None or score.accuracy > self.best["accuracy"]:
            kept = {name: sharding.full(p).cpu().clone() for name, p in self.tuned.items()}
            self.best = {"accuracy": score.accuracy, "epoch": epoch, "tuned": kept, "statistics": self.statistics()}
        return {"val_loss": score.loss, "val_accuracy": score.accuracy}

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "statistics": self.statistics()}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.assign_statistics(state["statistics"])

    def statistics(self) -> dict[str, Tensor]:
        """The running statistics of the model's batch norms, copied; empty for most vision transformers."""
        return {name: value.cpu().clone() for name, value in saving.running_statistics(self.model).items()}

    @torch.no_grad()
    def assign_statistics(self, values: dict[str, Tensor]) -> None:
        """Copies them back."""
        for name, buffer in saving.running_statistics(self.model).items():
            buffer.copy_(values[name])

    def score(self, dataset: Any) -> Score:
        config = self.config
        return evaluate(
            self.model, dataset, batch_size=config.eval_batch_size, device=self.device, amp=config.amp, workers=config.workers,
            progress=config.progress,
        )  # fmt: skip


def _ensure_backbone(config: Config, folder: Path) -> str:
    """Pre-trains the embedded backbone where that was not done. What the backbone is, in words."""
    if config.model != EMBEDDED_MODEL:
        source = config.weights or ("timm's weights" if config.pretrained else "random weights")
        return f"{config.model}, {source}"
    if config.weights is not None:
        return f"embedded, {config.weights}"
    rank, world = place()
    if rank == 0:
        pretrain.ensure(folder, config.pretrain_steps, progress=config.progress)
    if world > 1:
        dist.barrier()
    return pretrain.description(embedded_weights(config))
