"""Transform and augmentation."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageOps

from fpet import retrieval
from fpet.retrieval import inputs


def test_augmentation_is_as_published():
    """Every result is that of one of the ten operations at level 5 of 10, done by PIL, and each of them comes up."""
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (24, 32), mode="bicubic")[0]
    pixels = (40 + 150 * pixels.clamp(0, 1)).byte().permute(1, 2, 0)
    image = Image.fromarray(pixels.numpy())
    moves = {
        "shear": [(1, 0.15 * sign, 0, 0, 1, 0) for sign in (1, -1)] + [(1, 0, 0, 0.15 * sign, 1, 0) for sign in (1, -1)],
        "shift": [(1, 0, 5 * sign, 0, 1, 0) for sign in (1, -1)] + [(1, 0, 0, 0, 1, 5 * sign) for sign in (1, -1)],
    }
    bilinear, grey = Image.Resampling.BILINEAR, (128, 128, 128)
    expected = {"nothing": image, "contrast": ImageOps.autocontrast(image), "equalize": ImageOps.equalize(image)}
    expected |= {f"turn {sign}": image.rotate(15 * sign, bilinear, fillcolor=grey) for sign in (1, -1)}
    for name, matrices in moves.items():
        for i, matrix in enumerate(matrices):
            expected[f"{name} {i}"] = image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=grey)
    known = {name: tensor(other) for name, other in expected.items()}
    counts = dict.fromkeys(known, 0)
    for _ in range(1000):
        result = tensor(inputs.RandAugment()(image))
        (name,) = (name for name, other in known.items() if (result - other).abs().mean() < 0.5)
        counts[name] += 1
    for name, count in counts.items():
        chance = {"nothing": 3 / 10, "contrast": 1 / 10, "equalize": 1 / 10}.get(name, 1 / 20)
        assert abs(count - 1000 * chance) < 5 * (1000 * chance) ** 0.5, name


def tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


def test_two_operations_every_other_time(monkeypatch):
    calls = [0]

    def count(self, image):
        calls[0] += 1
        return image

    monkeypatch.setattr(inputs.RandAugment, "forward", count)
    transform, image = retrieval.image_transform(8, augment=True), Image.new("RGB", (20, 10), (200, 30, 90))
    results = [transform(image) for _ in range(400)]
    assert abs(calls[0] - 400) < 75  # five standard deviations of 2 · 400 · ½
    plain = retrieval.image_transform(8)(image)
    assert plain.shape == results[0].shape == (3, 8, 8) and torch.allclose(results[0], plain, atol=0.02)
    retrieval.image_transform(8)(image)
    assert calls[0] == pytest.approx(400, abs=75)
