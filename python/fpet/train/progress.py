"""What a run says while it goes on: on a terminal a bar, everywhere a line for each epoch and, early, how long it will take."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "duration"]

_TIMED = range(2, 8)
"""Steps of this process whose time tells the rest; the first ones warm up."""


def duration(seconds: float) -> str:
    """In words: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Steps of one thing that takes long. Everything goes to the standard error, and at once.

    Args:
        name: of what is done. total: steps. done: of them before. on: whether anything is said.
    """

    def __init__(self, name: str, total: int, done: int = 0, *, on: bool = True) -> None:
        self.name, self.total, self.done, self.on = name, total, done, on
        self._own, self._started = 0, time.perf_counter()
        self._bar = tqdm(total=total, initial=done, desc=name, leave=False, disable=None if on else True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, done: int, **numbers: Any) -> None:
        """A step was taken, and ``done`` are done in all."""
        self._bar.set_postfix(**numbers, refresh=False)
        self._bar.update(done - self.done)
        self.done, self._own = done, self._own + 1
        if self._own == _TIMED.start:
            self._started = time.perf_counter()
        elif self._own == _TIMED.stop:
            each = (time.perf_counter() - self._started) / len(_TIMED)
            left = self.total - self.done
            if each * left > 5:
                self.say(f"{self.name}: {left} steps left, about {duration(each * left)}, {each:.2g} s a step")

    def say(self, line: str) -> None:
        """A line of its own."""
        if self.on:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
