"""The embedded backbone: a vision transformer of 0.3 million parameters, pre-trained here in about a minute."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer

from ..data import PretrainingData
from ..files import checkpoint
from ..files.atomic import write_atomically
from .progress import Progress

__all__ = ["FILE", "description", "embedded_backbone", "ensure", "load_backbone", "pretrain", "save_backbone"]

FILE = "backbone.safetensors"
_CHECKPOINT_STEPS = 100


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
    report: Callable[[int, float, float], None] | None = None, folder: Path | None = None,
) -> tuple[VisionTransformer, str, float]:  # fmt: skip
    """Trains :func:`embedded_backbone` from scratch on :class:`fpet.data.PretrainingData`. The global generator stays put.

    The task is what the image shows, and where, how large and turned how: class by cross-entropy, the rest by squared error.

    Args:
        report: called after each step with its number, the loss and the accuracy on the batch.
        folder: of checkpoints, one every 100 steps; where there is one, pre-training goes on from it.

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
    settings = [steps, seed, batch_size, lr, data.source]
    parts: dict[str, Any] = {"model": model, "factors_head": factors_head, "optimizer": optimizer, "schedule": schedule}
    first = _resume(folder, parts, generator, settings)
    for step in range(first, steps):
        images, labels, factors = data.batch(batch_size, generator)
        features = model.forward_features(images)
        scores = model.forward_head(features)
        loss = F.cross_entropy(scores, labels) + 2 * F.mse_loss(factors_head(features[:, 0]), factors)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if folder is not None and (step + 1) % _CHECKPOINT_STEPS == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.write(folder, step + 1, state | {"generator": generator.get_state(), "settings": settings}, keep=1)
        if report is not None:
            report(step, loss.item(), (scores.argmax(1) == labels).float().mean().item())
    model.eval()
    images, labels, _ = data.batch(1000, generator)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    return model, data.source, right


def _resume(folder: Path | None, parts: dict[str, Any], generator: torch.Generator, settings: list[Any]) -> int:
    """Steps of the newest checkpoint, to whose state everything is set; 0 where there is none with these settings."""
    found = None if folder is None else checkpoint.load_newest(folder)
    if folder is None or found is None:
        return 0
    path, state = found
    if state["settings"] != settings:
        for other in checkpoint.checkpoints(folder):
            other.unlink()
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    return int(path.stem.partition("-")[2])


def ensure(folder: Path, steps: int, *, progress: bool = False) -> Path:
    """``backbone.safetensors`` in ``folder``, pre-trained in so many steps; trained now where it is not there.

    What was begun goes on: checkpoints are in ``folder/pretraining``, until the file is written.
    """
    path, begun = folder / FILE, folder / "pretraining"
    if path.is_file() and _header(path).get("steps") == steps:
        return path
    begun.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with Progress("pre-training", steps, on=progress) as shown:
        model, source, accuracy = pretrain(
            steps,
            folder=begun,
            report=lambda step, loss, right: shown.step(step + 1, loss=f"{loss:.3f}", accuracy=f"{right:.2f}"),
        )
    note = f"pre-trained on {source} in {time.perf_counter() - start:.0f} s, accuracy {100 * accuracy:.1f} %"
    save_backbone(model, path, {"steps": steps, "description": note})
    shutil.rmtree(begun, ignore_errors=True)
    return path


def description(path: Path) -> str:
    """What the backbone in a file of :func:`ensure` is, in words."""
    return f"embedded, {_header(path).get('description', path.name)}"


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("fpet_backbone", "{}"))
            return found if isinstance(found, dict) else {}
    except (SafetensorError, OSError, ValueError):
        return {}


def save_backbone(model: VisionTransformer, path: Path, header: dict[str, Any] | None = None) -> None:
    """Writes the weights (safetensors), the pre-training head left out; ``header`` is what else is to be known of them."""
    kept = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("head.")}
    write_atomically(path, save_safetensors(kept, metadata={"fpet_backbone": json.dumps(header or {})}))


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
