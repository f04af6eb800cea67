"""Recall of images by texts and of texts by images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.flickr30k import ImageTextSplit
from ..huggingface import ImageTokens, encode_image, encode_text, match_logits
from ..train.processes import gather, place
from .config import RetrievalConfig
from .inputs import images_of, tokenize, with_encode_token

__all__ = ["RetrievalScore", "evaluate", "recall"]

_KS = (1, 5, 10)


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
    for images in _bar(images_of(split, batch_size, workers), len(split.files) / batch_size, "images", progress):
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
        recall(to_text, relevant, ks),
        recall(to_image, relevant.t(), ks),
        (recall(similarity, relevant, ks), recall(similarity.t(), relevant.t(), ks)),
    )


def _reranked(
    similarity: Tensor, top_k: int, match: Callable[[Tensor, Tensor], Tensor], batch_size: int, progress: bool, name: str
) -> Tensor:
    """(Q, C): the ``top_k`` most similar candidates of each query by their matching score, before all others."""
    top_k = min(top_k, similarity.shape[1])
    if not top_k:
        return similarity
    best = similarity.topk(top_k, dim=1).indices
    rank, world = place()
    share = torch.arange(len(best))[rank::world]
    queries, candidates = share.repeat_interleave(top_k), best[share].reshape(-1)
    pairs = zip(queries.split(batch_size), candidates.split(batch_size), strict=True)
    found = [match(q, c).cpu() for q, c in _bar(pairs, len(queries) / batch_size, name, progress)]
    matching = torch.empty(best.shape)
    for i, part in enumerate(gather(torch.cat([torch.empty(0), *found]).view(-1, top_k))):
        matching[i::world] = part
    # Similarities are cosines, so a score of at least 2 comes before all that were not re-ranked.
    return similarity.scatter(1, best, matching - matching.amin(dim=1, keepdim=True) + 2)


def _bar(things: Any, total: float, name: str, progress: bool) -> Any:
    return tqdm(things, desc=name, total=math.ceil(total), leave=False, disable=None if progress else True)
