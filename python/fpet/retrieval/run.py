"""Tunes a BLIP to pairs of images and texts; the loop is :mod:`fpet.train.loop`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batches
from ..data.flickr30k import ImageTextSplit
from ..train.folder import MODEL, claim
from ..train.loop import Loop, Moment, Plan, Task
from ..train.processes import place
from .config import RetrievalConfig
from .inputs import Numbered, tokenize
from .losses import RetrievalLoss
from .tuning import frozen_digest, save_tuned

__all__ = ["train"]


def train(
    model: nn.Module, tokenizer: Any, split: ImageTextSplit, config: RetrievalConfig, *, output: str | Path | None = None,
    device: torch.device | str = "cpu", workers: int = 0, progress: bool = False,
) -> list[tuple[float, float]]:  # fmt: skip
    """Trains what requires a gradient. Returns the mean contrastive and matching loss of every epoch.

    In a process group every process has to call this with the same model and data; each takes its share of every batch, and
    process 0 writes.

    Args:
        model: after :func:`prepare`. split: every caption comes once an epoch; what does not fill a batch is left out.
        output: of config.json, log.csv, a checkpoint after each epoch (``step-*.ckpt``) and model.safetensors at the end. A run
            that was killed goes on from its last whole epoch and ends with the same weights.

    Raises:
        ValueError: less data than a batch, a batch that can't be shared, or ``output`` belongs to another run. RuntimeError:
            the loss is not finite.
    """
    rank, world = place()
    if len(split) < config.batch_size:
        raise ValueError(f"batch_size: expected at most the {len(split)} captions of the split, got {config.batch_size}")
    if config.batch_size % world or config.batch_size < 2 * world:
        raise ValueError(
            f"batch_size: expected a multiple of {world} processes with at least 2 in each, got {config.batch_size}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected parameters that require a gradient, got none; call prepare first")
    folder = None if output is None else Path(output)
    if folder is not None:
        claim(folder, dataclasses.asdict(config))
    device = torch.device(device)
    training = model.training
    task = _Retrieval(model.to(device), tokenizer, split, config, device, workers)
    plan = Plan(
        epochs=config.epochs, batch_size=config.batch_size, rate=lambda epoch: _rate(config, epoch),
        weight_decay=config.weight_decay, seed=config.seed, amp=config.amp, progress=progress,
    )  # fmt: skip
    history = Loop(task, plan, folder=folder, device=device).run()
    model.train(training)
    if folder is not None and rank == 0:
        save_tuned(model, folder / MODEL, config)
    return [(row["train_contrastive"], row["train_matching"]) for row in history]


def _rate(config: RetrievalConfig, epoch: float) -> float:
    """On the cosine from lr to min_lr, the same throughout an epoch."""
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * math.floor(epoch) / config.epochs)) / 2


class _Retrieval(Task):
    """Captions and the images they are of, with both losses."""

    columns = ("contrastive", "matching")

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: ImageTextSplit,
        config: RetrievalConfig,
        device: torch.device,
        workers: int,
    ) -> None:
        self.model, self.tokenizer, self.split, self.config, self.device, self.workers = (
            model, tokenizer, split, config, device, workers
        )  # fmt: skip
        self.network: RetrievalLoss = RetrievalLoss(model, config)
        self.items, self.identity = len(split), frozen_digest(model)

    def feed(self, batches_: list[list[int]], share: slice, epoch: int) -> Iterator[Any]:
        source = Numbered(self.split)
        own = batches(source, [batch[share] for batch in batches_], workers=self.workers, device=self.device)
        for batch, (images, numbers) in zip(batches_, own, strict=True):
            # The whole batch's captions, so that all processes pad to one length.
            text = tokenize(self.tokenizer, [self.split.captions[i] for i in batch], self.config.max_length)
            yield images, *(part[share].to(self.device) for part in text), numbers

    def parts(self, batch: Any, count: int) -> list[Any]:
        return [batch]  # contrast needs the batch as a whole

    def loss(self, network: Any, part: Any, at: Moment) -> tuple[Tensor, Tensor]:
        losses = network(
            *part,
            alpha=self.config.alpha * min(1.0, at.epochs),
            generator=_negatives_generator(self.config, at.total, self.device),
        )
        found = torch.stack(losses).detach().double()
        return losses.contrastive + losses.matching, torch.cat((found, found.new_ones(1)))

    def state(self) -> dict[str, Any]:
        queue = self.network.queue
        return {
            "momentum": {name: p.cpu() for name, p in self.network.averages().items()},
            "queue": {} if queue is None else {name: t.cpu() for name, t in queue.state_dict().items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.network.averages().items():
                parameter.copy_(state["momentum"][name])
        if self.network.queue is not None:
            self.network.queue.load_state_dict(state["queue"])


def _negatives_generator(config: RetrievalConfig, step: int, device: torch.device) -> torch.Generator:
    """In one state in all processes where they draw from the same negatives, in different ones where each has its own."""
    rank, world = (0, 1) if config.negative_all_rank else place()
    return torch.Generator(device).manual_seed(((config.seed << 24) + step) * world + rank)
