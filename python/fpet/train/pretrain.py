"""The embedded backbone: a vision transformer of 0.3 million parameters, pre-trained here in about a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer

from ..data import PretrainingData
from ..files.checkpoint import write_atomically

__all__ = ["embedded_backbone", "load_backbone", "pretrain", "save_backbone"]


def embedded_backbone(num_classes: int = 10, drop_path: float = 0.0) -> VisionTransformer:
    """Untrained: 32 × 32 pixels in patches of 4, 6 blocks, width 64, heads of 32 channels.

    Its initialisation is made for a short training: sine-cosine position embeddings, and patch filters without a mean, which
    see contrast and not brightness.
    """
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=num_classes, drop_path_rate=drop_path
    )
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.5 * build_sincos2d_pos_embed([8, 8], 64)
        filters = model.patch_embed.proj.weight.normal_(0, 0.25)
        filters -= filters.mean((2, 3), keepdim=True)
    return model


def pretrain(
    steps: int, seed: int = 0, *, batch_size: int = 48, lr: float = 1.5e-3,
    report: Callable[[int, float, float], None] | None = None,
) -> tuple[VisionTransformer, str, float]:  # fmt: skip
    """Trains :func:`embedded_backbone` from scratch on :class:`fpet.data.PretrainingData`. The global generator stays put.

    The task is what the image shows, and where, how large and turned how: class by cross-entropy, the rest by squared error.

    Args:
        report: called after each step with its number, the loss and the accuracy on the batch.

    Returns:
        the model in evaluation mode, "digits" or "shapes", and the accuracy on 1000 fresh images.
    """
    data, generator = PretrainingData(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = embedded_backbone(data.num_classes)
        factors_head = torch.nn.Linear(model.embed_dim, 4)
    parameters = [*model.parameters(), *factors_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        images, labels, factors = data.batch(batch_size, generator)
        features = model.forward_features(images)
        scores = model.forward_head(features)
        loss = F.cross_entropy(scores, labels) + 2 * F.mse_loss(factors_head(features[:, 0]), factors)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step, loss.item(), (scores.argmax(1) == labels).float().mean().item())
    model.eval()
    images, labels, _ = data.batch(1000, generator)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    return model, data.source, right


def save_backbone(model: VisionTransformer, path: Path) -> None:
    """Writes the weights (safetensors), the pre-training head left out."""
    kept = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("head.")}
    write_atomically(path, save_safetensors(kept))


def load_backbone(path: Path, num_classes: int, drop_path: float = 0.0) -> VisionTransformer:
    """The embedded backbone with the weights of :func:`save_backbone` and a fresh head.

    Raises:
        ValueError: the file is damaged or of another model.
    """
    model = embedded_backbone(num_classes, drop_path)
    try:
        missing, extra = model.load_state_dict(load_safetensors(path.read_bytes()), strict=False)
    except Exception as error:  # safetensors and torch each have their own
        raise ValueError(f"weights: expected the embedded backbone in {path}, got a damaged or other file: {error}") from error
    if extra or any(not name.startswith("head.") for name in missing):
        raise ValueError(f"weights: {path} lacks {missing} and has {extra} besides what the embedded backbone takes")
    return model
