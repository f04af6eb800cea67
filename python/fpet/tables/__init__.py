"""The tables of the paper, measured here, beside what was published."""

from .command import QUANTITIES, TABLES, add_arguments, markdown, run, variants_of
from .definitions import Table

__all__ = ["QUANTITIES", "TABLES", "Table", "add_arguments", "markdown", "run", "variants_of"]
