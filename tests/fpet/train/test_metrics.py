"""Scores against their definitions."""

from __future__ import annotations

import pytest
import torch

from fpet.data import TensorTask
from fpet.train import evaluate
from fpet.train.metrics import Scores


def test_scores_are_what_their_definitions_say() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = 2 * torch.randn(200, 7, generator=generator), torch.randint(7, (200,), generator=generator)
    scores[torch.arange(200), labels] += 1.5
    collected = Scores(7)
    for a, b in zip(scores.split(64), labels.split(64), strict=True):
        collected.update(a, b)
    found = collected.compute()
    predicted = scores.argmax(1)
    assert found["accuracy"] == pytest.approx((predicted == labels).double().mean().item())
    assert found["top5"] == pytest.approx((scores.topk(5).indices == labels[:, None]).any(1).double().mean().item())
    confusion = torch.zeros(7, 7)
    for truth, guess in zip(labels, predicted, strict=True):
        confusion[truth, guess] += 1
    assert found["confusion"] == confusion.tolist()
    recalls, precisions = confusion.diag() / confusion.sum(1), confusion.diag() / confusion.sum(0)
    assert found["per_class"] == pytest.approx(recalls.tolist())
    assert found["macro_f1"] == pytest.approx((2 * recalls * precisions / (recalls + precisions)).mean().item())
    confidence, error = scores.softmax(1).amax(1), 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = (predicted == labels)[inside].double().mean() - confidence[inside].double().mean()
            error += inside.double().mean().item() * abs(gap.item())
    assert found["calibration_error"] == pytest.approx(error, abs=1e-5)


def test_evaluation_has_them_whatever_the_batch() -> None:
    images = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    task = TensorTask(images, torch.arange(30) % 3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    one, two = (evaluate(model, task, batch_size=size, num_classes=3) for size in (30, 7))
    assert one.accuracy == two.accuracy and one.more["macro_f1"] == pytest.approx(two.more["macro_f1"])
    assert "top5" not in one.more and evaluate(model, task).more == {}


def test_several_labels_an_image() -> None:
    scores = torch.tensor([[2.0, -1.0], [-1.0, 3.0], [1.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    collected = Scores(2, multi_label=True)
    collected.update(scores, labels)
    found = collected.compute()
    assert found["accuracy"] == pytest.approx(2 / 3) and found["mean_average_precision"] == 1.0
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
