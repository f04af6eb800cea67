"""Settings of a retrieval run: :class:`RetrievalConfig`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RetrievalConfig"]


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
