"""Code of one's own that registers methods and reductions, imported before a command reads its other options.

``fpet train --plugin my_methods …`` imports a module of that name, from the current folder too; ``--plugin path/to/file.py``
a file. An installed package names its module in the entry-point group ``fpet.plugins``, and needs no option.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

__all__ = ["GROUP", "add_argument", "import_all", "import_plugin"]

GROUP = "fpet.plugins"
_OPTION = "--plugin"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """``--plugin``, which :func:`import_all` has read already when ``parser`` reads it."""
    text = "imported first: a module, or a file, that registers methods or reductions"
    parser.add_argument(_OPTION, action="append", metavar="MODULE", help=text)


def import_all(arguments: Sequence[str]) -> None:
    """Imports what installed packages announce and what ``--plugin`` in a command line names.

    Raises:
        ImportError: one of them can't be imported; says which.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise ImportError(f"plugin {point.name} ({point.value}): {type(error).__name__}: {error}") from error
    words = iter(arguments)
    for word in words:
        if word == _OPTION:
            name = next(words, None)
        elif word.startswith(f"{_OPTION}="):
            name = word.partition("=")[2]
        else:
            continue
        if name:
            import_plugin(name)


def import_plugin(name: str) -> ModuleType:
    """A module by its name, or a file by its path.

    Raises:
        ImportError: it is not there, or fails while it is imported.
    """
    try:
        if name.endswith(".py") or os.sep in name:
            return _import_file(Path(name))
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as python -m has it
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"{_OPTION}: expected a module to import, got {name!r}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes pickle
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
