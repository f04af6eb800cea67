"""Tuning a backbone: settings, the training loop, evaluation, comparisons of several runs."""

from .build import build_model, load_run, load_tuned
from .config import PRESETS, REDUCTIONS, Config, ConfigError
from .evaluation import Score, evaluate, evaluate_run
from .result import Result
from .run import learning_rate, train
from .studies import compare, comparison_table, sweep

__all__ = [
    "PRESETS", "REDUCTIONS", "Config", "ConfigError", "Result", "Score", "build_model", "compare", "comparison_table",
    "evaluate", "evaluate_run", "learning_rate", "load_run", "load_tuned", "sweep", "train",
]  # fmt: skip
