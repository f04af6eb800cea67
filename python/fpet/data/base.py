"""What a data set is here, and in which order its images come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .images import UnreadableImage

__all__ = ["Batch", "DataOptions", "Dataset", "Splits", "TensorTask", "batches", "epoch_order"]


class Dataset(Protocol):
    """Map-style: ``dataset[i]`` is an image (3, H, W) and its class or, with several labels an image, a vector of 0 and 1."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


class TensorTask:
    """A data set in memory. Attributes: images (N, 3, H, W), labels (N,) int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Splits(NamedTuple):
    """What a run is trained and judged on.

    Attributes: name of the task; num_classes; train, val (None where the protocol leaves none out) and test; class_names, by
        label (None where nobody names them); multi_label: labels are float vectors (num_classes,) of 0 and 1.
    """

    name: str
    num_classes: int
    train: Dataset
    val: Dataset | None
    test: Dataset
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False


@dataclass(frozen=True)
class DataOptions:
    """What a family may ask for beyond a task and a place; the others ignore it.

    Attributes:
        validate: leave validation images out of the training images.
        val_fraction, test_fraction, split_seed: of data without a split of its own ("folder", "csv", "huggingface").
        damaged: what an unreadable image does: "error" when it is read, or "skip" before any work, with a warning.
        multi_label: a label cell names several classes, separated by "|" ("csv").
        shots, list_seed: images per class and published draw ("fgvc"). train_count, test_count: drawn images ("shapes").
    """

    validate: bool = False
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    damaged: str = "error"
    multi_label: bool = False
    shots: int = 16
    list_seed: int = 0
    train_count: int = 1000
    test_count: int = 1000


class Batch(NamedTuple):
    """Attributes: images (B, 3, H, W), labels (B,)."""

    images: Tensor
    labels: Tensor


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch. It depends on nothing else, so a resumed run meets the same batches."""
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch))


def batches(
    dataset: Dataset, indices: Sequence[Sequence[int]], *, workers: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The images at each list of indices, on ``device``; read by ``workers`` processes ahead of time where they are files."""
    device = torch.device(device)
    if isinstance(dataset, TensorTask):
        for chosen in indices:
            at = torch.as_tensor(chosen)
            yield Batch(dataset.images[at].to(device), dataset.labels[at].to(device))
        return
    pinned = device.type == "cuda"
    # A generator of its own: the loader would otherwise draw its workers' seed from the global one, which training uses.
    source: Any = dataset
    loader: Any = DataLoader(
        source,
        batch_sampler=[list(chosen) for chosen in indices],
        num_workers=workers,
        pin_memory=pinned,
        generator=torch.Generator(),
    )
    reader = iter(loader)
    while True:
        try:
            images, labels = next(reader)
        except StopIteration:
            return
        except UnreadableImage as error:  # a worker's message comes with its traceback
            line = str(error).strip().splitlines()[-1]
            raise UnreadableImage(line.partition("UnreadableImage: ")[2] or line) from None
        yield Batch(images.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned))
