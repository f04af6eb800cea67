"""Numbers of the paper for one combination of backbone, method and reduction, each with the table it is from.

Nothing that measures imports this module: a published number can't get into a measured column.
"""

from __future__ import annotations

from typing import NamedTuple

from .definitions import TABLES, Row

__all__ = ["PUBLISHED", "Published", "lookup", "of_row", "of_table"]


class Published(NamedTuple):
    """Attributes: value, in the unit of :data:`fpet.tables.QUANTITIES`; source; doubt, why it may be wrong, or nothing."""

    value: float
    source: str
    doubt: str = ""


Key = tuple[str, str, str, int | None]
_DOUBTS = {
    ("1", "vpt-deep", "memory_gb"): "the table also says 26.5 % less than 11.9, which would be 8.75",
    ("1", "adaptformer", "time_ms"): "the table also says 1.5 % above 2.62, which would be 2.66",
}


def of_row(table: str, row: Row, quantity: str) -> Published:
    """What a row of a table says."""
    plain = row.variant is not None and row.variant.reduction == "none"
    doubt = _DOUBTS.get((table, row.variant.method, quantity), "") if plain and row.variant is not None else ""
    return Published(row.numbers[quantity], f"Table {table}", doubt)


def of_table(name: str) -> dict[Key, dict[str, Published]]:
    """What one table says, by model, tuning method, reduction and 0-based layer that reduces (None: none does, or all do)."""
    found: dict[Key, dict[str, Published]] = {}
    for row in TABLES[name].rows:
        if row.variant is None or row.variant.hidden_dim is not None:
            continue
        found.setdefault(row.variant.key, {}).update({q: of_row(name, row, q) for q in row.numbers})
    return found


def _all() -> dict[Key, dict[str, Published]]:
    """Of several tables with the same number, the first is taken."""
    found: dict[Key, dict[str, Published]] = {}
    for name in TABLES:
        for key, numbers in of_table(name).items():
            for quantity, number in numbers.items():
                found.setdefault(key, {}).setdefault(quantity, number)
    return found


PUBLISHED: dict[Key, dict[str, Published]] = _all()
"""By model, tuning method, reduction and 0-based layer that reduces (None: none does). VTAB-1K accuracies in percent."""


def lookup(model: str, method: str, reduction: str, layer: int | None) -> dict[str, Published]:
    """What was published for one row, by quantity; empty where nothing was."""
    return PUBLISHED.get((model, method, reduction, None if reduction == "none" else layer), {})
