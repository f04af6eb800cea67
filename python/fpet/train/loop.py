"""The training loop: steps, parts of a batch, processes, checkpoints and resuming, whatever is trained.

A :class:`Task` says what is trained and how its loss comes about, a :class:`Plan` how training goes, :class:`Loop` does it.
Killed at any moment and started again, a run ends with the same weights: parameters, optimiser, order of the items and random
generators go on from where they were.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import epoch_order
from ..files import checkpoint
from ..files.atomic import write_atomically
from . import sharding
from .processes import first_decides, gather, place
from .progress import Progress

__all__ = ["Loop", "Moment", "Plan", "Task"]

log = logging.getLogger("fpet")


class Moment(NamedTuple):
    """Where training stands. Attributes: epoch, step in it (both 0-based), steps of an epoch."""

    epoch: int
    step: int
    steps: int

    @property
    def total(self) -> int:
        """Steps done since the start."""
        return self.epoch * self.steps + self.step

    @property
    def epochs(self) -> float:
        """The same in epochs."""
        return self.epoch + self.step / self.steps


@dataclass(frozen=True)
class Plan:
    """How training goes.

    Attributes:
        epochs. batch_size: items of a step, of all processes and parts together; what does not fill a batch is left out.
        rate: AdamW's learning rate at a point of training in epochs. weight_decay: AdamW's.
        seed: of the items' order and of what is drawn in training. accumulate: parts in which a process goes through its share.
        amp: bfloat16 autocast. compile: torch.compile. sharded: with several processes FSDP2, not DDP.
        checkpoint_epochs, checkpoint_steps: between checkpoints. keep_checkpoints: how many stay. resume: from the newest.
        progress: whether anything is said. tensorboard: whether rows go there too.
    """

    epochs: int
    batch_size: int
    rate: Callable[[float], float]
    weight_decay: float
    seed: int
    accumulate: int = 1
    amp: bool = False
    compile: bool = False
    sharded: bool = False
    checkpoint_epochs: int = 1
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    resume: bool = True
    progress: bool = False
    tensorboard: bool = False


class Task:
    """What is trained.

    Attributes:
        model: on its device; what of it requires a gradient is tuned. network: what :meth:`loss` calls; copies of it in several
            processes are kept together. items: in an epoch. columns: what a row of the log has of the training, by name.
        identity: a checksum of what stays as it is; a checkpoint of another is refused.
    """

    model: nn.Module
    network: nn.Module
    items: int
    columns: tuple[str, ...]
    identity: str

    def order(self, seed: int, epoch: int) -> Tensor:
        """In which items come, (items,); it depends on nothing but seed and epoch."""
        return epoch_order(self.items, seed, epoch)

    def feed(self, batches: list[list[int]], share: slice, epoch: int) -> Iterator[Any]:
        """This process's share of each of ``batches``, which are lists of items."""
        raise NotImplementedError

    def parts(self, batch: Any, count: int) -> Iterable[Any]:
        """A share in ``count`` parts that are gone through one after the other."""
        raise NotImplementedError

    def loss(self, network: nn.Module, part: Any, at: Moment) -> tuple[Tensor, Tensor]:
        """The loss of a part, and for the log: the sum of each column over its items, and behind them their number."""
        raise NotImplementedError

    def end_epoch(self, loop: Loop) -> dict[str, float]:
        """What else the row of the epoch, ``loop.epoch``, has. Every process calls this."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the tuned parameters. Every process calls this."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""


class Loop:
    """Trains a task in this process, together with the others of its group.

    Args:
        folder: of checkpoints and log.csv; None: nothing is written. on_step: called with the number of steps done, after each.

    Attributes:
        history: a row for each epoch. seconds: spent in steps. tuned: the parameters that are trained, by name.
    """

    def __init__(
        self, task: Task, plan: Plan, *, folder: Path | None = None, device: torch.device | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.plan, self.folder, self.on_step = task, plan, folder, on_step
        self.rank, self.world = place()
        self.device = device or torch.device("cpu")
        self.epoch = self.step_in_epoch = 0
        self.steps_per_epoch = task.items // plan.batch_size
        self.sums = [0.0] * (len(task.columns) + 1)  # of this epoch and process
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.sharded = plan.sharded and self.world > 1
        if self.sharded:
            sharding.shard(task.model, self.device)
        self.tuned = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        kept = task.model.state_dict().keys()
        self.statistics = {name: b for name, b in task.model.named_buffers() if name in kept}
        self.optimizer = torch.optim.AdamW(self.tuned.values(), lr=plan.rate(0), weight_decay=plan.weight_decay)

    @property
    def at(self) -> Moment:
        return Moment(self.epoch, self.step_in_epoch, self.steps_per_epoch)

    def run(self) -> list[dict[str, float]]:
        """Trains to the end, from the newest checkpoint if there is one. Returns the history.

        Raises:
            ValueError: the folder's checkpoints are of another model. RuntimeError: the loss is not finite.
        """
        torch.manual_seed((self.plan.seed + 1) * 1_000_003 + self.rank)  # dropout differs between processes
        self._resume()
        network = self._network()
        writer = self._tensorboard()
        plan, total = self.plan, self.plan.epochs * self.steps_per_epoch
        with Progress("tuning", total, self.at.total, on=plan.progress and self.rank == 0) as self.progress:
            while self.epoch < plan.epochs:
                self.task.network.train()
                for batch in self.task.feed(*self._batches(), self.epoch):
                    start = time.perf_counter()
                    loss = self._step(network, batch)
                    self.seconds += time.perf_counter() - start
                    self.progress.step(self.at.total, epoch=self.epoch + 1, loss=f"{loss:.3f}")
                    every = plan.checkpoint_steps
                    if every is not None and self.step_in_epoch < self.steps_per_epoch and self.at.total % every == 0:
                        self._checkpoint()
                    if self.on_step is not None:
                        self.on_step(self.at.total)
                self._end_epoch(writer)
        if writer is not None:
            writer.close()
        return self.history

    def tuned_values(self) -> dict[str, Tensor]:
        """What training changes, whole, by name: parameters, and running statistics. Every process has to ask for it."""
        return {name: sharding.full(p) for name, p in {**self.tuned, **self.statistics}.items()}

    def assign(self, values: dict[str, Tensor]) -> None:
        """Takes what :meth:`tuned_values` gave, or nothing; every process has to."""
        for name, value in values.items():
            sharding.assign({**self.tuned, **self.statistics}[name], value)

    def _network(self) -> Any:
        network: Any = self.task.network
        if self.world > 1 and not self.sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # After a merge in the last block nothing reads the patches, and the refinement gets no gradient.
            network = DistributedDataParallel(network, device_ids=ids, find_unused_parameters=True)
        return torch.compile(network) if self.plan.compile else network

    def _batches(self) -> tuple[list[list[int]], slice]:
        """The batches of the epoch that are left, and which part of each is this process's."""
        size, share = self.plan.batch_size, self.plan.batch_size // self.world
        order = self.task.order(self.plan.seed, self.epoch)[: self.steps_per_epoch * size]
        return order.view(-1, size)[self.step_in_epoch :].tolist(), slice(self.rank * share, (self.rank + 1) * share)

    def _step(self, network: Any, batch: Any) -> float:
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(self.at.epochs)
        self.optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), device=self.device)
        sums = torch.zeros(len(self.sums), device=self.device, dtype=torch.float64)
        for i, part in enumerate(self.task.parts(batch, plan.accumulate)):
            waits = self.world > 1 and i + 1 < plan.accumulate and not plan.compile
            if self.sharded:
                sharding.synchronize(network, not waits)
            with network.no_sync() if waits and not self.sharded else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=plan.amp):
                    loss, added = self.task.loss(network, part, self.at)
                (loss / plan.accumulate).backward()
            value += loss.detach() / plan.accumulate
            sums += added.detach()
        found = value.item()
        if not math.isfinite(found):
            raise RuntimeError(
                f"the loss is {found} at step {self.at.total}; a smaller lr may help ({plan.rate(self.at.epochs):g})"
            )
        self.optimizer.step()
        self.sums = [old + new for old, new in zip(self.sums, sums.tolist(), strict=True)]
        self.step_in_epoch += 1
        return found

    def _end_epoch(self, writer: Any) -> None:
        *sums, count = (sum(column) for column in zip(*gather(self.sums), strict=True))
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.at.total,
            "lr": self.plan.rate(self.epoch + (self.step_in_epoch - 1) / self.steps_per_epoch),
            **{f"train_{name}": value / count for name, value in zip(self.task.columns, sums, strict=True)},
            "seconds": self.seconds,
        }
        row |= self.task.end_epoch(self)
        self.history.append(row)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, [0.0] * len(self.sums)
        if self.epoch % self.plan.checkpoint_epochs == 0 or self.epoch == self.plan.epochs:
            self._checkpoint()
        elif self.rank == 0:
            self._write("log.csv", lambda folder: write_atomically(folder / "log.csv", _as_csv(self.history).encode()))
        self.progress.say(_line(row, self.plan.epochs))
        if writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    writer.add_scalar(name, value, row["step"])

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """A disk that is full costs this checkpoint, not the run or the earlier ones."""
        if self.folder is None:
            return
        states = gather((checkpoint.remember_rng(), self.sums))
        tuned, optimizer, more = self.tuned_values(), sharding.full_optimizer_state(self.optimizer), self.task.state()
        if self.rank != 0:
            return
        state = {
            "identity": self.task.identity, "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
            "tuned": tuned, "optimizer": optimizer, "rng": [rng for rng, _ in states], "sums": [sums for _, sums in states],
            "history": self.history, "seconds": self.seconds, "task": more,
        }  # fmt: skip

        def write(folder: Path) -> None:
            checkpoint.write(folder, self.at.total, state, self.plan.keep_checkpoints)
            write_atomically(folder / "log.csv", _as_csv(self.history).encode())

        self._write("checkpoint", write)

    def _write(self, what: str, write: Callable[[Path], None]) -> None:
        if self.folder is None:
            return
        try:
            write(self.folder)
        except OSError as error:
            warnings.warn(
                f"no {what} at step {self.at.total}: {error}; earlier ones stay, training goes on", RuntimeWarning, stacklevel=2
            )

    def _resume(self) -> None:
        newest = None
        if self.folder is not None and self.rank == 0 and self.plan.resume:
            newest = checkpoint.load_newest(self.folder)
        state = first_decides(None if newest is None else newest[1])
        if state is None:
            return
        if state.get("identity") != self.task.identity or state["tuned"].keys() != {*self.tuned, *self.statistics}:
            raise ValueError(f"output: the run in {self.folder} was on another backbone; choose another folder")
        self.assign(state["tuned"])
        self.optimizer.load_state_dict(sharding.distributed_optimizer_state(state["optimizer"], list(self.tuned.values())))
        self.task.restore(state["task"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.history, self.seconds = state["history"], state["seconds"]
        if len(state["rng"]) == self.world:
            self.sums = state["sums"][self.rank]
            checkpoint.restore_rng(state["rng"][self.rank])
        else:
            if self.rank == 0:
                self.sums = [sum(column) for column in zip(*state["sums"], strict=True)]
            warnings.warn(
                f"resumed with {self.world} processes instead of {len(state['rng'])}: dropout is not that of an unbroken run",
                RuntimeWarning,
                stacklevel=2,
            )
        log.info("resumed at epoch %d, step %d", self.epoch + 1, self.at.total)

    def _tensorboard(self) -> Any:
        if not self.plan.tensorboard or self.folder is None or self.rank != 0:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.at.total + 1)


def _line(row: dict[str, float], epochs: int) -> str:
    """A row of the log, for the eye."""
    numbers = [
        f"{name.replace('_', ' ')} {f'{100 * value:.2f} %' if name.endswith('accuracy') else f'{value:.4f}'}"
        for name, value in row.items()
        if name not in ("epoch", "step", "lr", "seconds")
    ]
    return f"epoch {row['epoch'] + 1:.0f} of {epochs}: {', '.join(numbers)}, {row['seconds']:.0f} s"


def _as_csv(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
