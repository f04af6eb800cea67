"""What a data set is here, and in which order its images come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["Batch", "Dataset", "Splits", "TensorTask", "batches", "epoch_order"]


class Dataset(Protocol):
    """Map-style: ``dataset[i]`` is an image (3, H, W) and its class."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class TensorTask:
    """A data set in memory. Attributes: images (N, 3, H, W), labels (N,) int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Splits(NamedTuple):
    """Attributes: name of the task; num_classes; train, val (None where the protocol leaves none out) and test."""

    name: str
    num_classes: int
    train: Dataset
    val: Dataset | None
    test: Dataset


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
        source, batch_sampler=[list(chosen) for chosen in indices], num_workers=workers, pin_memory=pinned,
        generator=torch.Generator(),
    )  # fmt: skip
    for images, labels in loader:
        yield Batch(images.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned))
