"""The command line that the benchmarks of speed have in common, and its checks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch

__all__ = ["DTYPES", "Parser", "listed"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def listed(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


class Parser(argparse.ArgumentParser):
    """Has the options ``--device``, ``--dtype``, ``--threads``, ``--minutes``, ``--out`` and ``--show``.

    Checks lists of names and of counts.

    Args:
        benchmark: what the file of rows is named after. description: the driver's docstring. dtypes: which ones it can measure.
    """

    def __init__(self, benchmark: str, description: str | None, dtypes: Sequence[str]) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.dtypes = dtypes
        add = self.add_argument
        add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
        add("--dtype", help=f"comma-separated from {', '.join(dtypes)}; default float32 on the CPU, bfloat16 elsewhere")
        add("--threads", type=int, help="CPU threads; default torch's")
        add("--minutes", type=float, help="after so many no other setting is begun; default: all are")
        out = f"benchmarks/results/{benchmark}-DEVICE.jsonl"
        add("--out", help=f"JSON lines are appended here; none: nowhere; default {out}")
        add("--show", metavar="FILE", help="measure nothing: tables of the rows in FILE")

    def checked(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options, with those that all benchmarks have checked and complete."""
        options = self.parse_args(argv)
        try:
            options.device = torch.device(options.device)
        except RuntimeError as error:
            self.error(f"--device: {str(error).splitlines()[0]}")
        if options.device.type not in ("cpu", "cuda"):
            self.error(f"--device: expected cpu or cuda, got {options.device.type!r}: this benchmark can't time others")
        if options.device.type == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: torch.cuda.is_available() is False here")
        default = "float32" if options.device.type == "cpu" else "bfloat16"
        options.dtype = self.chosen(options.dtype or default, self.dtypes, "dtype")
        if options.threads is not None and options.threads < 1:
            self.error(f"--threads: expected a positive integer, got {options.threads}")
        if options.minutes is not None and not options.minutes > 0:
            self.error(f"--minutes: expected a positive number, got {options.minutes}")
        return options

    def chosen(self, text: str, known: Iterable[str], what: str, public: Iterable[str] | None = None) -> list[str]:
        """The names in ``text``, separated by commas; "all" means ``public``, where that is given."""
        if public is not None and text == "all":
            return list(public)
        names = [n for n in text.replace(" ", "").split(",") if n]
        if not names or any(n not in known for n in names):
            self.error(f"--{what}: expected names out of {', '.join(known)}, got {text!r}")
        return names

    def counts(self, text: str, what: str) -> list[int]:
        """The positive integers in ``text``, separated by commas."""
        try:
            numbers = [int(n) for n in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < 1:
            self.error(f"--{what}: expected positive integers separated by commas, got {text!r}")
        return numbers
