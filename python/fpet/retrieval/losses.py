"""Contrast and matching of images and texts (ITC, ITM), with BLIP's momentum encoder and queue."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..huggingface import ImageTokens, encode_image, encode_text, match_logits
from ..train.processes import place
from .config import RetrievalConfig
from .inputs import with_encode_token
from .tuning import tuned_parameters

__all__ = ["FeatureQueue", "Losses", "RetrievalLoss", "contrastive_loss", "hard_negatives", "momentum_copy"]


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
        )
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


def _of_all(rows: Tensor) -> Tensor:
    """(B, ...) of this process → (world · B, ...), with gradient."""
    return rows if place()[1] == 1 else _Gather.apply(rows)  # type: ignore[no-any-return]


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
            )
        with torch.no_grad():
            tuned = tuned_parameters(self.model)
            for name, average in self.averages().items():
                average.lerp_(tuned[name], 1 - self.config.momentum)
            _, slow_image = encode_image(self.momentum_model, pixel_values)
            slow_text = encode_text(self.momentum_model, input_ids, attention_mask)
            new_image, new_text = _of_all(slow_image), _of_all(slow_text)
            images, texts = torch.cat((new_image, self.queue.image)), torch.cat((new_text, self.queue.text))
            column_ids = torch.cat((every_id, self.queue.ids))
            opinions = (self._similarity(slow_image, texts).softmax(dim=1), self._similarity(slow_text, images).softmax(dim=1))
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
            own = own + place()[0] * len(ids)
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
