"""Accuracies of the tables: on the embedded tasks, by training or of the backbone as it is, or by training on data at hand."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .. import data
from ..adapters import AdapterConfig
from ..data import VTAB_TASKS, PretrainingData, TensorTask
from ..files.atomic import write_atomically
from ..train import pretrain
from ..train.build import reduce_tokens
from ..train.config import PRESETS, Config, ConfigError
from ..train.evaluation import evaluate
from ..train.inputs import load_data
from ..train.run import train
from ..train.studies import sweep
from .measure import MODELS, Variant

__all__ = [
    "embedded_config",
    "has_scale",
    "on_data",
    "on_embedded",
    "paper_config",
    "parse_settings",
    "present_tasks",
    "untuned",
    "vtab_mean",
]

Tick = Callable[[str], object]


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of Config from "name=value".

    Raises:
        ConfigError: no such field, or a value that is none of its type.
    """
    fields = {f.name: str(f.type).partition(" | ")[0] for f in dataclasses.fields(Config)}
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in fields:
            raise ConfigError(f"--set: expected NAME=VALUE with a setting of fpet train, got {text!r}")
        try:
            if fields[name] == "bool":
                values[name] = {"true": True, "false": False}[value.lower()]
            else:
                values[name] = {"str": str, "int": int, "float": float}[fields[name]](value)
        except (KeyError, ValueError):
            raise ConfigError(f"--set: expected a value of type {fields[name]} for {name}, got {value!r}") from None
    return values


def embedded_config(variant: Variant, task: str, seed: int, runs: Path, settings: dict[str, Any]) -> Config:
    """The run of one method and reduction on an embedded task; ``variant.model`` and ``layer`` have no part in it."""
    output = runs / "embedded" / task / f"{variant.method}-{variant.reduction}-{seed}"
    config = Config(
        task=task, method=variant.method, reduction=variant.reduction, seed=seed, output=str(output), progress=False,
        weights=str(runs / "embedded" / "backbone.safetensors"),
    )  # fmt: skip
    return dataclasses.replace(config, **settings)


def on_embedded(
    variants: Sequence[Variant], tasks: Sequence[str], seeds: Sequence[int], runs: Path, settings: dict[str, Any], tick: Tick
) -> list[dict[str, Any]]:
    """Test accuracies in percent of the embedded backbone, one entry for each task and variant, a value for each seed.

    The backbone is pre-trained once. What was trained before is not trained again; a run that was killed goes on.
    """
    path = runs / "embedded" / "backbone.safetensors"
    if not path.is_file():
        tick("pre-training")
        path.parent.mkdir(parents=True, exist_ok=True)
        steps = settings.get("pretrain_steps", Config().pretrain_steps)
        pretrain.save_backbone(pretrain.pretrain(steps)[0], path)
    configs = {(t, v, s): embedded_config(v, t, s, runs, settings) for t in tasks for v in variants for s in seeds}
    for config in configs.values():
        config.check()
    found: dict[tuple[str, Variant, int], float] = {}
    for (task, variant, seed), config in sorted(configs.items(), key=lambda item: item[0][2]):  # seed by seed
        tick(f"{task}, {variant.method}, {variant.reduction}, seed {seed}")
        found[task, variant, seed] = 100 * (train(config).accuracy or 0.0)
    return [
        {"task": t, "method": v.method, "reduction": v.reduction, "accuracies": [found[t, v, s] for s in seeds]}
        for t in tasks
        for v in variants
    ]


UNTUNED = ("none", "bsm-checkerboard", "bsm", "avg-pool", "max-pool", "tome")
"""Reductions that learn nothing. FPET before its refinement has learned is "bsm-checkerboard"."""
TEST_COUNT = 2000


def untuned(seeds: Sequence[int], runs: Path, settings: dict[str, Any], tick: Tick) -> tuple[str, dict[str, list[float]]]:
    """What reductions cost a backbone that has not met them: accuracy in percent on the task of its pre-training.

    Each seed is a backbone of its own, kept in ``runs``, and 2000 images of its own, which all reductions see.

    Returns:
        "digits" or "shapes"; by reduction, a value for each seed.
    """
    found: dict[str, list[float]] = {name: [] for name in UNTUNED}
    configs = {name: dataclasses.replace(Config(reduction=name), **settings) for name in UNTUNED}
    for config in configs.values():
        config.check()
    source = PretrainingData()
    for seed in seeds:
        model = _pretrained(runs / "untuned", configs["none"].pretrain_steps, seed, source, tick)
        images, labels, _ = source.batch(TEST_COUNT, torch.Generator().manual_seed(1_000_003 + seed))
        for name, config in configs.items():
            tick(f"untuned, {name}, seed {seed}")
            reduced = reduce_tokens(copy.deepcopy(model), config).eval()
            found[name].append(100 * evaluate(reduced, TensorTask(images, labels)).accuracy)
    return source.source, found


def _pretrained(folder: Path, steps: int, seed: int, source: PretrainingData, tick: Tick) -> nn.Module:
    """The embedded backbone with the head of its pre-training; from the folder, where it was trained before."""
    path = folder / f"{source.source}-{steps}-{seed}.safetensors"
    if not path.is_file():
        tick(f"pre-training, seed {seed}")
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = pretrain.pretrain(steps, seed)[0].state_dict()
        write_atomically(path, safetensors_bytes({name: value.contiguous() for name, value in state.items()}))
    model = pretrain.embedded_backbone(source.num_classes)
    model.load_state_dict(load_file(path))
    return model


def present_tasks(family: str, folder: Path, settings: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Tasks of a family that the folder holds, and why each other one is left out."""
    if family == "vtab1k":
        found = data.check_folder(folder, decode=False)
        wrong = {task: problems[0] for task, problems in found.items() if problems}
        return [task for task in found if task not in wrong], wrong
    present, absent = [], {}
    for task in data.task_names(family):
        try:
            load_data(Config(**({"data": family, "task": task, "data_dir": str(folder)} | settings)))
            present.append(task)
        except (OSError, ValueError) as error:
            absent[task] = str(error)
    return present, absent


def paper_config(
    variant: Variant, family: str, task: str, folder: Path, seed: int, runs: Path, settings: dict[str, Any]
) -> Config:
    """The paper's recipe for one row of a table on one task."""
    spec = MODELS[variant.model]
    where = "" if variant.layer is None else f"-{variant.layer}"
    where += "" if variant.hidden_dim is None else f"-width{variant.hidden_dim}"
    output = runs / variant.model / task / f"{variant.method}-{variant.reduction}{where}-{seed}"
    values = PRESETS["paper"] | {
        "data": family, "task": task, "data_dir": str(folder), "image_size": spec.image_size, "seed": seed,
        "model": f"{spec.timm_name}.{spec.tag}", "method": variant.method, "reduction": variant.reduction,
        "hidden_dim": variant.hidden_dim, "layer": variant.layer, "output": str(output), "progress": False,
    }  # fmt: skip
    return Config(**(values | settings))


def has_scale(method: str) -> bool:
    """Whether a method has a scale s."""
    try:
        AdapterConfig.resolve(method, scale=0.5)
    except ValueError:
        return False
    return True


def on_data(
    variant: Variant, family: str, tasks: Sequence[str], folder: Path, seeds: Sequence[int], runs: Path,
    settings: dict[str, Any], tick: Tick, scales: Sequence[float] = (),
) -> dict[str, list[float]]:  # fmt: skip
    """Test accuracies in percent by task, a value for each seed.

    Args:
        scales: of which the best for each task is found on its validation images (:func:`fpet.train.sweep`), for methods
            that have one; none: the method's own.
    """
    configs = {(t, s): paper_config(variant, family, t, folder, s, runs, settings) for t in tasks for s in seeds}
    for config in configs.values():
        config.check()
    found: dict[str, list[float]] = {task: [] for task in tasks}
    for (task, seed), config in configs.items():
        tick(f"{variant}, {task}, seed {seed}")
        result = sweep(config, scales) if scales and has_scale(variant.method) else train(config)
        found[task].append(100 * (result.accuracy or 0.0))
    return found


def vtab_mean(accuracies: dict[str, float]) -> float:
    """Mean over the three groups of the means within each, as VTAB-1K is averaged; of other tasks the plain mean."""
    groups: dict[str, list[float]] = {}
    for task, value in accuracies.items():
        groups.setdefault(VTAB_TASKS[task].group if task in VTAB_TASKS else "", []).append(value)
    return statistics.fmean(statistics.fmean(values) for values in groups.values())
