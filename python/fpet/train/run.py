"""``fpet train``: tunes a frozen backbone with a PET method and merged tokens; resumes where it was killed.

>>> from fpet.train.config import Config
>>> from fpet.train import train
>>> print(train(Config(output="runs/mine")).table())
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import comparators
from ..adapters import add_adapters
from ..adapters.freezing import count_parameters, freeze, parameter_roles
from ..comparators.ltmp import PENALTY
from ..data import FAMILIES, Splits, batches, epoch_order
from ..files import checkpoint, saving
from ..vit.patch import apply, find_model
from . import pretrain, sharding
from .config import EMBEDDED_MODEL, REDUCTIONS, Config, ConfigError, from_arguments
from .config import add_arguments as add_config_arguments
from .evaluation import evaluate
from .inputs import check_data, load_data

__all__ = ["Result", "add_arguments", "build_model", "compare", "learning_rate", "run", "sweep", "train"]

log = logging.getLogger("fpet")


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        accuracy: on the test set, in [0, 1]; None where it was not asked for. val_accuracy: of the model that was kept, on
            the validation set; None without one. epoch: 0-based, after which that model was kept.
        train_loss: mean over the last epoch. trainable, adapters, refinement, head: numbers of parameters.
        adapter_bytes: of the tuned parameters as stored, head excluded. seconds: spent in training steps.
        backbone: what the backbone is and how it came about. config: of the run.
    """

    config: Config
    accuracy: float | None
    val_accuracy: float | None
    epoch: int
    train_loss: float
    trainable: int
    adapters: int
    refinement: int
    head: int
    adapter_bytes: int
    seconds: float
    backbone: str

    def table(self) -> str:
        """The summary, a line for each thing."""
        c = self.config
        rows = [
            ("task", f"{c.data}/{c.task}, protocol {c.protocol}"),
            ("backbone", self.backbone),
            ("method", c.method),
            (
                "parameters",
                f"{self.adapters:,} of the method, {self.refinement:,} of the refinement, {self.head:,} of the head",
            ),
            ("tokens", f"{c.reduction}: {REDUCTIONS[c.reduction]}"),
            ("stored", f"{self.adapter_bytes / 1024:.1f} KiB without the head"),
            ("training", f"{c.epochs} epochs in {self.seconds:.0f} s, last loss {self.train_loss:.4f}"),
        ]
        if self.val_accuracy is not None:
            rows.append(("validation", f"{100 * self.val_accuracy:.2f} %, best after epoch {self.epoch + 1}"))
        if self.accuracy is not None:
            rows.append(("test accuracy", f"{100 * self.accuracy:.2f} %"))
        rows.append(("folder", c.output))
        return "\n".join(f"{name:<14} {value}" for name, value in rows)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


# --- parts of a run ------------------------------------------------------------------------------------------------------


def learning_rate(config: Config, epoch: float) -> float:
    """At a point of training in epochs: linear from warmup_lr to lr over the warm-up, then a cosine down to min_lr."""
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    done = min(1.0, (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def pick_device(config: Config) -> torch.device:
    """The device of this process: the local rank's GPU under a launcher."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _backbone(config: Config, num_classes: int) -> nn.Module:
    """With weights and a fresh head."""
    if config.model == EMBEDDED_MODEL:
        return pretrain.load_backbone(_embedded_weights(config), num_classes, config.drop_path)
    load = config.pretrained and config.weights is None
    model = _create(config, num_classes, load)
    if config.weights is not None and config.weights.endswith(".npz"):
        model.load_pretrained(config.weights)  # published JAX weights; timm leaves out a head of another size
    elif config.weights is not None:
        state = timm.models.load_state_dict(config.weights, use_ema=False)
        own = model.state_dict()
        state = {n: v for n, v in state.items() if not n.startswith("head") or (n in own and own[n].shape == v.shape)}
        missing, extra = model.load_state_dict(state, strict=False)
        if extra or any(not name.startswith("head") for name in missing):
            raise ValueError(f"weights: {config.weights} lacks {missing} and has {extra} besides what {config.model} takes")
    return model


def _create(config: Config, num_classes: int, pretrained: bool) -> Any:
    return timm.create_model(
        config.model, pretrained=pretrained, num_classes=num_classes, drop_path_rate=config.drop_path,
        img_size=config.image_size,
    )  # fmt: skip


def _embedded_weights(config: Config) -> Path:
    return Path(config.weights) if config.weights is not None else Path(config.output) / "backbone.safetensors"


def _prepare(model: nn.Module, config: Config) -> nn.Module:
    """Adapters, the reduction of tokens, and what is trained."""
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    add_adapters(
        model, config.method, hidden_dim=config.hidden_dim, scale=config.scale, bits=config.bits, dropout=config.dropout
    )
    return freeze_for(reduce_tokens(model, config), config)


def reduce_tokens(model: nn.Module, config: Config) -> nn.Module:
    """Switches on ``config.reduction``; a refinement that is there stays."""
    refinement = {"dropout": config.refinement_dropout}
    depth = len(find_model(model).blocks)  # type: ignore[arg-type]
    layer = depth // 2 if config.layer is None else config.layer
    if layer >= depth:
        raise ConfigError(f"layer: expected a block index in range({depth}), got {layer}")
    if config.reduction == "fpet":
        has = getattr(find_model(model).blocks[layer], "refinement", None) is not None  # type: ignore[index]
        return apply(model, layer, refinement=None if has else refinement)
    return comparators.apply(
        model, config.reduction, layer, r=config.tome_r, refinement=refinement, target=config.ltmp_target
    )  # fmt: skip


def freeze_for(model: nn.Module, config: Config) -> nn.Module:
    """:func:`fpet.freeze`, and the refinement too where ``config.refine`` is off."""
    freeze(model)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] == "refinement" and not config.refine:
            parameter.requires_grad_(False)
    return model


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The backbone with pre-trained weights, a fresh head, adapters and reduction of tokens; what is not tuned is frozen.

    The embedded backbone has to be pre-trained already: ``config.weights``, or ``backbone.safetensors`` in ``config.output``.
    """
    return _prepare(_backbone(config, num_classes), config)


def load_tuned(config: Config, num_classes: int) -> nn.Module:
    """The model that a finished run left in its folder, reducing tokens as ``config`` says."""
    model = saving.load(_backbone(config, num_classes), Path(config.output) / "model.safetensors")
    if config.reduction == "none":
        return apply(model, None, refinement=False)
    if config.reduction in ("fpet", "fpet-no-stop"):
        blocks: Any = model.blocks
        refinements = {i: block.refinement for i, block in enumerate(blocks) if getattr(block, "refinement", None) is not None}
        reduce_tokens(model, config)
        for i, module in refinements.items():
            blocks[i].refinement = module
        return model
    return reduce_tokens(model, config)


def _rehearse(config: Config) -> None:
    """Whatever is wrong with model, layer, method and reduction shows on a model without weights."""
    try:
        if config.model == EMBEDDED_MODEL:
            with torch.random.fork_rng(devices=[]):
                _prepare(pretrain.embedded_backbone(2, config.drop_path), config)
            return
        if not timm.is_model(config.model):
            raise ConfigError(f"model: expected {EMBEDDED_MODEL!r} or a model that timm knows, got {config.model!r}")
        with torch.device("meta"):
            reduce_tokens(_create(config, 2, pretrained=False), config)
    except ConfigError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(str(error)) from error


def _check_counts(config: Config, splits: Splits) -> None:
    if len(splits.train) < config.batch_size:
        raise ConfigError(f"batch_size: expected at most the {len(splits.train)} training images, got {config.batch_size}")


# --- the process group -----------------------------------------------------------------------------------------------------


@contextmanager
def _process_group(config: Config) -> Iterator[tuple[int, int]]:
    """(rank, world size). Joins the group that a launcher such as torchrun has set the environment for."""
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = pick_device(config)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield dist.get_rank(), dist.get_world_size()
        finally:
            dist.destroy_process_group()
    else:
        yield 0, 1


def _gather(value: Any, world: int) -> list[Any]:
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _first_decides(value: Any, world: int) -> Any:
    """The value that process 0 has."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


# --- training --------------------------------------------------------------------------------------------------------------


def train(config: Config, *, test: bool = True, on_step: Callable[[int], None] | None = None) -> Result:
    """Runs ``config`` to its end, or from its newest checkpoint to its end, and leaves in ``config.output``:

    config.json, checkpoints (``step-*.ckpt``), log.csv, and at the end model.safetensors (see :func:`fpet.load`) and
    result.json. Killed at any moment and started again, it ends with the same weights: parameters, optimiser, order of the
    images and random generators all go on from where they were.

    Args:
        test: evaluate on the test set at the end. on_step: called with the number of steps done, after each.

    Raises:
        ConfigError: a setting that can't be, or another run's folder; before any work. RuntimeError: the loss is not finite.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    config.check(world_size=world)
    _rehearse(config)
    splits = load_data(config)
    _check_counts(config, splits)
    with _process_group(config) as (rank, world):
        return _Run(config, splits, rank, world, on_step).go(test)


class _Run:
    """One process's part of a run."""

    def __init__(
        self, config: Config, splits: Splits, rank: int, world: int, on_step: Callable[[int], None] | None
    ) -> None:  # fmt: skip
        self.config, self.splits, self.rank, self.world, self.on_step = config, splits, rank, world, on_step
        self.folder = Path(config.output)
        self.device = pick_device(config)
        # Where training stands.
        self.epoch = self.step_in_epoch = 0
        self.sums = [0.0, 0.0, 0.0]  # loss, right answers, images of this epoch and process
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self.seconds = 0.0
        self.steps_per_epoch = len(splits.train) // config.batch_size

    def go(self, test: bool) -> Result:
        self._claim_folder()
        backbone = self._ensure_backbone()
        torch.manual_seed(self.config.seed)
        self.model = build_model(self.config, self.splits.num_classes).to(self.device)
        self.target = comparators.flops_target(self.model)
        self.backbone_hash = saving.backbone_hash(self.model)
        self.sharded = self.world > 1 and self.config.parallel == "fsdp"
        if self.sharded:
            sharding.shard(self.model, self.device)
        self.tuned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.tuned.values(), lr=self.config.warmup_lr, weight_decay=self.config.weight_decay)
        torch.manual_seed((self.config.seed + 1) * 1_000_003 + self.rank)  # dropout differs between processes
        self._resume()
        self._train()
        return self._finish(test, backbone)

    @property
    def step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    # --- before -----------------------------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """Refuses a folder that belongs to another run; writes config.json into a new one."""
        path, refusal = self.folder / "config.json", None
        if self.rank == 0:
            if path.is_file():
                different = Config.from_json(path.read_text()).differences(self.config)
                if different:
                    refusal = f"output: {self.folder} holds a run with other settings ({'; '.join(different)}); choose another"
                elif not self.config.resume and checkpoint.checkpoints(self.folder):
                    refusal = f"output: {self.folder} holds checkpoints, and resume is off; choose another or remove them"
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                checkpoint.write_atomically(path, self.config.to_json().encode())
        refusal = _first_decides(refusal, self.world)
        if refusal is not None:
            raise ConfigError(refusal)

    def _ensure_backbone(self) -> str:
        """Pre-trains the embedded backbone where that was not done. What the backbone is, in words."""
        config = self.config
        if config.model != EMBEDDED_MODEL:
            source = config.weights or ("timm's weights" if config.pretrained else "random weights")
            return f"{config.model}, {source}"
        words, note = f"embedded, {config.weights}", self.folder / "backbone.txt"
        if config.weights is None:
            if self.rank == 0 and not (_embedded_weights(config).is_file() and note.is_file()):
                start = time.perf_counter()
                with tqdm(total=config.pretrain_steps, desc="pre-training", disable=None if config.progress else True) as bar:

                    def report(step: int, loss: float, accuracy: float) -> None:
                        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
                        bar.update()

                    model, source, accuracy = pretrain.pretrain(config.pretrain_steps, report=report)
                pretrain.save_backbone(model, _embedded_weights(config))
                seconds = time.perf_counter() - start
                text = f"embedded, pre-trained on {source} in {seconds:.0f} s, accuracy {100 * accuracy:.1f} %"
                checkpoint.write_atomically(note, text.encode())
            if self.world > 1:
                dist.barrier()
            words = note.read_text()
        return words

    def _resume(self) -> None:
        found = None
        if self.rank == 0 and self.config.resume:
            found = checkpoint.load_newest(self.folder)
        state = _first_decides(None if found is None else found[1], self.world)
        if state is None:
            return
        if state["backbone"] != self.backbone_hash:
            raise ConfigError(f"output: the run in {self.folder} was on another backbone; choose another folder")
        for name, parameter in self.tuned.items():
            sharding.assign(parameter, state["tuned"][name])
        self.optimizer.load_state_dict(
            sharding.distributed_optimizer_state(state["optimizer"], list(self.tuned.values()))
        )  # fmt: skip
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.history, self.best, self.seconds = state["history"], state["best"], state["seconds"]
        if len(state["rng"]) == self.world:
            self.sums = state["sums"][self.rank]
            checkpoint.restore_rng(state["rng"][self.rank])
        else:
            if self.rank == 0:
                self.sums = [sum(column) for column in zip(*state["sums"], strict=True)]
            warnings.warn(
                f"resumed with {self.world} processes instead of {len(state['rng'])}: dropout is not that of an unbroken run",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        log.info("resumed at epoch %d, step %d", self.epoch + 1, self.step)

    # --- during -----------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        config = self.config
        network: Any = self.model
        if self.world > 1 and not self.sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # After a merge in the last block nothing reads the patches, and the refinement gets no gradient.
            network = DistributedDataParallel(self.model, device_ids=ids, find_unused_parameters=True)
        if config.compile:
            network = torch.compile(network)
        writer = self._tensorboard()
        bar = tqdm(
            total=config.epochs * self.steps_per_epoch, initial=self.step, desc="tuning",
            disable=None if config.progress and self.rank == 0 else True,
        )  # fmt: skip
        with bar:
            while self.epoch < config.epochs:
                self.model.train()
                for batch in self._batches():
                    start = time.perf_counter()
                    loss = self._step(network, *batch)
                    self.seconds += time.perf_counter() - start
                    bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                    if (
                        config.checkpoint_steps is not None
                        and self.step_in_epoch < self.steps_per_epoch
                        and self.step % config.checkpoint_steps == 0
                    ):
                        self._checkpoint()
                    if self.on_step is not None:
                        self.on_step(self.step)
                self._end_epoch(writer)
        if writer is not None:
            writer.close()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the batches of the epoch that are left."""
        config, steps = self.config, self.steps_per_epoch
        order = epoch_order(len(self.splits.train), config.seed, self.epoch)[: steps * config.batch_size]
        share = order.view(steps, self.world, -1)[self.step_in_epoch :, self.rank].tolist()
        return batches(self.splits.train, share, workers=config.workers, device=self.device)

    def _step(self, network: Any, images: Tensor, labels: Tensor) -> float:
        config = self.config
        rate = learning_rate(config, self.epoch + self.step_in_epoch / self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = config.accumulate
        total = torch.zeros(2, device=self.device)
        for i, (part, truth) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            waits = self.world > 1 and i + 1 < parts and not config.compile
            if self.sharded:
                sharding.synchronize(network, not waits)
            with network.no_sync() if waits and not self.sharded else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
                    scores, flops = (network(part), None) if self.target is None else network(part, with_flops=True)
                loss = F.cross_entropy(scores.float(), truth)
                if flops is not None:
                    loss = loss + PENALTY * (flops - self.target) ** 2
                (loss / parts).backward()
            total += torch.stack((loss.detach() / parts, (scores.detach().argmax(1) == truth).sum().float()))
        value, right = total.tolist()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {self.step}; a smaller lr may help ({self.config.lr})")
        self.optimizer.step()
        count = len(labels)
        self.sums = [self.sums[0] + value * count, self.sums[1] + right, self.sums[2] + count]
        self.step_in_epoch += 1
        return value

    def _end_epoch(self, writer: Any) -> None:
        config = self.config
        loss, right, count = (sum(column) for column in zip(*_gather(self.sums, self.world), strict=True))
        row = {
            "epoch": self.epoch, "step": self.step,
            "lr": learning_rate(config, self.epoch + (self.step_in_epoch - 1) / self.steps_per_epoch),
            "train_loss": loss / count, "train_accuracy": right / count, "seconds": self.seconds,
        }  # fmt: skip
        if self.splits.val is not None:
            score = self._evaluate(self.splits.val)
            row |= {"val_loss": score.loss, "val_accuracy": score.accuracy}
            if self.best is None or score.accuracy > self.best["accuracy"]:
                kept = {name: value.cpu().clone() for name, value in self._tuned().items()}
                self.best = {"accuracy": score.accuracy, "epoch": self.epoch, "tuned": kept}
        self.history.append(row)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
        if self.epoch % config.checkpoint_epochs == 0 or self.epoch == config.epochs:
            self._checkpoint()
        if writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    writer.add_scalar(name, value, row["step"])

    def _checkpoint(self) -> None:
        """A disk that is full costs this checkpoint, not the run or the earlier ones."""
        states = _gather((checkpoint.remember_rng(), self.sums), self.world)
        tuned, optimizer = self._tuned(), sharding.full_optimizer_state(self.optimizer)
        if self.rank != 0:
            return
        state = {
            "backbone": self.backbone_hash, "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
            "tuned": tuned, "optimizer": optimizer,
            "rng": [rng for rng, _ in states], "sums": [sums for _, sums in states], "history": self.history,
            "best": self.best, "seconds": self.seconds,
        }  # fmt: skip
        try:
            checkpoint.write(self.folder, self.step, state, self.config.keep_checkpoints)
            checkpoint.write_atomically(self.folder / "log.csv", _as_csv(self.history).encode())
        except OSError as error:
            warnings.warn(
                f"no checkpoint at step {self.step}: {error}; earlier ones stay, training goes on", RuntimeWarning, stacklevel=2
            )

    def _tuned(self) -> dict[str, Tensor]:
        """What is tuned, whole; every process has to ask for it."""
        return {name: sharding.full(p) for name, p in self.tuned.items()}

    def _evaluate(self, dataset: Any) -> Any:
        config = self.config
        return evaluate(
            self.model, dataset, batch_size=config.eval_batch_size, device=self.device, amp=config.amp, workers=config.workers,
            progress=config.progress,
        )  # fmt: skip

    def _tensorboard(self) -> Any:
        if self.config.logger != "tensorboard" or self.rank != 0:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    # --- after ------------------------------------------------------------------------------------------------------------

    def _finish(self, test: bool, backbone: str) -> Result:
        if self.best is not None:
            for name, parameter in self.tuned.items():
                sharding.assign(parameter, self.best["tuned"][name])
        accuracy = self._evaluate(self.splits.test).accuracy if test else None
        counts = count_parameters(self.model)
        result = Result(
            config=self.config, accuracy=accuracy, val_accuracy=None if self.best is None else self.best["accuracy"],
            epoch=self.config.epochs - 1 if self.best is None else self.best["epoch"],
            train_loss=self.history[-1]["train_loss"], trainable=counts.trainable, adapters=counts.adapters,
            refinement=counts.refinement, head=counts.head, adapter_bytes=counts.adapter_bytes, seconds=self.seconds,
            backbone=backbone,
        )  # fmt: skip
        tuned = self._tuned()
        if self.rank == 0:
            model = self.model
            if self.sharded:  # files are written from a model with whole parameters
                model = build_model(self.config, self.splits.num_classes)
                model.load_state_dict(tuned, strict=False)
            saving.save(model, self.folder / "model.safetensors")
            checkpoint.write_atomically(self.folder / "result.json", result.to_json().encode())
        return result


def _as_csv(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


# --- several runs ----------------------------------------------------------------------------------------------------------


def _shared_backbone(config: Config) -> Config:
    """With the embedded backbone pre-trained once, for all runs below ``config.output``."""
    if config.model != EMBEDDED_MODEL or config.weights is not None:
        return config
    config.check()
    path = Path(config.output) / "backbone.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("pre-training the embedded backbone, %d steps", config.pretrain_steps)
        pretrain.save_backbone(pretrain.pretrain(config.pretrain_steps)[0], path)
    return dataclasses.replace(config, weights=str(path))


def sweep(config: Config, scales: Sequence[float]) -> Result:
    """Tries each per-task scale s and returns the run with the best one; the test set has no part in the choice.

    Each s is trained with the honest protocol, without test, into ``OUTPUT/s-…``; the best on the validation set wins (the
    smallest s of equals). With the honest protocol that model is then tested; with the paper's, it is trained anew on
    training and validation images together, into ``OUTPUT/chosen``, and tested.
    """
    config = _shared_backbone(config)
    honest = dataclasses.replace(config, protocol="honest")
    trials = {s: dataclasses.replace(honest, scale=s, output=f"{config.output}/s-{s:g}") for s in sorted(scales)}
    for trial in trials.values():
        trial.check()
    found = {s: train(trial, test=False).val_accuracy or 0.0 for s, trial in trials.items()}
    for s, accuracy in found.items():
        log.info("s = %g: %.2f %% on validation", s, 100 * accuracy)
    best = max(found, key=lambda s: found[s])
    if config.protocol == "honest":
        return train(trials[best])
    return train(dataclasses.replace(config, scale=best, output=f"{config.output}/chosen"))


def compare(config: Config, reductions: Sequence[str], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Test accuracy of each reduction for each seed, on the same backbone and data; runs in ``OUTPUT/REDUCTION-SEED``."""
    config = _shared_backbone(config)
    runs = {
        name: [dataclasses.replace(config, reduction=name, seed=s, output=f"{config.output}/{name}-{s}") for s in seeds]
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


# --- command line ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet train``: every field of Config, and runs of several."""
    add_config_arguments(parser)
    parser.add_argument("--sweep-scale", metavar="S,S,…", help="try each scale s on validation images, keep the best")
    parser.add_argument("--compare", metavar="NAME,NAME,…", help="train with each of several reductions")
    parser.add_argument("--seeds", metavar="N,N,…", default="0", help="seeds for --compare (default: 0)")
    parser.add_argument("--check-data", action="store_true", help="only say what is missing or damaged in the data")


def _numbers(text: str, kind: Callable[[str], Any], flag: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag}: expected numbers separated by commas, got {text!r}") from error


def _check_data(config: Config) -> int:
    if FAMILIES[config.data].place and config.data_dir is None:
        raise ConfigError(f"--check-data: expected --data-dir with the place of {config.data}")
    found = check_data(config)
    for task, wrong in found.items():
        print(f"{task:<22} {'complete' if not wrong else f'{len(wrong)} problems'}")
        for line in wrong:
            print(f"  {line}")
    return 1 if any(found.values()) else 0


def run(args: argparse.Namespace) -> int:
    """Trains and prints the summary; 1 where ``--check-data`` found something."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = from_arguments(args)
    if args.check_data:
        return _check_data(config)
    if args.compare is not None:
        names = args.compare.split(",")
        if unknown := [name for name in names if name not in REDUCTIONS]:
            raise ConfigError(f"--compare: expected some of {', '.join(REDUCTIONS)}, got {', '.join(unknown)}")
        text = comparison_table(compare(config, names, _numbers(args.seeds, int, "--seeds")))
    elif args.sweep_scale is not None:
        text = sweep(config, _numbers(args.sweep_scale, float, "--sweep-scale")).table()
    else:
        text = train(config).table()
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)
    return 0
