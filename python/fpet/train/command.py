"""The command ``fpet train``."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

from ..data import FAMILIES
from .config import REDUCTIONS, Config, ConfigError, from_arguments, nearest
from .config import add_arguments as add_config_arguments
from .inputs import check_data
from .run import train
from .studies import compare, comparison_table, sweep

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet train``: every field of Config, and runs of several."""
    add_config_arguments(parser)
    parser.add_argument("--sweep-scale", metavar="S,S,…", help="try each scale s on validation images, keep the best")
    parser.add_argument("--compare", metavar="NAME,NAME,…", help="train with each of several reductions")
    parser.add_argument("--seeds", metavar="N,N,…", help="seeds for --compare (default: 0)")
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
    if args.compare is not None and args.sweep_scale is not None:
        raise ConfigError("--compare: expected it without --sweep-scale, got both")
    if args.seeds is not None and args.compare is None:
        raise ConfigError("--seeds: expected it with --compare; one run takes --seed")
    if args.compare is not None:
        names = args.compare.split(",")
        if unknown := [name for name in names if name not in REDUCTIONS]:
            meant = nearest(unknown[0], REDUCTIONS)
            raise ConfigError(f"--compare: expected some of {', '.join(REDUCTIONS)}, got {', '.join(unknown)}{meant}")
        text = comparison_table(compare(config, names, _numbers(args.seeds or "0", int, "--seeds")))
    elif args.sweep_scale is not None:
        text = sweep(config, _numbers(args.sweep_scale, float, "--sweep-scale")).table()
    else:
        text = train(config).table()
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)
    return 0
