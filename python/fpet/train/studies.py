"""Several runs: the best scale for a task, and reductions compared."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from . import pretrain
from .config import EMBEDDED_MODEL, Config
from .inputs import resolve
from .result import Result
from .run import train

__all__ = ["compare", "comparison_table", "sweep"]

log = logging.getLogger("fpet")


def _shared_backbone(config: Config) -> Config:
    """With the embedded backbone pre-trained once, for all runs below ``config.output``."""
    if config.model != EMBEDDED_MODEL or config.weights is not None:
        return config
    config.check()
    path = pretrain.ensure(Path(config.output), config.pretrain_steps, progress=config.progress)
    return dataclasses.replace(config, weights=str(path))


def sweep(config: Config, scales: Sequence[float]) -> Result:
    """Tries each per-task scale s and returns the run with the best one; the test set has no part in the choice.

    Each s is trained with the honest protocol, without test, into ``OUTPUT/s-…``; the best on the validation set wins (the
    smallest s of equals). With the honest protocol that model is then tested; with the paper's, it is trained anew on
    training and validation images together, into ``OUTPUT/chosen``, and tested.
    """
    config = _shared_backbone(config)
    honest = dataclasses.replace(config, protocol="honest", keep_backbone=False)
    trials = {s: dataclasses.replace(honest, scale=s, output=f"{config.output}/s-{s:g}") for s in sorted(scales)}
    for trial in trials.values():
        trial.check()
    found = {s: train(trial, test=False).val_accuracy or 0.0 for s, trial in trials.items()}
    for s, accuracy in found.items():
        log.info("s = %g: %.2f %% on validation", s, 100 * accuracy)
    best = max(found, key=lambda s: found[s])
    if resolve(config).protocol == "honest":
        return train(trials[best])
    return train(dataclasses.replace(config, scale=best, output=f"{config.output}/chosen"))


def compare(config: Config, reductions: Sequence[str], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Test accuracy of each reduction for each seed, on the same backbone and data; runs in ``OUTPUT/REDUCTION-SEED``."""
    config = _shared_backbone(config)
    keep = config.keep_backbone and config.weights is None  # or every run would hold a copy of the same file
    runs = {
        name: [
            dataclasses.replace(config, reduction=name, seed=s, output=f"{config.output}/{name}-{s}", keep_backbone=keep)
            for s in seeds
        ]
        for name in reductions
    }
    for run in (run for several in runs.values() for run in several):
        run.check()
    accuracies: dict[str, list[float]] = {name: [] for name in reductions}
    for i in range(len(seeds)):
        for name in reductions:
            accuracies[name].append(train(runs[name][i]).accuracy or 0.0)
            log.info("seed %d, %s: %.2f %%", seeds[i], name, 100 * accuracies[name][-1])
    return accuracies


def comparison_table(accuracies: dict[str, list[float]]) -> str:
    """Mean and sample standard deviation over the seeds, in percent."""
    lines = [f"{'tokens':<18} {'mean %':>7} {'± std':>6}  each seed"]
    for name, values in accuracies.items():
        percent = torch.tensor(values, dtype=torch.float64) * 100
        spread = f"{percent.std().item():6.2f}" if len(values) > 1 else f"{'–':>6}"
        lines.append(f"{name:<18} {percent.mean().item():7.2f} {spread}  {' '.join(f'{v:.1f}' for v in percent.tolist())}")
    return "\n".join(lines)
