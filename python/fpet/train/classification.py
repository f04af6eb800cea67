"""What :class:`fpet.train.loop.Loop` trains in a run: images and their classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import comparators
from ..comparators.ltmp import PENALTY
from ..data import Splits, TensorTask, batches
from ..files import saving
from .config import Config
from .evaluation import Score, evaluate
from .inputs import Seeded, class_counts, labels_of, mixing, seeded
from .loop import Loop, Moment, Task

__all__ = ["Classification"]


class Classification(Task):
    """Images and their classes; keeps the tuned parameters of the epoch that is best on the validation set."""

    columns = ("loss", "accuracy")

    def __init__(self, model: nn.Module, config: Config, splits: Splits, device: torch.device) -> None:
        self.config, self.splits, self.device = config, splits, device
        self.model = self.network = model
        self.items = len(splits.train)
        self.target = comparators.flops_target(self.model)
        self.identity = saving.backbone_hash(self.model)
        self.mixing = mixing(config, splits.num_classes)
        self.best: dict[str, Any] | None = None
        self.weights: Tensor | None = None
        self.odds: Tensor | None = None
        if config.class_weights or config.balanced_sampling:
            counts = class_counts(splits.train, splits.num_classes)
            if config.class_weights:  # the mean over the training images is 1
                self.weights = (len(splits.train) / (splits.num_classes * counts)).float().to(device)
            else:
                self.odds = 1 / counts[labels_of(splits.train).long()]

    def order(self, seed: int, epoch: int) -> Tensor:
        if self.odds is None:
            return super().order(seed, epoch)
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        return torch.multinomial(self.odds, self.items, replacement=True, generator=generator)

    def feed(self, batches_: list[list[int]], share: slice, epoch: int) -> Iterator[Any]:
        own = [batch[share] for batch in batches_]
        source: Any = self.splits.train
        if not isinstance(source, TensorTask):
            source = Seeded(source, self.config.seed, epoch)
        for mine, (images, labels) in zip(
            own, batches(source, own, workers=self.config.workers, device=self.device), strict=True
        ):
            if self.mixing is not None:
                with seeded(self.config.seed, epoch, *mine[:2]):
                    images, labels = self.mixing(images, labels)
            yield images, labels

    def parts(self, batch: Any, count: int) -> Iterable[Any]:
        images, labels = batch
        return zip(images.chunk(count), labels.chunk(count), strict=True)

    def loss(self, network: Any, part: Any, at: Moment) -> tuple[Tensor, Tensor]:
        images, labels = part
        scores, flops = (network(images), None) if self.target is None else network(images, with_flops=True)
        loss = self._loss(scores.float(), labels)
        if flops is not None:
            loss = loss + PENALTY * (flops - self.target) ** 2
        count, seen = len(labels), scores.detach()
        if self.config.multi_label:
            right = ((seen > 0) == (labels > 0.5)).all(1).sum()
        else:  # of mixed images, what they have most of
            right = (seen.argmax(1) == (labels if labels.dim() == 1 else labels.argmax(1))).sum()
        return loss, torch.stack((loss.detach().double() * count, right.double(), right.new_tensor(count).double()))

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self.config.multi_label:
            return F.binary_cross_entropy_with_logits(scores, labels.float(), pos_weight=self.weights)
        smoothing = self.config.label_smoothing if self.mixing is None else 0.0  # mixing has smoothed them
        if self.weights is None:
            return F.cross_entropy(scores, labels, label_smoothing=smoothing)
        # Not divided by the weights of this part, so that parts of a batch add up to the batch.
        return F.cross_entropy(scores, labels, weight=self.weights, label_smoothing=smoothing, reduction="none").mean()

    def end_epoch(self, loop: Loop) -> dict[str, float]:
        if self.splits.val is None:
            return {}
        score = self.score(self.splits.val)
        if self.best is None or score.judged > self.best["judged"]:
            kept = {name: value.cpu().clone() for name, value in loop.tuned_values().items()}
            self.best = {"judged": score.judged, "accuracy": score.accuracy, "epoch": loop.epoch, "tuned": kept}
        numbers = {name: value for name, value in score.more.items() if isinstance(value, float)}
        return {"val_loss": score.loss, "val_accuracy": score.accuracy, **{f"val_{n}": v for n, v in numbers.items()}}

    def state(self) -> dict[str, Any]:
        return {"best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def score(self, dataset: Any) -> Score:
        config = self.config
        return evaluate(
            self.model, dataset, batch_size=config.eval_batch_size, device=self.device, amp=config.amp, workers=config.workers,
            progress=config.progress, num_classes=self.splits.num_classes, multi_label=config.multi_label,
        )  # fmt: skip
