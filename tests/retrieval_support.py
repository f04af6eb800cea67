"""A tiny random BLIP and what tests ask of it."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="fpet.retrieval needs transformers")

from fpet import cli, retrieval  # noqa: E402
from fpet.data import flickr30k  # noqa: E402
from fpet.retrieval import RetrievalConfig, demo  # noqa: E402
from fpet.retrieval.tuning import tuned_parameters  # noqa: E402

SMALL = RetrievalConfig(adapter_dim=4, epochs=2, batch_size=4, lr=1e-2, top_k=3, max_length=16, queue_size=10)


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    return demo.tiny_blip(**{"width": 16, "depth": 2, "image_size": 16, **sizes}).eval()


def load(folder, name):
    return flickr30k.load_split(folder, name, retrieval.image_transform(16))


def tuned_state(model):
    return {name: p.detach().clone() for name, p in tuned_parameters(model).items()}


def randomize(model, scale=0.3):
    with torch.no_grad():
        for p in tuned_parameters(model).values():
            p.add_(scale * torch.randn_like(p))


def command(arguments):
    """``fpet retrieval``."""
    return cli.main(["retrieval", *arguments])
