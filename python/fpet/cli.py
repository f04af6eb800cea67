"""The command ``fpet``: a table of sub-commands, each a module that is imported when it is called for."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """One sub-command.

    Attributes:
        module: with ``add_arguments(parser)`` and ``run(options) -> exit status``. OSError, ValueError, TypeError, RuntimeError
            and ImportError that it raises are shown as one line, without a traceback.
        summary: for ``fpet --help``.
    """

    module: str
    summary: str


COMMANDS = {
    "train": Command("fpet.train.run", "tune a backbone, with merged tokens; without options on an embedded task"),
    "evaluate": Command("fpet.train.evaluation", "accuracy of what a finished run tuned"),
    "tables": Command("fpet.tables.command", "the tables of the paper, measured here, beside what was published"),
    "visualize": Command("fpet.visualization", "picture and report of the patches that a model merges in an image"),
    "doctor": Command("fpet.doctor", "which backends are active on this machine, which are not, and why"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``fpet`` with ``argv``; returns the exit status: the command's own, or 1 where it failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fpet", description="Token merging and parameter-efficient tuning of timm's ViTs.")
    parser.add_argument("--traceback", action="store_true", help="where an error came from, not its message alone")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # No option above takes a value, so the first word is the command; only its module is needed.
    called = next((word for word in arguments if not word.startswith("-")), None)
    module = None
    for name, command in COMMANDS.items():
        summary = command.summary
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == called:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    options.command_line = shlex.join(["fpet", *arguments])  # for those that keep it with their results
    assert module is not None  # argparse has refused every other word
    try:
        return int(module.run(options))
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if options.traceback:
            raise
        print(f"fpet {options.command}: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
