"""``fpet evaluate``: accuracy of a tuned model, from a finished run's folder or in memory."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..data import Dataset, Splits, batches
from .build import finished, load_tuned
from .inputs import load_data
from .metrics import Scores
from .processes import pick_device, place

__all__ = ["Score", "add_arguments", "evaluate", "evaluate_run", "run"]


class Score(NamedTuple):
    """Attributes: accuracy in [0, 1]; mean loss; images, their number; images per second of this process; more, by name:
    see :class:`fpet.train.metrics.Scores`."""

    accuracy: float
    loss: float
    images: int
    images_per_second: float
    more: dict[str, Any]

    @property
    def judged(self) -> float:
        """What models are compared by: accuracy, or of several labels an image the mean average precision."""
        return float(self.more.get("mean_average_precision", self.accuracy))


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, *, batch_size: int = 256, device: torch.device | str = "cpu", amp: bool = False,
    workers: int = 0, progress: bool = False, num_classes: int | None = None, multi_label: bool = False,
) -> Score:  # fmt: skip
    """Accuracy of ``model`` on all of ``dataset``. In a process group every process takes its part and gets the whole score.

    The model is in evaluation mode meanwhile, and afterwards as it was.

    Args:
        num_classes: with it the score has ``more``. multi_label: labels are vectors of 0 and 1, the loss is binary.
    """
    device = torch.device(device)
    rank, world = place()
    mine = range(rank, len(dataset), world)
    chunks = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    own = len(chunks)
    if isinstance(model, FSDPModule) and own * batch_size * world < len(dataset):
        chunks.append([0])  # every process has to take part in every forward: one has an image more
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    scores_of = None if num_classes is None else Scores(num_classes, multi_label=multi_label, device=device)
    training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        feed = tqdm(chunks, desc="test", leave=False, disable=None if progress and rank == 0 else True)
        for i, (images, labels) in enumerate(batches(dataset, feed, workers=workers, device=device)):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                scores = model(images)
            if i >= own:
                break
            scores = scores.float()
            if multi_label:
                loss = F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none").mean(1).sum()
                right = ((scores > 0) == (labels > 0.5)).all(1).sum()
            else:
                loss = F.cross_entropy(scores, labels, reduction="sum")
                right = (scores.argmax(1) == labels).sum()
            sums += torch.stack((right.double(), loss.double(), sums.new_tensor(len(labels))))
            if scores_of is not None:
                scores_of.update(scores, labels)
    finally:
        model.train(training)
    speed = sums[2].item() / max(time.perf_counter() - start, 1e-9)
    if world > 1:
        dist.all_reduce(sums)
    right, loss, count = sums.tolist()
    more = {} if scores_of is None else scores_of.compute()
    more.pop("accuracy", None)
    return Score(right / max(count, 1), loss / max(count, 1), int(count), speed, more)


def evaluate_run(folder: str | Path, *, splits: Splits | None = None, **changes: Any) -> Score:
    """Accuracy on the test set of the model that a finished run left in its folder, which may be anywhere and read-only.

    Args:
        folder: of the run. splits: as in :func:`fpet.train.train`. changes: fields of its Config, such as ``data_dir``,
            ``weights`` or ``reduction="none"``, which evaluates the tuned weights without merging.

    Raises:
        FileNotFoundError: the run has not finished, or its data has moved. ConfigError, ValueError: a change or a file does not
            fit.
    """
    config = finished(folder, **changes)
    config.check(for_reading=True, with_data=splits is None)
    splits = splits or load_data(config)
    device = pick_device(config.device)
    model = load_tuned(config, splits.num_classes).to(device)
    return evaluate(
        model, splits.test, batch_size=config.eval_batch_size, device=device, amp=config.amp, workers=config.workers,
        progress=config.progress, num_classes=splits.num_classes, multi_label=config.multi_label,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet evaluate RUN``."""
    parser.add_argument("folder", nargs="?", default="runs/default", help="folder of the run (default: runs/default)")
    parser.add_argument("--data-dir", help="folder of the data, where it has moved")
    parser.add_argument("--weights", help="file of the backbone's weights, where the folder does not hold it")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), help="where to compute")
    parser.add_argument("--no-merging", action="store_true", help="the tuned weights with every token kept")
    parser.add_argument("--json", action="store_true", help="the score as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the score."""
    changes = {name: getattr(args, name) for name in ("data_dir", "device", "weights") if getattr(args, name) is not None}
    if args.no_merging:
        changes["reduction"] = "none"
    score = evaluate_run(args.folder, **changes)
    if args.json:
        print(json.dumps(score._asdict()))
    else:
        speed = f"{score.images_per_second:.0f} images/s"
        print(f"accuracy {100 * score.accuracy:.2f} % of {score.images} images, loss {score.loss:.4f}, {speed}")
        for name, value in score.more.items():
            if isinstance(value, float):
                print(f"{name.replace('_', ' ')} {value:.4f}")
    return 0
