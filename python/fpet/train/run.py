"""Tunes a frozen backbone with a PET method and merged tokens; goes on where it was killed.

>>> from fpet.train import Config, train
>>> print(train(Config(output="runs/mine")).table())
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..adapters.freezing import count_parameters
from ..data import Splits
from ..files import saving
from ..files.atomic import write_atomically
from . import pretrain
from .build import backbone, build_model, embedded_weights, keep_backbone, prepare, rehearse
from .classification import Classification
from .config import EMBEDDED_MODEL, Config, ConfigError
from .folder import MODEL, claim, is_held
from .inputs import load_data, preprocessing, resolve
from .loop import Loop, Plan
from .pictures import draw_confusion, draw_curves
from .processes import launched_world, pick_device, place, process_group
from .result import Result, summary

__all__ = ["learning_rate", "train"]

log = logging.getLogger("fpet")


def learning_rate(config: Config, epoch: float) -> float:
    """At a point of training in epochs: linear from warmup_lr to lr over the warm-up, then a cosine down to min_lr.

    Args:
        config: after :func:`fpet.train.inputs.resolve`.
    """
    assert config.lr is not None and config.warmup_epochs is not None
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    done = min(1.0, (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def train(
    config: Config, *, splits: Splits | None = None, test: bool = True, on_step: Callable[[int], None] | None = None
) -> Result:
    """Runs ``config`` to its end, or from its newest checkpoint to its end, and leaves in ``config.output``:

    config.json, checkpoints (``step-*.ckpt``), log.csv, and at the end model.safetensors (see :func:`fpet.load`), result.json
    and pictures; backbone.safetensors where the frozen weights are not timm's. See :mod:`fpet.train.loop` for what is promised
    of a run that was killed.

    Args:
        splits: map-style data sets to train on, in place of those that ``config`` names; images come as the model takes them.
        test: evaluate on the test set at the end. on_step: called with the number of steps done, after each.

    Raises:
        ConfigError: a setting that can't be, or another run's folder; before any work. RuntimeError: the loss is not finite.
    """
    config.check(world_size=launched_world(), with_data=splits is None)
    config = resolve(config)
    rehearse(config)
    if splits is None:
        splits = load_data(config)
    if len(splits.train) < config.batch_size:
        raise ConfigError(f"batch_size: expected at most the {len(splits.train)} training images, got {config.batch_size}")
    if splits.multi_label != config.multi_label:
        raise ConfigError(f"multi_label: expected {splits.multi_label}, as the data has it, got {config.multi_label}")
    device = pick_device(config.device)
    with process_group(device):
        return _train(config, splits, device, test, on_step)


def _train(config: Config, splits: Splits, device: torch.device, test: bool, on_step: Callable[[int], None] | None) -> Result:
    folder = Path(config.output)
    held = is_held(folder)
    try:
        claim(folder, config.settings(), free=Config.FREE, resume=config.resume)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    source = _ensure_backbone(config, folder)
    torch.manual_seed(config.seed)
    bare = backbone(config, splits.num_classes)
    if not held and place()[0] == 0:
        keep_backbone(bare, config)
    task = Classification(prepare(bare, config).to(device), config, splits, device)
    loop = Loop(task, _plan(config), folder=folder, device=device, on_step=on_step)
    if config.progress and loop.rank == 0:
        log.info("%s", summary(config, splits, source))
    loop.run()
    loop.assign(task.best["tuned"] if task.best is not None else {})
    score = task.score(splits.test) if test else None
    counts = count_parameters(task.model)
    result = Result(
        config=config, accuracy=None if score is None else score.accuracy,
        val_accuracy=None if task.best is None else task.best["accuracy"],
        epoch=config.epochs - 1 if task.best is None else task.best["epoch"],
        train_loss=loop.history[-1]["train_loss"], trainable=counts.trainable, adapters=counts.adapters,
        refinement=counts.refinement, head=counts.head, adapter_bytes=counts.adapter_bytes, seconds=loop.seconds,
        backbone=source, scores={} if score is None else score.more,
    )  # fmt: skip
    tuned = loop.tuned_values()
    if loop.rank == 0:
        model = task.model
        if loop.sharded:  # files are written from a model with whole parameters
            model = build_model(config, splits.num_classes)
            model.load_state_dict(tuned, strict=False)
        _write(folder, model, result, splits, loop.history)
    return result


def _write(folder: Path, model: nn.Module, result: Result, splits: Splits, history: list[dict[str, float]]) -> None:
    """What a finished run leaves."""
    seen = preprocessing(result.config)
    saving.save(
        model,
        folder / MODEL,
        class_names=splits.class_names,
        preprocessing=seen.asdict(),
        metadata={"task": f"{result.config.data}/{splits.name}", "backbone": result.backbone},
    )
    if result.config.pictures:
        draw_curves(history, folder / "curves.png")
        if "confusion" in result.scores:
            draw_confusion(result.scores["confusion"], splits.class_names, folder / "confusion.png")
    write_atomically(folder / "result.json", result.to_json().encode())


def _plan(config: Config) -> Plan:
    return Plan(
        epochs=config.epochs, batch_size=config.batch_size, rate=lambda epoch: learning_rate(config, epoch),
        weight_decay=config.weight_decay, seed=config.seed, accumulate=config.accumulate, amp=config.amp,
        compile=config.compile, sharded=config.parallel == "fsdp", checkpoint_epochs=config.checkpoint_epochs,
        checkpoint_steps=config.checkpoint_steps, keep_checkpoints=config.keep_checkpoints, resume=config.resume,
        progress=config.progress, tensorboard=config.logger == "tensorboard",
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
