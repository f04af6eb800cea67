"""The command ``fpet``: a table of sub-commands, each a module that is imported when it is called for."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from . import plugins

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """One sub-command.

    Attributes:
        module: with ``add_arguments(parser)`` and ``run(options) -> exit status``. OSError, ValueError, TypeError, RuntimeError
            and ImportError that it raises are shown without a traceback.
        summary: for ``fpet --help``.
    """

    module: str
    summary: str


COMMANDS = {
    "train": Command("fpet.train.command", "tune a backbone, with merged tokens; without options on an embedded task"),
    "evaluate": Command("fpet.train.evaluation", "accuracy of what a finished run tuned"),
    "plan": Command("fpet.deploy.planning", "which layer to merge in: time, memory and what is lost, on a model of your own"),
    "predict": Command("fpet.deploy.prediction", "class names and probabilities of images, by a finished run"),
    "export": Command("fpet.deploy.exporting", "a finished run as one file: torch.export, AOTInductor or ONNX"),
    "retrieval": Command("fpet.retrieval.command", "image-text retrieval with BLIP: train, evaluate, check, --demo"),
    "tables": Command("fpet.tables.command", "the tables of the paper, measured here, beside what was published"),
    "visualize": Command("fpet.visualization", "picture and report of the patches that a model merges in an image"),
    "doctor": Command("fpet.doctor", "which backends are active on this machine, which are not, and why"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``fpet`` with ``argv``; returns the exit status: the command's own, 1 where it failed, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _Parser.words = arguments
    parser = _Parser(prog="fpet", description="Token merging and parameter-efficient tuning of vision transformers.")
    parser.add_argument("--traceback", action="store_true", help="where an error came from, not its message alone")
    parser.add_argument("--version", action=_Version, nargs=0, help="the version, and nothing else")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # No option above takes a value, so the first word is the command; only its module is needed.
    called = next((word for word in arguments if not word.startswith("-")), None)
    module, chosen = None, parser
    for name, command in COMMANDS.items():
        summary = command.summary
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == called:
            chosen = subparser
            try:
                plugins.import_all(arguments)
                module = importlib.import_module(command.module)
                module.add_arguments(subparser)
                plugins.add_argument(subparser)
            except KeyboardInterrupt:
                return _interrupted(name)
            except ImportError as error:
                if "--traceback" in arguments:
                    raise
                print(f"fpet {name}: {error}", file=sys.stderr)
                return 1
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _inner(chosen, arguments).error(f"unrecognized arguments: {' '.join(unknown)}")
    options.command_line = shlex.join(["fpet", *arguments])  # for those that keep it with their results
    assert module is not None  # argparse has refused every other word
    try:
        return int(module.run(options))
    except KeyboardInterrupt:
        return _interrupted(options.command)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if options.traceback:
            raise
        print(f"fpet {options.command}: {_as_typed(str(error), chosen, arguments) or type(error).__name__}", file=sys.stderr)
        return 1


def _interrupted(command: str) -> int:
    behind = "\n" if sys.stderr.isatty() else ""  # the terminal's ^C
    print(f"{behind}fpet {command}: interrupted; what was finished stays", file=sys.stderr)
    return 130


class _Parser(argparse.ArgumentParser):
    """Names what was probably meant."""

    words: Sequence[str] = ()
    """What was typed."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '?([^'\s]+)'? \(choose from (.+)\)", message)
        if choice:
            near = difflib.get_close_matches(choice[1], re.split(r"[,\s']+", choice[2]), n=1)
        else:
            flags = [flag for action in self._actions for flag in action.option_strings]
            typed = [word.partition("=")[0] for word in self.words if word.startswith("--")]
            unknown = [word for word in typed if not any(flag.startswith(word) for flag in flags)]
            near = [match for word in unknown for match in difflib.get_close_matches(word, flags, n=1)][:1]
        super().error(message + (f"; did you mean {near[0]}?" if near else ""))


class _Version(argparse.Action):
    """Prints the version; only now, as it takes an import of torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"fpet {importlib.import_module('fpet').__version__}")
        parser.exit()


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found, {}))


def _inner(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the innermost sub-command that was called."""
    inner = _subcommands(parser)
    named = next((word for word in arguments if word in inner), None)
    return parser if named is None else _inner(inner[named], arguments)


def _as_typed(message: str, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """The message with settings at the start of a line named as they are typed: ``--warmup-epochs: expected …``."""
    typed = {}
    for action in _inner(parser, arguments)._actions:
        long = [flag for flag in action.option_strings if flag.startswith("--") and not flag.startswith("--no-")]
        if long:
            typed[action.dest] = long[0]
    return re.sub(r"^(\w+)(?=:)", lambda found: typed.get(found[1], found[1]), message, flags=re.MULTILINE)
