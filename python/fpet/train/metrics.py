"""How well a model does on a data set, by torchmetrics, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics import classification as tm

__all__ = ["Scores"]


class Scores:
    """Collects predictions and says what they come to.

    One class an image: accuracy and "top5" (where there are more than five classes), "macro_f1", "calibration_error" (15 bins),
    recall of each class, and the confusion matrix. Several labels an image: "accuracy" of whole images, all labels right;
    "mean_average_precision", "macro_f1" at a probability of a half, and the average precision of each class.
    """

    def __init__(self, num_classes: int, *, multi_label: bool = False, device: torch.device | str = "cpu") -> None:
        self.multi_label = multi_label
        each: dict[str, Any]
        if multi_label:
            each = {
                "accuracy": tm.MultilabelExactMatch(num_classes),
                "macro_f1": tm.MultilabelF1Score(num_classes),
                "mean_average_precision": tm.MultilabelAveragePrecision(num_classes),
                "per_class": tm.MultilabelAveragePrecision(num_classes, average=None),
            }
        else:
            each = {
                "accuracy": tm.MulticlassAccuracy(num_classes, average="micro"),
                "macro_f1": tm.MulticlassF1Score(num_classes),
                "calibration_error": tm.MulticlassCalibrationError(num_classes, n_bins=15),
                "per_class": tm.MulticlassAccuracy(num_classes, average=None),
                "confusion": tm.MulticlassConfusionMatrix(num_classes),
            }
            if num_classes > 5:
                each["top5"] = tm.MulticlassAccuracy(num_classes, average="micro", top_k=5)
        self.metrics = MetricCollection(each, compute_groups=False).to(device)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Takes (B, C) scores of the model and (B,) classes or (B, C) vectors of 0 and 1."""
        scores = scores.detach().float()
        if self.multi_label:
            self.metrics.update(scores.sigmoid(), labels.long())
        else:
            self.metrics.update(scores.softmax(1), labels)

    def compute(self) -> dict[str, Any]:
        """The numbers by name; "per_class" and "confusion" are lists. Every process has to ask for it."""
        return {name: value.tolist() for name, value in self.metrics.compute().items()}
