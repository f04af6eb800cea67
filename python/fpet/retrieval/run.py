"""Image-text retrieval with BLIP (Table A7): UniAdapters and merged image tokens, trained and evaluated.

>>> model = BlipForImageTextRetrieval.from_pretrained("Salesforce/blip-itm-base-flickr")
>>> retrieval.prepare(model, RetrievalConfig())
>>> split = load_split(folder, "train", retrieval.image_transform(384, augment=True))
>>> retrieval.train(model, tokenizer, split, RetrievalConfig())
>>> print(retrieval.evaluate(model, tokenizer, load_split(folder, "test", retrieval.image_transform(384))).table())

Under torchrun every process takes its share of each batch. ``python -m fpet.retrieval --demo`` runs all of it on drawn shapes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from .. import huggingface
from ..adapters.freezing import freeze as freeze_backbone
from ..data.base import epoch_order
from ..data.captions import WORDS, write_folder
from ..data.flickr30k import ImageTextSplit, check_folder, load_split
from ..files import checkpoint
from ..files.saving import _digest
from ..huggingface import ImageTokens, encode_image, encode_text, match_logits
from ..train.config import Config
from ..train.run import _first_decides, _gather, _process_group, pick_device
from .uniadapter import add_uniadapters

__all__ = [
    "FeatureQueue",
    "Losses",
    "RetrievalConfig",
    "RetrievalLoss",
    "RetrievalScore",
    "contrastive_loss",
    "evaluate",
    "freeze",
    "hard_negatives",
    "image_transform",
    "load_tuned",
    "momentum_copy",
    "prepare",
    "recall",
    "save_tuned",
    "train",
]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_KS = (1, 5, 10)
_HEADS = ("vision_proj", "text_proj", "itm_head")


@dataclass(frozen=True)
class RetrievalConfig:
    """A run. The defaults are those of UniAdapter's published configuration for Flickr30K and of FPET's refinement.

    Attributes:
        merge: whether half of the image tokens are merged. layer: 0-based, in which layer; None: the middle one.
        refine: learn the key's refinement. attention: see :func:`fpet.huggingface.apply`.
        adapter_dim, adapter_scale, key_value_dim: see :func:`fpet.retrieval.uniadapter.add_uniadapters`.
        temperature: of the contrastive loss, fixed.
        queue_size: features of earlier batches that each batch is contrasted with; 0: neither queue nor momentum encoder.
        momentum: of the encoder that they come from. alpha: share of its opinion in the targets, from the second epoch on.
        negative_all_rank: hard negatives of one process come from the batch of all (BLIP's name), not from its own share.
        epochs, lr, min_lr, weight_decay: AdamW; an epoch's rate is on the cosine from lr to min_lr.
        batch_size: pairs in a step, of all processes together; the published run had 32 in each of 8.
        max_length: tokens of a caption. top_k: candidates that matching re-ranks in evaluation.
        encode_token_id: takes the first token's place where text meets image, as BLIP's own code has it; None leaves it.
        grad_checkpointing, amp (bfloat16), seed.
    """

    merge: bool = True
    layer: int | None = None
    refine: bool = True
    attention: str | None = None
    adapter_dim: int = 512
    adapter_scale: float = 0.1
    key_value_dim: int = 64
    temperature: float = 0.07
    queue_size: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4
    negative_all_rank: bool = False
    epochs: int = 6
    batch_size: int = 256
    lr: float = 1e-5
    min_lr: float = 0.0
    weight_decay: float = 0.05
    max_length: int = 35
    top_k: int = 128
    encode_token_id: int | None = None
    grad_checkpointing: bool = False
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("adapter_dim", "epochs", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2, as negatives come from the batch, got {self.batch_size}")
        if self.queue_size and self.queue_size < self.batch_size:
            raise ValueError(f"queue_size: expected 0 or at least batch_size, {self.batch_size}, got {self.queue_size}")
        for name in ("momentum", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")


# --- what is tuned ----------------------------------------------------------------------------------------------------


def prepare(model: nn.Module, config: RetrievalConfig) -> nn.Module:
    """Merging, UniAdapters and what is trained, on a bare BlipForImageTextRetrieval. Returns ``model``."""
    depth = len(huggingface.vision_layers(huggingface.find_vision_encoder(model)))
    layer = depth // 2 if config.layer is None else config.layer
    huggingface.apply(
        model, layer if config.merge else None, refinement=True if config.merge and config.refine else None,
        attention=config.attention,
    )  # fmt: skip
    add_uniadapters(model, config.adapter_dim, scale=config.adapter_scale, key_value_dim=config.key_value_dim)
    if config.grad_checkpointing:
        # Re-entrant checkpointing gives no gradient behind frozen inputs; and transformers 5's public switch asks for one at
        # the word embeddings, to which BLIP adds in place.
        model._set_gradient_checkpointing(  # type: ignore[operator]
            enable=True, gradient_checkpointing_func=partial(torch_checkpoint, use_reentrant=False)
        )
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """Leaves adapters, refinement, the two projections and the matching head trainable. Returns ``model``."""
    freeze_backbone(model)
    for name in _HEADS:
        getattr(model, name).requires_grad_(True)
    return model


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- losses -----------------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Attributes: contrastive (ITC), matching (ITM), both scalars."""

    contrastive: Tensor
    matching: Tensor


def contrastive_loss(
    image_to_text: Tensor, text_to_image: Tensor, image_ids: Tensor, column_ids: Tensor,
    opinions: tuple[Tensor, Tensor] | None = None, alpha: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy from image to text and from text to image, halved (ITC; BLIP, arXiv 2201.12086, after ALBEF's eq. 6).

    A row's target is alpha · opinion + (1 − alpha) · its probability shared by all columns of its image.

    Args:
        image_to_text, text_to_image: (B, C) similarities over the temperature. image_ids: (B,), column_ids: (C,), which image
            each row and column is of. opinions: (B, C) each, what the momentum encoder makes of the rows; None: alpha is 0.
    """
    same = (image_ids[:, None] == column_ids).to(image_to_text.dtype)
    shared = same / same.sum(dim=1, keepdim=True)
    targets = (shared, shared) if opinions is None else [alpha * opinion + (1 - alpha) * shared for opinion in opinions]
    return (F.cross_entropy(image_to_text, targets[0]) + F.cross_entropy(text_to_image, targets[1])) / 2


@torch.no_grad()
def hard_negatives(similarity: Tensor, image_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B,) int64: for each row of (B, B) a column of another image, drawn in proportion to softmax(similarity).

    Raises:
        ValueError: all pairs of a batch are of one image.
    """
    same = image_ids[:, None] == image_ids
    if same.all():
        raise ValueError("image_ids: expected at least two different images in a batch, which are each other's negatives")
    weights = similarity.float().masked_fill(same, float("-inf")).softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def momentum_copy(model: nn.Module) -> nn.Module:
    """A second ``model`` with copies of what is tuned, without gradients; frozen parameters and buffers are shared, not copied.

    It merges where ``model`` does. :class:`RetrievalLoss` lets it follow.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


class FeatureQueue:
    """The newest features of images and texts and which image each is of; the oldest make room.

    Until it is full, random unit vectors of no image (id −1) hold the places, as published.

    Attributes: image, text (Q, E); ids (Q,) int64; next: where the next pair goes.
    """

    def __init__(self, size: int, width: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.image, self.text = (
            F.normalize(torch.randn(size, width, generator=generator), dim=-1).to(device) for _ in range(2)
        )  # fmt: skip
        self.ids = torch.full((size,), -1, device=device)
        self.next = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def put(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Takes (B, E) features of each kind, B at most Q, and (B,) ids."""
        at = (self.next + torch.arange(len(ids), device=ids.device)) % len(self.ids)
        self.image[at], self.text[at], self.ids[at] = image.to(self.image.dtype), text.to(self.text.dtype), ids
        self.next.copy_((self.next + len(ids)) % len(self.ids))

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {"image": self.image, "text": self.text, "ids": self.ids, "next": self.next}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the values of another queue of this size."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class _Gather(torch.autograd.Function):
    """The rows of all processes, of which each may use any; a row's gradient is the sum of what all made of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _place() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _of_all(rows: Tensor) -> Tensor:
    """(B, ...) of this process → (world · B, ...), with gradient."""
    return rows if _place()[1] == 1 else _Gather.apply(rows)  # type: ignore[no-any-return]


class RetrievalLoss(nn.Module):
    """ITC and ITM of a batch of pairs; a module, so that DistributedDataParallel goes around it.

    With a queue, ITC contrasts images with the momentum encoder's texts and texts with its images, of this batch and of those
    in the queue, and mixes its opinion into the targets (MoCo's queue and ALBEF's distillation, as BLIP has them). Without,
    both sides are this batch, of all processes, and both learn. Averaged over processes it is the loss of the whole batch.

    Args:
        model: after :func:`prepare`, on its device. config: temperature, queue_size, momentum, alpha, negative_all_rank,
            encode_token_id and seed of it.

    Attributes: momentum_model, queue: None without a queue.
    """

    momentum_model: nn.Module | None
    queue: FeatureQueue | None  # no buffers, which DistributedDataParallel would send around: it is the same everywhere

    def __init__(self, model: nn.Module, config: RetrievalConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config or RetrievalConfig()
        self.momentum_model = self.queue = None
        if self.config.queue_size:
            projection: Any = model.text_proj
            weight = projection.weight
            self.momentum_model = momentum_copy(model)
            self.queue = FeatureQueue(self.config.queue_size, len(weight), self.config.seed, weight.device)

    def averages(self) -> dict[str, Tensor]:
        """The momentum encoder's own parameters, by the names they have in the model; empty without one."""
        if self.momentum_model is None:
            return {}
        found = dict(self.momentum_model.named_parameters())
        return {name: found[name] for name in tuned_parameters(self.model)}

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor, alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:  # fmt: skip
        """One step's losses; the momentum encoder takes a step before, and the queue takes in the batch after.

        Args:
            pixel_values: (B, 3, H, W), this process's share. input_ids, attention_mask: (B, L), L the same in all processes.
            image_ids: (B,) which image each is. alpha: in place of the config's. generator: draws the negatives; with
                negative_all_rank it has to be in the same state in all processes.
        """
        image, image_features = encode_image(self.model, pixel_values)
        text_features = encode_text(self.model, input_ids, attention_mask)
        contrastive = self._contrast(pixel_values, input_ids, attention_mask, image_ids, image_features, text_features, alpha)
        ids = with_encode_token(input_ids, self.config.encode_token_id)
        matching = self._match(image, ids, attention_mask, image_ids, image_features, text_features, generator)
        return Losses(contrastive, matching)

    def _contrast(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor, image: Tensor, text: Tensor,
        alpha: float | None,
    ) -> Tensor:  # fmt: skip
        every_id = _of_all(image_ids)
        if self.momentum_model is None or self.queue is None:
            every_image, every_text = _of_all(image), _of_all(text)
            return contrastive_loss(
                self._similarity(image, every_text), self._similarity(text, every_image), image_ids, every_id
            )  # fmt: skip
        with torch.no_grad():
            tuned = tuned_parameters(self.model)
            for name, average in self.averages().items():
                average.lerp_(tuned[name], 1 - self.config.momentum)
            _, slow_image = encode_image(self.momentum_model, pixel_values)
            slow_text = encode_text(self.momentum_model, input_ids, attention_mask)
            new_image, new_text = _of_all(slow_image), _of_all(slow_text)
            images, texts = torch.cat((new_image, self.queue.image)), torch.cat((new_text, self.queue.text))
            column_ids = torch.cat((every_id, self.queue.ids))
            opinions = (
                self._similarity(slow_image, texts).softmax(dim=1), self._similarity(slow_text, images).softmax(dim=1)
            )  # fmt: skip
            self.queue.put(new_image, new_text, every_id)
        return contrastive_loss(
            self._similarity(image, texts), self._similarity(text, images), image_ids, column_ids, opinions,
            self.config.alpha if alpha is None else alpha,
        )  # fmt: skip

    def _match(
        self, image: ImageTokens, ids: Tensor, mask: Tensor, image_ids: Tensor, image_features: Tensor, text_features: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        """Each pair, its text with a hard image and its image with a hard text: (B,) matches, (2B,) that don't."""
        own = torch.arange(len(ids), device=ids.device)
        if self.config.negative_all_rank:
            own = own + _place()[0] * len(ids)
            size = None if image.size is None else _of_all(image.size)
            image, ids, mask, image_ids = ImageTokens(_of_all(image.tokens), size), *map(_of_all, (ids, mask, image_ids))
            image_features, text_features = _of_all(image_features.detach()), _of_all(text_features.detach())
        similarity = self._similarity(image_features, text_features).detach()
        other_image = hard_negatives(similarity.t(), image_ids, generator)[own]
        other_text = hard_negatives(similarity, image_ids, generator)[own]
        images, texts = torch.cat((own, other_image, own)), torch.cat((own, own, other_text))
        logits = match_logits(self.model, ids[texts], mask[texts], image.rows(images))
        return F.cross_entropy(logits.float(), (torch.arange(len(texts), device=own.device) < len(own)).long())

    def _similarity(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, E), (C, E) → (B, C), over the temperature; at least float32, whatever autocast says."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(wide) @ columns.to(wide).t() / self.config.temperature


def with_encode_token(input_ids: Tensor, token: int | None) -> Tensor:
    """(B, L) with ``token`` in the first place, or as it is."""
    if token is None:
        return input_ids
    return torch.cat((torch.full_like(input_ids[:, :1], token), input_ids[:, 1:]), dim=1)


# --- evaluation -------------------------------------------------------------------------------------------------------


def recall(scores: Tensor, relevant: Tensor, ks: Sequence[int] = _KS) -> dict[int, float]:
    """Part of the queries, in [0, 1], with something relevant among the ``k`` best candidates, for each k.

    Args:
        scores: (Q, C). relevant: (Q, C) bool, with at least one in each row. A tie counts as lost: equal scores find nothing.
    """
    if scores.shape != relevant.shape or scores.dim() != 2:
        raise ValueError(f"relevant: expected the shape (Q, C) of scores, {tuple(scores.shape)}, got {tuple(relevant.shape)}")
    if not relevant.any(dim=1).all():
        raise ValueError("relevant: expected something relevant for every query, got a row without")
    best = scores.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)
    rank = ((scores >= best) & ~relevant).sum(dim=1)
    return {k: (rank < k).double().mean().item() for k in ks}


@dataclass(frozen=True)
class RetrievalScore:
    """Attributes: image_to_text, text_to_image: recall by k, in [0, 1]; contrastive: both, before matching re-ranked them."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    contrastive: tuple[dict[int, float], dict[int, float]]

    @property
    def mean(self) -> float:
        """Of the six recalls, in [0, 1]."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)

    def table(self) -> str:
        """The recalls in per cent, a line for each direction."""
        ks = list(self.image_to_text)
        lines = [" " * 28 + "".join(f"{'R@' + str(k):>8}" for k in ks)]
        rows = zip(("image → text", "text → image"), (self.image_to_text, self.text_to_image), self.contrastive, strict=True)
        for name, reranked, features in rows:
            lines.append(f"{name + ', features alone':<28}" + "".join(f"{100 * features[k]:8.1f}" for k in ks))
            lines.append(f"{name + ', re-ranked':<28}" + "".join(f"{100 * reranked[k]:8.1f}" for k in ks))
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer: Any, split: ImageTextSplit, config: RetrievalConfig | None = None, *, batch_size: int = 64,
    device: torch.device | str = "cpu", workers: int = 0, progress: bool = False, ks: Sequence[int] = _KS,
) -> RetrievalScore:  # fmt: skip
    """Recall in both directions: features rank everything, matching re-ranks the ``config.top_k`` best of each query.

    The model is in evaluation mode meanwhile, and afterwards as it was. In a process group every process has to call this;
    they share the re-ranking, and all get the score.
    """
    config = config or RetrievalConfig()
    device = torch.device(device)
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            return _evaluate(model, tokenizer, split, config, batch_size, device, workers, progress, ks)
    finally:
        model.train(training)


def _evaluate(
    model: nn.Module, tokenizer: Any, split: ImageTextSplit, config: RetrievalConfig, batch_size: int, device: torch.device,
    workers: int, progress: bool, ks: Sequence[int],
) -> RetrievalScore:  # fmt: skip
    text = tokenize(tokenizer, split.captions, config.max_length)
    features = [
        encode_text(model, ids.to(device), mask.to(device))
        for ids, mask in zip(*(part.split(4 * batch_size) for part in text), strict=True)
    ]
    text_features = torch.cat(features).float()
    tokens, features = [], []
    numbers = list(range(len(split.files)))
    for images in _bar(_images(split, _chunks(numbers, batch_size), workers), len(numbers) / batch_size, "images", progress):
        image, feature = encode_image(model, images.to(device))
        tokens.append(image.to("cpu"))  # all of them may be too many
        features.append(feature)
    sizes = [part.size for part in tokens]
    every = ImageTokens(
        torch.cat([part.tokens for part in tokens]),
        None if sizes[0] is None else torch.cat(sizes),  # type: ignore[arg-type]
    )
    similarity = torch.cat(features).float() @ text_features.t()  # (images, texts)
    relevant = torch.tensor(split.image_of)[None, :] == torch.arange(len(split.files))[:, None]

    def match(images: Tensor, texts: Tensor) -> Tensor:
        image = every.rows(images).to(device)
        ids = with_encode_token(text[0][texts].to(device), config.encode_token_id)
        return match_logits(model, ids, text[1][texts].to(device), image)[:, 1].float()

    similarity = similarity.cpu()
    to_text = _reranked(similarity, config.top_k, match, batch_size, progress, "image → text")
    to_image = _reranked(
        similarity.t(), config.top_k, lambda texts, images: match(images, texts), batch_size, progress, "text → image"
    )
    return RetrievalScore(
        recall(to_text, relevant, ks), recall(to_image, relevant.t(), ks),
        (recall(similarity, relevant, ks), recall(similarity.t(), relevant.t(), ks)),
    )  # fmt: skip


def _reranked(
    similarity: Tensor, top_k: int, match: Callable[[Tensor, Tensor], Tensor], batch_size: int, progress: bool, name: str
) -> Tensor:
    """(Q, C): the ``top_k`` most similar candidates of each query by their matching score, before all others."""
    top_k = min(top_k, similarity.shape[1])
    if not top_k:
        return similarity
    best = similarity.topk(top_k, dim=1).indices
    rank, world = _place()
    share = torch.arange(len(best))[rank::world]
    queries, candidates = share.repeat_interleave(top_k), best[share].reshape(-1)
    pairs = zip(queries.split(batch_size), candidates.split(batch_size), strict=True)
    found = [match(q, c).cpu() for q, c in _bar(pairs, len(queries) / batch_size, name, progress)]
    matching = torch.empty(best.shape)
    for i, part in enumerate(_gather(torch.cat([torch.empty(0), *found]).view(-1, top_k), world)):
        matching[i::world] = part
    # Similarities are cosines, so a score of at least 2 comes before all that were not re-ranked.
    return similarity.scatter(1, best, matching - matching.amin(dim=1, keepdim=True) + 2)


# --- data -------------------------------------------------------------------------------------------------------------


def image_transform(size: int, *, augment: bool = False) -> Callable[[Any], Tensor]:
    """From a PIL image to (3, size, size), normalised as BLIP has it; ``augment``: its crop, flip and two random operations.

    Each of the two is one of :class:`RandAugment`'s, and takes place every other time.
    """
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Any] = [transforms.Resize((size, size), bicubic)]
    if augment:
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic), transforms.RandomHorizontalFlip(),
            *(transforms.RandomApply([RandAugment()], p=0.5) for _ in range(2)),
        ]  # fmt: skip
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])  # type: ignore[no-any-return]


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


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


class _ImagesOnly:
    def __init__(self, split: ImageTextSplit) -> None:
        self.split = split

    def __getitem__(self, index: int) -> Tensor:
        return self.split.image(index)

    def __len__(self) -> int:
        return len(self.split.files)


def _images(split: ImageTextSplit, batches: list[list[int]], workers: int) -> Iterator[Tensor]:
    yield from DataLoader(_ImagesOnly(split), batch_sampler=batches, num_workers=workers)  # type: ignore[arg-type]


def _collate(items: list[tuple[Tensor, str, int]]) -> tuple[Tensor, Tensor]:
    images, _, numbers = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(numbers)


def _bar(things: Any, total: float, name: str, progress: bool) -> Any:
    return tqdm(things, desc=name, total=math.ceil(total), leave=False, disable=None if progress else True)


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module, tokenizer: Any, split: ImageTextSplit, config: RetrievalConfig, *, output: str | Path | None = None,
    device: torch.device | str = "cpu", workers: int = 0, progress: bool = False,
) -> list[tuple[float, float]]:  # fmt: skip
    """Trains what requires a gradient. Returns the mean contrastive and matching loss of every epoch.

    In a process group every process has to call this with the same model and data; each takes its share of every batch, and
    process 0 writes.

    Args:
        model: after :func:`prepare`. split: every caption comes once an epoch; what does not fill a batch is left out.
        output: of config.json, a checkpoint after each epoch (``step-*.ckpt``) and model.safetensors at the end. A run that was
            killed goes on from its last whole epoch and ends with the same weights.

    Raises:
        ValueError: less data than a batch, a batch that can't be shared, or ``output`` belongs to another run. RuntimeError:
            the loss is not finite.
    """
    rank, world = _place()
    steps, share = len(split) // config.batch_size, config.batch_size // world
    if not steps:
        raise ValueError(f"batch_size: expected at most the {len(split)} captions of the split, got {config.batch_size}")
    if share * world != config.batch_size or share < 2:
        raise ValueError(
            f"batch_size: expected a multiple of {world} processes with at least 2 in each, got {config.batch_size}"
        )
    folder = None if output is None else _claim(Path(output), config)
    device = torch.device(device)
    model.to(device)
    tuned = tuned_parameters(model)
    if not tuned:
        raise ValueError("model: expected parameters that require a gradient, got none; call prepare first")
    optimizer = torch.optim.AdamW(tuned.values(), lr=config.lr, weight_decay=config.weight_decay)
    loss = RetrievalLoss(model, config)
    network: nn.Module = loss
    if world > 1:
        network = DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
    torch.manual_seed(config.seed + 1_000_003 * rank)  # dropout and augmentation differ between processes
    history = _resume(folder, loss, optimizer)
    training = model.training
    network.train()
    for epoch in range(len(history), config.epochs):
        batches = _chunks(epoch_order(len(split), config.seed, epoch).tolist(), config.batch_size)[:steps]
        own = slice(rank * share, (rank + 1) * share)
        rate = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(2, dtype=torch.float64)
        # A generator of its own: workers' seeds must not depend on what was drawn before a resume.
        loader: Any = DataLoader(
            split,  # type: ignore[arg-type]
            batch_sampler=[batch[own] for batch in batches], num_workers=workers, collate_fn=_collate,
            generator=torch.Generator().manual_seed((config.seed + epoch) * world + rank),
        )  # fmt: skip
        bar = _bar(loader, steps, f"epoch {epoch + 1}", progress and rank == 0)
        for step, (batch, (images, numbers)) in enumerate(zip(batches, bar, strict=True)):
            # The whole batch's captions, so that all processes pad to one length.
            text = tokenize(tokenizer, [split.captions[i] for i in batch], config.max_length)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                losses = network(
                    images.to(device), *(part[own].to(device) for part in text), numbers.to(device),
                    alpha=config.alpha * min(1.0, epoch + step / steps),
                    generator=_negatives_generator(config, epoch * steps + step, device),
                )  # fmt: skip
            total = losses.contrastive + losses.matching
            if not torch.isfinite(total):
                raise RuntimeError(f"the loss is {total.item()} in step {step} of epoch {epoch + 1}; a lower lr may help")
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            sums += torch.stack(losses).detach().double().cpu()
        contrastive, matching = (sum(column) / world / steps for column in zip(*_gather(sums.tolist(), world), strict=True))
        history.append((contrastive, matching))
        if folder is not None:
            _checkpoint(folder, epoch + 1, loss, optimizer, history)
    model.train(training)
    if folder is not None and rank == 0:
        save_tuned(model, folder / "model.safetensors", config)
    return history


def _negatives_generator(config: RetrievalConfig, step: int, device: torch.device) -> torch.Generator:
    """In one state in all processes where they draw from the same negatives, in different ones where each has its own."""
    rank, world = (0, 1) if config.negative_all_rank else _place()
    return torch.Generator(device).manual_seed(((config.seed << 24) + step) * world + rank)


def _claim(folder: Path, config: RetrievalConfig) -> Path:
    """Refuses the folder of a run with other settings; writes config.json into a new one."""
    rank, world = _place()
    path, text = folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1)
    refusal = None
    if rank == 0:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(path, text.encode())
        elif json.loads(path.read_text()) != json.loads(text):
            refusal = f"output: {folder} holds a run with other settings; choose another"
    refusal = _first_decides(refusal, world)
    if refusal is not None:
        raise ValueError(refusal)
    return folder


def _checkpoint(
    folder: Path, epoch: int, loss: RetrievalLoss, optimizer: torch.optim.Optimizer, history: list[tuple[float, float]]
) -> None:  # fmt: skip
    rank, world = _place()
    states = _gather(checkpoint.remember_rng(), world)
    if rank != 0:
        return
    state = {
        "tuned": {name: p.detach().cpu() for name, p in tuned_parameters(loss.model).items()},
        "momentum": {name: p.cpu() for name, p in loss.averages().items()},
        "queue": {} if loss.queue is None else {name: t.cpu() for name, t in loss.queue.state_dict().items()},
        "optimizer": optimizer.state_dict(), "rng": states, "history": history,
    }  # fmt: skip
    checkpoint.write(folder, epoch, state, keep=2)


def _resume(
    folder: Path | None, loss: RetrievalLoss, optimizer: torch.optim.Optimizer
) -> list[tuple[float, float]]:  # fmt: skip
    """The history of the newest checkpoint, to whose state everything is set; empty where there is none."""
    rank, world = _place()
    newest = None if folder is None or rank != 0 else checkpoint.load_newest(folder)
    state = _first_decides(None if newest is None else newest[1], world)
    if state is None:
        return []
    tuned = tuned_parameters(loss.model)
    if state["tuned"].keys() != tuned.keys():
        raise ValueError(f"output: {folder} holds a run of a model with other tuned parameters")
    with torch.no_grad():
        for parameters, values in ((tuned, state["tuned"]), (loss.averages(), state["momentum"])):
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
    if loss.queue is not None:
        loss.queue.load_state_dict(state["queue"])
    optimizer.load_state_dict(state["optimizer"])
    if len(state["rng"]) == world:
        checkpoint.restore_rng(state["rng"][rank])
    else:
        warnings.warn(
            f"resumed with {world} processes instead of {len(state['rng'])}: dropout is not that of an unbroken run",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip
    return [tuple(losses) for losses in state["history"]]


def _frozen_digest(model: nn.Module) -> str:
    return _digest({name: p for name, p in model.named_parameters() if not p.requires_grad})


def save_tuned(model: nn.Module, path: str | Path, config: RetrievalConfig) -> None:
    """Writes the tuned parameters, the settings and a checksum of the frozen ones as a safetensors file."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in tuned_parameters(model).items()}
    header = {"config": dataclasses.asdict(config), "frozen_sha256": _frozen_digest(model)}
    checkpoint.write_atomically(Path(path), safetensors_bytes(tensors, metadata={"fpet_retrieval": json.dumps(header)}))


def load_tuned(model: nn.Module, path: str | Path) -> RetrievalConfig:
    """Prepares the bare ``model`` and gives it what :func:`save_tuned` wrote. Returns the settings.

    Raises:
        ValueError: another kind of file, or one tuned on other weights. FileNotFoundError: no file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file written by save_tuned, got {path}, which is no file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        header = json.loads(metadata["fpet_retrieval"])
        config, frozen = RetrievalConfig(**header["config"]), header["frozen_sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a file written by save_tuned, got {path}: {error}") from error
    prepare(model, config)
    tuned = tuned_parameters(model)
    if tuned.keys() != tensors.keys() or any(tuned[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ValueError(f"model: {path} was tuned on a model with other layers or widths")
    if _frozen_digest(model) != frozen:
        raise ValueError(f"model: {path} was tuned on other frozen weights")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tuned[name].copy_(tensor)
    return config


# --- the command ------------------------------------------------------------------------------------------------------


def tiny_blip(width: int = 48, depth: int = 2, image_size: int = 32, patch_size: int = 4, vocabulary: int = 64) -> Any:
    """A BlipForImageTextRetrieval with random weights that a CPU can train."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    both = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "num_attention_heads": 4,
        "initializer_range": width**-0.5,  # transformers' 0.02 is for wide models
    }  # fmt: skip
    text = {
        "vocab_size": vocabulary, "encoder_hidden_size": width, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
    }  # fmt: skip
    vision = {"image_size": image_size, "patch_size": patch_size}
    return BlipForImageTextRetrieval(
        BlipConfig(vision_config={**both, **vision}, text_config={**both, **text}, image_text_hidden_size=width)
    )


def word_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Any:
    """A BertTokenizer of whole words; writes its vocabulary into ``folder``."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return BertTokenizer.from_pretrained(folder)


def demo(
    folder: Path, *, seed: int = 0, progress: bool = True, say: Callable[[str], None] = print
) -> dict[str, RetrievalScore]:
    """Draws pairs, trains a tiny BLIP on some, then tunes it to others, on a lighter ground, with and without merging.

    Returns:
        What the test pairs give: "before", "unmerged", "merged".
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(folder / "tokenizer")
    write_folder(folder / "first", {"train": 700}, seed=1)
    write_folder(folder / "then", {"train": 300, "test": 100}, seed=2, background=0.4)
    transform = image_transform(32)
    first, train_split, test = (
        load_split(folder / name, part, transform) for name, part in (("first", "train"), ("then", "train"), ("then", "test"))
    )
    model = tiny_blip(vocabulary=tokenizer.vocab_size)
    say(
        f"{len(test.files)} test images, {len(test)} captions; guessing finds {100 / len(test.files):.1f} % of the images first"
    )
    # A run of a hundred steps is over before features of earlier steps and their mean are of use: no queue.
    every = RetrievalConfig(
        merge=False, queue_size=0, epochs=4, batch_size=32, lr=2e-3, weight_decay=0.01, top_k=16, seed=seed
    )  # fmt: skip
    train(model, tokenizer, first, every, progress=progress)
    scores = {"before": evaluate(model, tokenizer, test, every, progress=progress)}
    say(f"\nbefore tuning, {time.perf_counter() - start:.0f} s\n{scores['before'].table()}")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, merge in (("unmerged", False), ("merged", True)):
        config = dataclasses.replace(every, merge=merge, layer=0, adapter_dim=32)
        torch.manual_seed(seed)
        tuned = tiny_blip(vocabulary=tokenizer.vocab_size)
        tuned.load_state_dict(state)
        prepare(tuned, config)
        train(tuned, tokenizer, train_split, config, output=folder / name, progress=progress)
        scores[name] = evaluate(tuned, tokenizer, test, config, progress=progress)
        count = sum(p.numel() for p in tuned_parameters(tuned).values())
        say(f"\ntuned, {name}: {count:,} parameters, {time.perf_counter() - start:.0f} s\n{scores[name].table()}")
    return scores


def _load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    return BlipForImageTextRetrieval.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)


def _device(args: argparse.Namespace) -> torch.device:
    return pick_device(Config(device=args.device))


def _split(args: argparse.Namespace, name: str, *, augment: bool = False) -> ImageTextSplit:
    transform = image_transform(args.image_size, augment=augment)
    return load_split(args.data_dir, name, transform, list_name=args.list_name, image_folder=args.image_folder)


def _run_train(args: argparse.Namespace) -> int:
    names = {field.name for field in dataclasses.fields(RetrievalConfig)}
    config = RetrievalConfig(**{name: value for name, value in vars(args).items() if name in names})
    split = _split(args, "train", augment=args.augment)
    torch.manual_seed(config.seed)  # of what is new in the model
    model, tokenizer = _load_model(args)
    prepare(model, config)
    history = train(
        model, tokenizer, split, config, output=args.output, device=_device(args), workers=args.workers,
        progress=not args.quiet,
    )  # fmt: skip
    if _place()[0] != 0:
        return 0
    for epoch, (contrastive, matching) in enumerate(history, 1):
        print(f"epoch {epoch}: contrastive loss {contrastive:.4f}, matching loss {matching:.4f}")
    print(f"written: {Path(args.output) / 'model.safetensors'}")
    return 0


def _run_evaluate(args: argparse.Namespace) -> int:
    split = _split(args, args.split)
    model, tokenizer = _load_model(args)
    config = RetrievalConfig() if args.tuned is None else load_tuned(model, args.tuned)
    if args.no_merging:
        huggingface.remove(model)
    if args.top_k is not None:
        config = dataclasses.replace(config, top_k=args.top_k)
    if args.encode_token_id is not None:
        config = dataclasses.replace(config, encode_token_id=args.encode_token_id)
    device, rank = _device(args), _place()[0]
    score = evaluate(
        model.to(device), tokenizer, split, config, batch_size=args.batch_size, device=device, workers=args.workers,
        progress=not args.quiet and rank == 0,
    )  # fmt: skip
    if rank == 0:
        print(json.dumps(dataclasses.asdict(score)) if args.json else score.table())
    return 0


def _run_check(args: argparse.Namespace) -> int:
    wrong = check_folder(
        args.data_dir, decode=not args.no_decode, list_name=args.list_name, image_folder=args.image_folder
    )  # fmt: skip
    print("\n".join(wrong) or f"{args.data_dir}: whole")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fpet.retrieval", description="Image-text retrieval with BLIP, UniAdapters and merged image tokens."
    )
    parser.add_argument("--demo", action="store_true", help="all of it on drawn shapes and a tiny BLIP, without any download")
    parser.add_argument("--seed", type=int, default=0, help="of --demo")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    default = RetrievalConfig()

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(run=run)
        command.add_argument("--data-dir", required=True, help="folder with the list and the folder of images")
        command.add_argument("--list-name", default="dataset_flickr30k.json", help="default: %(default)s")
        command.add_argument("--image-folder", default="flickr30k-images", help="default: %(default)s")
        return command

    def add_model(command: argparse.ArgumentParser) -> None:
        command.add_argument("--model", default="Salesforce/blip-itm-base-flickr", help="name or folder (default: %(default)s)")
        command.add_argument("--image-size", type=int, default=384, help="pixels a side (default: %(default)s)")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
        command.add_argument("--workers", type=int, default=0, help="processes that read images")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_argument("--encode-token-id", type=int, help="first token where text meets image; BLIP's own is 30523")

    tune = add("train", "tune a BlipForImageTextRetrieval on the training split", _run_train)
    add_model(tune)
    tune.add_argument("--output", required=True, help="folder of the run; a run that was killed goes on in its own")
    tune.add_argument("--no-merging", dest="merge", action="store_false", help="keep every image token")
    tune.add_argument("--layer", type=int, help="0-based layer that merges (default: the middle one)")
    tune.add_argument("--no-refinement", dest="refine", action="store_false", help="match by raw keys")
    tune.add_argument("--attention", choices=("eager", "sdpa"), help="of the vision encoder (default: the model's)")
    tune.add_argument("--no-augment", dest="augment", action="store_false", help="no random crops, flips and RandAugment")
    tune.add_argument("--negative-all-rank", action="store_true", help="hard negatives from the batches of all processes")
    tune.add_argument("--grad-checkpointing", action="store_true", help="compute activations again to save memory")
    tune.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    for name in (
        "adapter_dim", "adapter_scale", "key_value_dim", "temperature", "queue_size", "momentum", "alpha", "epochs",
        "batch_size", "lr", "min_lr", "weight_decay", "max_length", "top_k", "seed",
    ):  # fmt: skip
        value = getattr(default, name)
        tune.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, help="default: %(default)s")

    score = add("evaluate", "recall of a model, tuned or as it comes", _run_evaluate)
    add_model(score)
    score.add_argument("--tuned", help="model.safetensors of a run")
    score.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: %(default)s")
    score.add_argument("--no-merging", action="store_true", help="the tuned weights with every image token kept")
    score.add_argument("--top-k", type=int, help=f"candidates to re-rank (default: the run's, or {default.top_k})")
    score.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    score.add_argument("--json", action="store_true", help="the score as JSON")

    check = add("check", "say what is missing or damaged in a data folder", _run_check)
    check.add_argument("--no-decode", action="store_true", help="do not open every image")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None and not args.demo:
        parser.error("expected --demo, train, evaluate or check")
    try:
        if args.command == "check":
            return _run_check(args)
        if args.command is not None:
            with _process_group(Config(device=args.device)):
                return int(args.run(args))
        with tempfile.TemporaryDirectory() as folder:
            demo(Path(folder), seed=args.seed)
        return 0
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
