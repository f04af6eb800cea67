"""The command ``fpet doctor``: what is active on this machine, what is not, and why. Same as ``python -m fpet_kernels``."""

from __future__ import annotations

import argparse

from fpet_kernels.__main__ import main

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def run(options: argparse.Namespace) -> int:
    return main(["--json"] if options.json else [])
