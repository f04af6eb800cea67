"""The embedded backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fpet.train import Config, pretrain, train


def test_the_embedded_backbone_is_pretrained_once_and_recorded(config: Config) -> None:
    config = dataclasses.replace(config, weights=None, pretrain_steps=2, epochs=1, warmup_epochs=0.0)
    result = train(config)
    path = Path(config.output) / "backbone.safetensors"
    before = path.stat().st_mtime_ns
    assert "pre-trained on" in result.backbone and train(config).accuracy == result.accuracy
    assert path.stat().st_mtime_ns == before


def test_pretraining_learns_and_leaves_the_generator_alone() -> None:
    losses: list[float] = []
    before = torch.get_rng_state()
    pretrain.pretrain(8, batch_size=16, report=lambda step, loss, accuracy: losses.append(loss))
    assert torch.equal(before, torch.get_rng_state())
    again: list[float] = []
    pretrain.pretrain(2, batch_size=16, report=lambda step, loss, accuracy: again.append(loss))
    assert again[0] == losses[0] and all(0 < loss < 10 for loss in losses)
