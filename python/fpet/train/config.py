"""Everything a run depends on, in one place: :class:`Config`; checked before any work starts."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import METHODS, AdapterConfig
from ..comparators import REDUCTIONS
from ..data import FAMILIES, task_names
from .folder import unwritable

__all__ = ["PRESETS", "REDUCTIONS", "Config", "ConfigError", "add_arguments", "from_arguments", "nearest"]

EMBEDDED_MODEL = "embedded"
OWN_DATA = ("folder", "csv", "huggingface")
"""Families of images of one's own, for which nothing was published to compare with."""


class ConfigError(ValueError):
    """A setting that can't be, found before any work; one line for each."""


def _option(default: Any, text: str, choices: Collection[str] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the embedded task, which needs no file and takes a few minutes on two cores.

    :func:`fpet.train.train` calls :meth:`check` first. Fields in ``FREE`` may differ between a run and its resumption.
    """

    data: str = _option("shapes", "family of data sets", tuple(FAMILIES))
    task: str = _option("orientation", "task of the family, such as location or cifar (shapes, vtab1k, torchvision, fgvc)")
    data_dir: str | None = _option(None, "folder of the data; csv: the file; huggingface: a folder or a name on the Hub")
    image_size: int | None = _option(None, "side of the images the model sees; none: the model's own")
    resize: str = _option("model", "model: resized and cropped as the model's configuration says; square: squashed to a square", ("model", "square"))  # fmt: skip  # noqa: E501
    normalize: str = _option("model", "mean and standard deviation of images in [0, 1]; model: the model's own", ("model", "none", "imagenet", "half"))  # fmt: skip  # noqa: E501
    val_fraction: float = _option(0.1, "of each class's training images, held out where there are no validation images")
    test_fraction: float = _option(0.2, "of each class's images, held out where there are no test images")
    split_seed: int = _option(0, "of what is held out")
    damaged: str = _option("error", "images that can't be read: stop, or leave them out and name them", ("error", "skip"))
    multi_label: bool = _option(False, "images have any number of labels (csv: separated by |)")
    train_count: int = _option(1000, "drawn images for training and validation together (shapes)")
    test_count: int = _option(1000, "drawn images for the test (shapes)")

    augment: str | None = _option(None, "training images: none, flips (random crops and flips), or timm's, such as rand-m9-mstd0.5; not given: flips for images of one's own")  # fmt: skip  # noqa: E501
    random_erasing: float = _option(0.0, "probability of erasing a rectangle of a training image")
    mixup: float = _option(0.0, "alpha of mixup; 0: none")
    cutmix: float = _option(0.0, "alpha of cutmix; 0: none")
    label_smoothing: float = _option(0.0, "part of the target that is shared by all classes")
    class_weights: bool = _option(False, "weigh the loss of each class by the inverse of its number of training images")
    balanced_sampling: bool = _option(False, "draw training images so that every class comes equally often")

    shots: int = _option(16, "training images a class (fgvc)")
    list_seed: int = _option(0, "which published draw of them (fgvc)")

    model: str = _option(EMBEDDED_MODEL, "timm's name of the backbone, or 'embedded' for a tiny one pre-trained here")
    weights: str | None = _option(None, "file with the backbone's weights; none: timm's pre-trained ones")
    keep_backbone: bool = _option(
        True, "write the frozen weights into the folder where they are not timm's, so that it can be moved"
    )
    pretrained: bool = _option(True, "load pre-trained weights; without, the backbone is random")
    pretrain_steps: int = _option(600, "steps of 48 images in which the embedded backbone is pre-trained")

    method: str = _option("bi-adaptformer", "tuning method", METHODS)
    hidden_dim: int | None = _option(None, "width of its bottleneck; none: the method's own")
    scale: float | None = _option(None, "s, what the method's output is multiplied by; none: the method's own")
    bits: int | None = _option(None, "of the method's weights; none: the method's own")
    dropout: float | None = _option(None, "in the method; none: its own")

    reduction: str = _option("fpet", "what becomes of the tokens", REDUCTIONS)
    layer: int | None = _option(None, "0-based block that merges; none: the middle one")
    tome_r: int = _option(8, "pairs that ToMe merges in each block")
    ltmp_target: float | None = _option(None, "part of the blocks' FLOPs that LTMP learns to spend; none: what fpet spends")
    refinement_dropout: float = _option(0.1, "in the refinement of the keys")
    refine: bool = _option(True, "train the refinement of the keys; without, it stays as initialised")

    epochs: int = _option(20, "passes over the training images")
    batch_size: int = _option(64, "images per step, over all processes and accumulated parts")
    lr: float | None = _option(None, "peak learning rate of AdamW; not given: 0.001, for the embedded model 0.01")
    weight_decay: float = _option(1e-4, "of AdamW")
    warmup_epochs: float | None = _option(None, "epochs of linear warm-up; not given: a tenth of all")
    warmup_lr: float = _option(1e-6, "learning rate at the start")
    min_lr: float = _option(1e-5, "learning rate at the end")
    drop_path: float = _option(0.0, "probability of leaving out a branch in the last block, rising linearly from 0")
    seed: int = _option(0, "of initialisation, order of the images and dropout")

    protocol: str | None = _option(None, "paper: train on train and val, test at the end; honest: pick the model on val; not given: honest for images of one's own", ("paper", "honest"))  # fmt: skip  # noqa: E501
    eval_batch_size: int = _option(256, "images per step in evaluation")

    device: str = _option("auto", "cpu, cuda, or auto")
    amp: bool = _option(False, "bfloat16 autocast")
    accumulate: int = _option(1, "parts in which a process goes through its share of a batch")
    grad_checkpointing: bool = _option(False, "recompute blocks in the backward pass to save memory")
    compile: bool = _option(False, "torch.compile")
    parallel: str = _option("ddp", "with several processes: ddp, a copy of the model in each; fsdp, its parameters shared out", ("ddp", "fsdp"))  # fmt: skip  # noqa: E501
    workers: int = _option(0, "processes that read images")

    output: str = _option("runs/default", "folder of the run")
    checkpoint_epochs: int = _option(1, "epochs between checkpoints")
    checkpoint_steps: int | None = _option(None, "steps between further checkpoints within an epoch")
    keep_checkpoints: int = _option(2, "how many of the newest checkpoints stay")
    resume: bool = _option(True, "go on where the folder's newest checkpoint was written; without, it must hold none")
    pictures: bool = _option(True, "draw curves and confusion matrix at the end (needs matplotlib)")
    logger: str = _option("csv", "where numbers go besides the screen", ("csv", "tensorboard"))
    progress: bool = _option(True, "progress bars")

    FREE = (
        "data_dir", "device", "workers", "output", "checkpoint_epochs", "checkpoint_steps", "keep_checkpoints", "resume",
        "logger", "progress", "eval_batch_size", "parallel", "pictures",
    )  # fmt: skip

    def check(self, *, world_size: int = 1, for_reading: bool = False, with_data: bool = True) -> None:
        """Raises :class:`ConfigError` with every setting that can't be; needs no data and no model.

        Args:
            world_size: number of processes. for_reading: nothing is going to be written, so ``output`` may be read-only.
            with_data: the data is what the settings name.
        """
        wrong: list[str] = []

        def expect(holds: bool, name: str, expected: str) -> None:
            if not holds:
                wrong.append(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        for f in dataclasses.fields(self):
            kind, _, optional = str(f.type).partition(" | ")
            value = getattr(self, f.name)
            types: tuple[type, ...] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[kind]
            good = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
            expect(good or (bool(optional) and value is None), f.name, kind + (" or None" if optional else ""))
            if good and f.metadata["choices"] and value not in f.metadata["choices"]:
                wrong.append(_no_choice(f.name, value, f.metadata["choices"]))
        if wrong:
            raise ConfigError("\n".join(wrong))

        for name in (
            "train_count", "test_count", "epochs", "batch_size", "eval_batch_size", "accumulate",
            "checkpoint_epochs", "keep_checkpoints", "pretrain_steps", "tome_r",
        ):  # fmt: skip
            expect(getattr(self, name) >= 1, name, "at least 1")
        for name in ("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "mixup", "cutmix"):
            value = getattr(self, name)
            expect(value is None or 0 <= value < math.inf, name, "a finite number of at least 0")
        for name in ("drop_path", "refinement_dropout", "random_erasing", "label_smoothing"):
            expect(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        expect(
            self.warmup_epochs is None or self.warmup_epochs < self.epochs,
            "warmup_epochs",
            f"less than the {self.epochs} epochs",
        )
        expect(self.image_size is None or self.image_size >= 1, "image_size", "at least 1")
        self._check_targets(expect)
        expect(self.seed >= 0, "seed", "at least 0")
        expect(self.workers >= 0, "workers", "at least 0")
        expect(self.checkpoint_steps is None or self.checkpoint_steps >= 1, "checkpoint_steps", "at least 1 or None")
        expect(self.layer is None or self.layer >= 0, "layer", "at least 0 or None")
        expect(self.ltmp_target is None or 0 < self.ltmp_target <= 1, "ltmp_target", "a part of the FLOPs in (0, 1] or None")
        expect(self.train_count >= 10, "train_count", "at least 10")
        parts = world_size * self.accumulate
        expect(self.batch_size % parts == 0, "batch_size", f"a multiple of {world_size} processes × {self.accumulate} parts")
        expect(not (self.compile and self.parallel == "fsdp"), "compile", "False with parallel='fsdp'")
        if self.data in FAMILIES and with_data:
            names, place = task_names(self.data), FAMILIES[self.data].place
            if names and self.task not in names:
                wrong.append(_no_choice("task", self.task, names, f" for {self.data}"))
            given = Path(self.data_dir or "")
            if place == "folder":
                expect(self.data_dir is not None and given.is_dir(), "data_dir", f"the folder of {self.data}")
            elif place == "file":
                expect(self.data_dir is not None and given.is_file(), "data_dir", f"the {self.data} file")
            elif place == "name":
                expect(bool(self.data_dir), "data_dir", "a folder, or a name on the Hub")
        for name in ("val_fraction", "test_fraction"):
            expect(0 < getattr(self, name) < 1, name, "a fraction in (0, 1)")
        if self.model == EMBEDDED_MODEL:
            expect(self.image_size in (None, 32), "image_size", "32 for the embedded model")
        if self.weights is not None:
            expect(Path(self.weights).is_file(), "weights", "a file")
        if self.pictures and importlib.util.find_spec("matplotlib") is None:
            wrong.append("pictures: needs the package matplotlib, which is not installed; --no-pictures goes without")
        if self.logger == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            wrong.append("logger: 'tensorboard' needs the package tensorboard, which is not installed")
        if self.device not in ("auto", "cpu", "cuda"):
            wrong.append(f"device: expected 'auto', 'cpu' or 'cuda', got {self.device!r}")
        elif self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                wrong.append("device: 'cuda' asked for, and torch sees no CUDA device")
        try:
            AdapterConfig.resolve(self.method, self.hidden_dim, self.scale, self.bits, self.dropout)
        except ValueError as error:
            wrong.append(f"{error} (method {self.method!r})")
        if self.model != EMBEDDED_MODEL and (reason := unknown_model(self.model)) is not None:
            wrong.append(reason)
        if for_reading:
            if wrong:
                raise ConfigError("\n".join(wrong))
            return
        if (reason := unwritable(Path(self.output))) is not None:
            wrong.append(reason)
        if wrong:
            raise ConfigError("\n".join(wrong))

    def _check_targets(self, expect: Callable[[bool, str, str], None]) -> None:
        if self.data == "shapes":
            for name in ("augment", "random_erasing"):
                expect(getattr(self, name) in (None, "none", 0), name, "none for shapes, which are drawn and not read")
        if self.multi_label:
            for name in ("mixup", "cutmix", "label_smoothing"):
                expect(getattr(self, name) == 0, name, "0 with multi_label")
            expect(not self.balanced_sampling, "balanced_sampling", "False with multi_label, where class_weights does that")
        if self.mixup or self.cutmix:
            expect(self.batch_size % 2 == 0, "batch_size", "an even number with mixup or cutmix")
        expect(not (self.class_weights and self.balanced_sampling), "class_weights", "False with balanced_sampling")

    def settings(self) -> dict[str, Any]:
        """All but ``output``: a run may be moved."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "output"}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Raises :class:`ConfigError` where the text is damaged or names a field there is not."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config: expected what Config.to_json wrote, got {text[:40]!r}…: {error}") from error


def _no_choice(name: str, value: str, choices: Iterable[str], where: str = "") -> str:
    return f"{name}: expected one of {', '.join(choices)}{where}, got {value!r}{nearest(value, choices)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """For the end of a message: what was probably meant."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def unknown_model(name: str) -> str | None:
    """Why a model can't be tuned, as far as its name tells; None where nothing does."""
    import timm

    if timm.is_model(name):
        return None
    if name in _TORCHVISIONS:
        return f"model: {name!r} is torchvision's, whose blocks can't merge; timm's of the same kind is {_TORCHVISIONS[name]!r}"
    return f"model: expected {EMBEDDED_MODEL!r} or a model that timm knows, got {name!r}{nearest(name, timm.list_models())}"


_TORCHVISIONS = {
    "vit_b_16": "vit_base_patch16_224", "vit_b_32": "vit_base_patch32_224", "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224", "vit_h_14": "vit_huge_patch14_224",
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "data": "vtab1k", "task": "cifar", "image_size": 224, "model": "vit_base_patch16_224.augreg_in21k",
        "resize": "square", "augment": "none", "protocol": "paper",
        "method": "bi-adaptformer", "layer": 6, "epochs": 100, "lr": 1e-3, "weight_decay": 1e-4,
        "warmup_lr": 1e-6, "min_lr": 1e-5, "drop_path": 0.1, "batch_size": 64, "normalize": "none", "output": "runs/paper",
        "workers": 4,
    },
}  # fmt: skip
"""Settings by name; "paper" is the recipe of Table A8: AdamW, 100 epochs, cosine with 10 warm-up epochs, no normalisation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for every field, and ``--preset``. What is not given is left to the preset, then to the defaults."""
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default", help="settings to start from")
    for f in dataclasses.fields(Config):
        kind = str(f.type).partition(" | ")[0]
        default = "" if f.default is None else f" (default: {f.default})"
        text = f"{f.metadata['help']}{default}".replace("%", "%%")
        flag = f"--{f.name.replace('_', '-')}"
        if kind == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            convert = {"str": str, "int": int, "float": float}[kind]
            parser.add_argument(flag, type=convert, choices=f.metadata["choices"], default=None, help=text)


def from_arguments(arguments: argparse.Namespace) -> Config:
    """The configuration that :func:`add_arguments`' options describe; not checked yet."""
    names = {f.name for f in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return Config(**(PRESETS[arguments.preset] | given))
