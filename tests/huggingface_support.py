"""What the tests of transformers' encoders share: tiny models of every family, with weights under which every branch matters."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import (
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

WIDTH, DEPTH, HEADS, SIDE, PATCH = 32, 3, 4, 40, 8
GRID = SIDE // PATCH  # odd: 13 of 25 patches are sources
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "encoder_hidden_size": WIDTH, "vocab_size": 30, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sep_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "blip": lambda: BlipVisionModel(BlipVisionConfig(**VISION)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "vit": lambda: ViTModel(ViTConfig(**VISION)),
}


def spread(model: nn.Module) -> nn.Module:
    """transformers' initialisation makes every branch all but zero, and a test blind to it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() < 2 else 1.5 / math.sqrt(p.shape[-1])))
    return model
