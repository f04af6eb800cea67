"""From a tuned model to one in use: which layer to merge in, predictions, files for other runtimes."""

from .exporting import FORMATS, Exported, export
from .planning import Plan, PlanRow, plan
from .prediction import Prediction, predict

__all__ = [
    "FORMATS",
    "Exported",
    "Plan",
    "PlanRow",
    "Prediction",
    "export",
    "plan",
    "predict",
]
