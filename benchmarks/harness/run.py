"""How a run goes: settings one after another with progress, tables as they come, then rows, and what went wrong."""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fpet_kernels.provenance import provenance

from . import rows as files
from .cases import require
from .rows import Row

__all__ = ["Bench", "compile_whole", "context", "show"]

Grouped = Callable[[Iterable[Row]], list[list[Row]]]
Table = Callable[[list[Row]], str]


def compile_whole(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)


def context(options: argparse.Namespace, benchmark: str, argv: Sequence[str] | None, **more: object) -> Row:
    """What every row of a run says about where it is from; tells the user if that is no commit."""
    command = shlex.join(["python", f"benchmarks/{benchmark}.py", *(sys.argv[1:] if argv is None else argv)])
    found = {**provenance(options.device, command), **more}
    if found["dirty"]:
        print("note: the working tree has changes that are not committed; the rows say so", file=sys.stderr)
    return found


def show(path: str, benchmark: str, grouped: Grouped, table: Table) -> list[Row]:
    """Prints the tables of rows measured before, and returns the rows; there may be none."""
    found = files.read(path, benchmark)
    if found:
        print("\n\n".join(map(table, grouped(found))))
    else:
        print(f"{path} holds no rows of this benchmark", file=sys.stderr)
    return found


class Bench:
    """Runs settings and collects rows; what is wrong goes into ``failures``, what could not be run into ``left_out``."""

    benchmark = ""  # its name in rows and files
    bar_format = "{l_bar}{bar:20}| {elapsed}<{remaining}"

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.bar: Any = None
        self.written: Path | None = None
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self.until = time.monotonic() + 60 * (options.minutes or math.inf)

    def steps(self, setting: Any) -> int:
        """How many steps of the progress bar :meth:`run` makes."""
        raise NotImplementedError

    def run(self, setting: Any) -> list[Row]:
        """All implementations of one setting."""
        raise NotImplementedError

    def say(self, text: str) -> None:
        self.bar.write(text)

    def clean(self) -> None:
        """Leaves nothing of one setting to the next: no memory, so that what is free counts as free, no compiled code."""
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, settings: Sequence[Any], context: Row, grouped: Grouped, table: Table) -> list[Row]:
        """Runs all settings, prints their tables and appends their rows, which hold ``context``, to the file as they come."""
        # torch.compile's remarks on wording and tuning are not about this measurement.
        warnings.filterwarnings("ignore", module=r"torch\.(_inductor|_dynamo|_functorch|utils|sparse)")
        steps = [self.steps(setting) for setting in settings]
        rows: list[Row] = []
        with require("tqdm").tqdm(total=sum(steps), file=sys.stderr, leave=False, bar_format=self.bar_format) as self.bar:
            for done, setting in enumerate(settings, 1):
                if time.monotonic() > self.until:
                    self.left_out.append(f"{setting}: not reached in {self.options.minutes:g} minutes")
                    continue
                found = [{**row, **context} for row in self.run(setting)]
                for group in grouped(found):
                    self.say(table(group) + "\n")
                rows += found
                self.written = files.write(found, self.benchmark, self.options.out, self.device) or self.written
                self.bar.update(sum(steps[:done]) - self.bar.n)
        return rows

    def finish(self, rows: Sequence[Row], context: Row, seconds: float) -> None:
        """Says what run this was, where its rows are, and what it left out."""
        machine = f"{context['gpu']}, driver {context['driver']}"
        if self.device.type == "cpu":
            machine = f"{context['cpu']}, {context['threads']} threads, load {context['load_average']} at the start"
        print(f"{machine} · torch {context['torch']} · timm {context['timm']} · {seconds:.0f} s")
        for line in self.left_out:
            print(f"left out: {line}")
        if self.written:
            print(f"{len(rows)} rows appended to {self.written}")

    def status(self) -> int:
        """The exit status, after naming what was wrong."""
        for failure in self.failures:
            print(failure, file=sys.stderr)
        return 1 if self.failures else 0
