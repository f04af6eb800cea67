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

from ..data import Dataset, batches
from .build import finished, load_tuned
from .inputs import load_data
from .processes import pick_device, place

__all__ = ["Score", "add_arguments", "evaluate", "evaluate_run", "run"]


class Score(NamedTuple):
    """Attributes: accuracy in [0, 1]; mean cross-entropy; images, their number; images per second of this process."""

    accuracy: float
    loss: float
    images: int
    images_per_second: float


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, *, batch_size: int = 256, device: torch.device | str = "cpu", amp: bool = False,
    workers: int = 0, progress: bool = False,
) -> Score:  # fmt: skip
    """Accuracy of ``model`` on all of ``dataset``. In a process group every process takes its part and gets the whole score.

    The model is in evaluation mode meanwhile, and afterwards as it was.
    """
    device = torch.device(device)
    rank, world = place()
    mine = range(rank, len(dataset), world)
    chunks = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    own = len(chunks)
    if isinstance(model, FSDPModule) and own * batch_size * world < len(dataset):
        chunks.append([0])  # every process has to take part in every forward: one has an image more
    sums = torch.zeros(3, dtype=torch.float64, device=device)
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
            loss = F.cross_entropy(scores.float(), labels, reduction="sum")
            right = (scores.argmax(1) == labels).sum()
            sums += torch.stack((right.double(), loss.double(), sums.new_tensor(len(labels))))
    finally:
        model.train(training)
    speed = sums[2].item() / max(time.perf_counter() - start, 1e-9)
    if world > 1:
        dist.all_reduce(sums)
    right, loss, count = sums.tolist()
    return Score(right / max(count, 1), loss / max(count, 1), int(count), speed)


def evaluate_run(folder: str | Path, **changes: Any) -> Score:
    """Accuracy on the test set of the model that a finished run left in its folder.

    Args:
        folder: ``output`` of the run. changes: fields of its Config, such as ``data_dir`` or ``reduction="none"``, which
            evaluates the tuned weights without merging.

    Raises:
        FileNotFoundError: the run has not finished. ConfigError, ValueError: a change or a file does not fit.
    """
    config = finished(folder, **changes)
    config.check()
    splits = load_data(config)
    device = pick_device(config.device)
    model = load_tuned(config, splits.num_classes).to(device)
    return evaluate(
        model, splits.test, batch_size=config.eval_batch_size, device=device, amp=config.amp, workers=config.workers,
        progress=config.progress,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet evaluate RUN``."""
    parser.add_argument("folder", nargs="?", default="runs/default", help="folder of the run (default: runs/default)")
    parser.add_argument("--data-dir", help="folder of the data, where it has moved")
    parser.add_argument("--device", help="cpu, cuda or auto")
    parser.add_argument("--no-merging", action="store_true", help="the tuned weights with every token kept")
    parser.add_argument("--json", action="store_true", help="the score as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the score."""
    changes = {name: getattr(args, name) for name in ("data_dir", "device") if getattr(args, name) is not None}
    if args.no_merging:
        changes["reduction"] = "none"
    score = evaluate_run(args.folder, **changes)
    if args.json:
        print(json.dumps(score._asdict()))
    else:
        speed = f"{score.images_per_second:.0f} images/s"
        print(f"accuracy {100 * score.accuracy:.2f} % of {score.images} images, loss {score.loss:.4f}, {speed}")
    return 0
