"""Numbers that the paper published (arXiv 2503.20282), each with where it was read. What could not be read is absent.

Nothing that measures imports this module: a published number can't get into a measured column.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PUBLISHED", "Published", "lookup"]


class Published(NamedTuple):
    """Attributes: value, in the unit of :data:`fpet.tables.QUANTITIES`; source; doubt, why it may be wrong, or nothing."""

    value: float
    source: str
    doubt: str = ""


_PAPER = "the paper"
# https://en.papernotes.org/CVPR2025/model_compression/faster_parameter-efficient_tuning_with_token_redundancy_reduction/
# quotes Table 1. Its 13.5 and 17.6 G are the paper's.
_NOTE = "Table 1, as quoted by a reading note of the paper on papernotes.org"
_NO_METHOD = "the tuning method that it was published for is not known here"


def _table_1(accuracy: float, time_ms: float, gmac: float, memory_gb: float, doubt: str = "") -> dict[str, Published]:
    return {
        "accuracy": Published(accuracy, _NOTE), "time_ms": Published(time_ms, _NOTE, doubt), "gmac": Published(gmac, _NOTE),
        "memory_gb": Published(memory_gb, _NOTE),
    }  # fmt: skip


PUBLISHED: dict[tuple[str, str, str, int | None], dict[str, Published]] = {
    ("vitb16", "full", "none", None): _table_1(68.9, 2.62, 17.6, 11.9),
    ("vitb16", "vpt-deep", "none", None): _table_1(72.0, 2.79, 18.5, 9.8),
    ("vitb16", "lora", "none", None): _table_1(75.7, 2.62, 17.6, 8.4),
    ("vitb16", "adaptformer", "none", None): _table_1(
        76.2, 2.68, 17.6, 7.6, "the note also says 1.5 % above 2.62, which would be 2.66"
    ),
    ("vitb16", "bi-adaptformer", "none", None): _table_1(77.0, 2.77, 17.7, 7.6),
    ("vitb16", "lora", "fpet", 6): _table_1(75.6, 2.10, 13.3, 7.1),
    ("vitb16", "adaptformer", "fpet", 6): _table_1(76.2, 2.12, 13.5, 6.2),
    ("vitb16", "bi-adaptformer", "fpet", 6): _table_1(77.0, 2.17, 13.5, 6.2),
    ("vitb16", "adaptformer", "fpet", 4): {"gmac": Published(12.0, _PAPER, _NO_METHOD)},
    ("vitb16", "adaptformer", "fpet", 2): {"gmac": Published(10.5, _PAPER, _NO_METHOD)},
    ("vitl16", "adaptformer", "fpet", 12): {"gmac": Published(46.7, _PAPER, _NO_METHOD)},
}
"""By model, tuning method, reduction and 0-based layer that reduces (None: none does). VTAB-1K accuracies in percent."""


def lookup(model: str, method: str, reduction: str, layer: int | None) -> dict[str, Published]:
    """What was published for one row, by quantity; empty where nothing could be read."""
    return PUBLISHED.get((model, method, reduction, None if reduction == "none" else layer), {})
