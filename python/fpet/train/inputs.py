"""The data of a run."""

from __future__ import annotations

import dataclasses

from .. import data
from .config import Config

__all__ = ["check_data", "load_data"]


def load_data(config: Config) -> data.Splits:
    """The images that ``config`` names; with the honest protocol validation images are held out.

    Raises:
        ValueError, FileNotFoundError: a list, a folder or a file is missing or damaged; names it.
    """
    transform = data.image_transform(config.image_size, config.normalize)
    transforms = data.Transforms(transform, normalization=config.normalize)
    return data.load(config.data, config.task, config.data_dir or "", transforms=transforms, options=_options(config))


def check_data(config: Config) -> dict[str, list[str]]:
    """What is missing or damaged in the data, by task: every task of VTAB-1K, the one of ``config`` elsewhere."""
    task = None if config.data == "vtab1k" else config.task
    return data.check(config.data, task, config.data_dir or "", _options(config))


def _options(config: Config) -> data.DataOptions:
    names = {f.name for f in dataclasses.fields(data.DataOptions)} - {"validate"}
    return data.DataOptions(validate=config.protocol == "honest", **{name: getattr(config, name) for name in names})
