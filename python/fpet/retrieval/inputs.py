"""Images and captions as BLIP takes them: transform, augmentation, tokens, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms

from ..data import batches
from ..data.flickr30k import ImageTextSplit

__all__ = ["MEAN", "STD", "Numbered", "RandAugment", "chunks", "image_transform", "images_of", "tokenize", "with_encode_token"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def image_transform(size: int, *, augment: bool = False) -> Callable[[Any], Tensor]:
    """From a PIL image to (3, size, size), normalised as BLIP has it; ``augment``: its crop, flip and two random operations.

    Each of the two is one of :class:`RandAugment`'s, and takes place every other time.
    """
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Any] = [transforms.Resize((size, size), bicubic)]
    if augment:
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            *(transforms.RandomApply([RandAugment()], p=0.5) for _ in range(2)),
        ]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])  # type: ignore[no-any-return]


class RandAugment(transforms.RandAugment):
    """One of the ten operations with which BLIP trains retrieval, at its level 5 of 10.

    At this level brightness and sharpness stay as they are; shears are by ±0.15, shifts by ±5 pixels, turns by ±15 degrees,
    with grey behind.
    """

    def __init__(self, magnitude: int = 5) -> None:
        super().__init__(1, magnitude, 11, transforms.InterpolationMode.BILINEAR, fill=[128, 128, 128])

    def _augmentation_space(self, num_bins: int, image_size: tuple[int, int]) -> dict[str, tuple[Tensor, bool]]:
        """For each operation the arguments of torchvision by level, and whether their sign is drawn."""
        nothing, shear = torch.tensor(0.0), torch.linspace(0, 0.3, num_bins)
        pixels, factor = torch.linspace(0, 10, num_bins), torch.linspace(-0.9, 0.9, num_bins)
        return {
            "Identity": (nothing, False), "AutoContrast": (nothing, False), "Equalize": (nothing, False),
            "Brightness": (factor, False), "Sharpness": (factor, False), "ShearX": (shear, True), "ShearY": (shear, True),
            "TranslateX": (pixels, True), "TranslateY": (pixels, True), "Rotate": (torch.linspace(0, 30, num_bins), True),
        }  # fmt: skip


def tokenize(tokenizer: Any, captions: list[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, L) int64, padded to the longest."""
    text = tokenizer(captions, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return text.input_ids, text.attention_mask


def with_encode_token(input_ids: Tensor, token: int | None) -> Tensor:
    """(B, L) with ``token`` in the first place, or as it is."""
    if token is None:
        return input_ids
    return torch.cat((torch.full_like(input_ids[:, :1], token), input_ids[:, 1:]), dim=1)


def chunks(count: int, size: int) -> list[list[int]]:
    """range(count) in pieces of ``size``."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


class Numbered:
    """The images of a split with their numbers: of every caption, or with ``each`` of every image once."""

    def __init__(self, split: ImageTextSplit, each: bool = False) -> None:
        self.split, self.each = split, each

    def __len__(self) -> int:
        return len(self.split.files) if self.each else len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = index if self.each else self.split.image_of[index]
        return self.split.image(number), number


def images_of(split: ImageTextSplit, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Every image once, in order, (B, 3, H, W)."""
    for images, _ in batches(Numbered(split, each=True), chunks(len(split.files), batch_size), workers=workers):
        yield images
