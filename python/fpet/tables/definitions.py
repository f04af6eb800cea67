"""What each table of the paper holds here: its rows, and which combination of backbone, method and reduction each is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..adapters import METHODS
from ..comparators import REDUCTIONS
from .measure import MODELS, Variant
from .paper import PAPER, PaperRow

__all__ = ["TABLES", "Row", "Table", "one_layer", "variants_of"]


class Row(NamedTuple):
    """Attributes: label, the paper's; variant, None where it can't be measured here; numbers, the paper's by quantity."""

    label: str
    variant: Variant | None
    numbers: dict[str, float]


@dataclass(frozen=True)
class Table:
    """Attributes: title; quantities, in the order of columns; rows, the paper's; over_methods, whether other methods make sense
    as further rows; over_reductions, whether reductions registered from outside do. Without rows the table is only printed."""

    title: str
    quantities: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    over_methods: bool = False
    over_reductions: bool = False

    def rows_for(self, models: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> list[Row]:
        """The paper's rows on these backbones, then rows of further methods.

        Rows of another backbone than the paper's have none of its numbers.

        Args:
            models: backbones; None: the paper's. methods: those wanted, in tables of several; None: the paper's.
        """
        own = list(dict.fromkeys(row.variant.model for row in self.rows if row.variant is not None))
        models = own if models is None else models
        several = len({row.variant.method for row in self.rows if row.variant is not None}) > 1
        found: list[Row] = []
        for model in models if len(own) == 1 else [None]:
            for row in self.rows:
                variant = row.variant
                if variant is None:
                    if methods is None and model in (None, *own):
                        found.append(row)
                elif methods is not None and several and variant.method not in methods:
                    continue
                elif model is None:
                    found += [row] if variant.model in models else []
                elif model == variant.model:
                    found.append(row)
                else:
                    found.append(Row(row.label, _moved(variant, model), {}))
            known = {row.variant.method for row in self.rows if row.variant is not None}
            for method in methods or () if self.over_methods and model is not None else ():
                if method not in known:
                    found += [Row(method, merging(str(model), method, r), {}) for r in ("none", "fpet")]
            if self.over_reductions and model is not None:
                foreign = [n for n, r in REDUCTIONS.items() if not r.reducer.__module__.startswith("fpet.")]
                found += [Row(n, merging(model, self.rows[0].variant.method, n), {}) for n in foreign if self.rows[0].variant]
        return found


def one_layer() -> tuple[str, ...]:
    """Reductions at one layer; the others reduce everywhere, or nothing."""
    return tuple(name for name, reduction in REDUCTIONS.items() if name != "none" and not reduction.everywhere)


def merging(model: str, method: str, reduction: str, layer: int | None = None, hidden_dim: int | None = None) -> Variant:
    """A variant; at the middle layer where none is given and the reduction has one."""
    layer = MODELS[model].depth // 2 if layer is None else layer
    return Variant(model, method, reduction, layer if reduction in one_layer() else None, hidden_dim)


def _moved(variant: Variant, model: str) -> Variant:
    """The same on another backbone, at the same depth."""
    layer = None if variant.layer is None else variant.layer * MODELS[model].depth // MODELS[variant.model].depth
    return Variant(model, variant.method, variant.reduction, layer, variant.hidden_dim)


_METHOD_NAMES = {name.lower().replace(" ", "").replace("-", ""): name for name in METHODS}
_BACKBONES = {"ViT-S": "vits16", "ViT-L": "vitl16", "DeiT-S": "deits16", "DeiT-B": "deitb16"}
_REDUCED = {
    "w/o merging": "none", "Max Pool.": "max-pool", "Avg. Pool.": "avg-pool", "Bipartite soft matching": "bsm",
    "Bipartite differentiable matching": "fpet", "LTMP": "ltmp", "ToMe": "tome", "BSM at 6th layer": "bsm",
    "+ checkerboard": "bsm-checkerboard", "+ key refinement (w/o gradient stopping)": "fpet-no-stop", "Ours": "fpet",
}  # fmt: skip
_COLUMNS = {
    "Acc (%)": "accuracy", "Time (ms)": "time_ms", "FLOPs (G)": "gmac", "Mem (GB)": "memory_gb", "# param (M)": "parameters_m",
    "Average": "accuracy", "Δ Acc (%)": "delta_accuracy", "Δ Time (ms)": "delta_time_ms", "Δ Mem (GB)": "delta_memory_gb",
}  # fmt: skip


def _method(label: str) -> tuple[str | None, str]:
    """Method and reduction that a label such as "FPET-Bi-LoRA" names; None for one that is not here."""
    plain = label.partition(" (")[0]
    merges = plain.startswith("FPET-")
    name = _METHOD_NAMES.get(plain.removeprefix("FPET-").lower().replace("-", "").replace(" ", ""))
    return name, "fpet" if merges else "none"


def _numbers(table: str, row: PaperRow) -> dict[str, float]:
    found = {_COLUMNS[c]: row.number(i) for i, c in enumerate(PAPER[table].columns) if c in _COLUMNS}
    return {quantity: value for quantity, value in found.items() if value is not None}


def _row(table: str, label: str, row: PaperRow, variant: Variant | None) -> Row:
    return Row(label, variant, _numbers(table, row))


def _by_method(table: str) -> tuple[Row, ...]:
    """Tables 1, 2 and A2: ViT-B/16, a method in each row; those of the last group merge."""
    found = []
    for row in PAPER[table].rows:
        method, reduction = _method(row.cells[0])
        reduction = "fpet" if row.group.startswith("Faster") else reduction
        label = f"FPET-{row.cells[0]}" if row.group.startswith("Faster") else row.cells[0]
        width = 1 if "dim=1" in label else None
        found.append(_row(table, label, row, (method and merging("vitb16", method, reduction, hidden_dim=width)) or None))
    return tuple(found)


def _by_backbone(table: str) -> tuple[Row, ...]:
    """Tables 5 and A1."""
    found = []
    for row in PAPER[table].rows:
        method, reduction = _method(row.cells[1])
        model = _BACKBONES[row.cells[0]]
        found.append(_row(table, f"{row.cells[0]}, {row.cells[1]}", row, merging(model, str(method), reduction)))
    return tuple(found)


def _by_layer(table: str, method: str) -> tuple[Row, ...]:
    """Tables A3 and A4."""
    found = []
    for row in PAPER[table].rows:
        layer = None if row.cells[0] == "N/A" else int(row.cells[0])
        where = "" if layer is None else f" at {layer}"
        variant = merging("vitb16", method, _REDUCED[row.cells[1]], layer)
        found.append(_row(table, f"{row.cells[1]}{where}", row, variant))
    return tuple(found)


def _table_3() -> tuple[Row, ...]:
    return tuple(
        _row("3", row.cells[0], row, merging("vitb16", "bi-adaptformer", _REDUCED[row.cells[0]])) for row in PAPER["3"].rows
    )


def _table_4() -> tuple[Row, ...]:
    (row,) = PAPER["4"].rows
    found = []
    for i, label in enumerate(PAPER["4"].columns[1:], 1):
        method, reduction = _method(label)
        number = row.number(i)
        assert method is not None and number is not None
        found.append(Row(label, merging("vitb16", method, reduction), {"step_s": number}))
    return tuple(found)


def _table_a6() -> tuple[Row, ...]:
    """A row for each cell, and the methods with every token kept."""
    found = []
    for row in PAPER["A6"].rows:
        method = _method(row.cells[0])[0]
        assert method is not None
        found.append(Row(row.cells[0], merging("vitb16", method, "none"), {"delta_accuracy": 0.0}))
        for i, label in enumerate(PAPER["A6"].columns[1:], 1):
            number = row.number(i)
            assert number is not None
            variant = merging("vitb16", method, _REDUCED[label])
            found.append(Row(f"{row.cells[0]}, {label}", variant, {"delta_accuracy": number}))
    return tuple(found)


_COSTS = ("accuracy", "time_ms", "gmac", "memory_gb")
TABLES: dict[str, Table] = {
    name: Table(PAPER[name].caption, quantities, rows(), over, name == "3")
    for name, quantities, rows, over in (
        ("1", (*_COSTS, "reserved_gb"), lambda: _by_method("1"), True),
        ("2", ("parameters_m", "stored_kib", "accuracy"), lambda: _by_method("2"), True),
        ("3", ("delta_accuracy", "delta_time_ms", "delta_memory_gb"), _table_3, False),
        ("4", ("step_s",), _table_4, False),
        ("5", _COSTS, lambda: _by_backbone("5"), False),
        ("A1", _COSTS, lambda: _by_backbone("A1"), False),
        ("A2", _COSTS, lambda: _by_method("A2"), False),
        ("A3", ("accuracy", "time_ms", "gmac"), lambda: _by_layer("A3", "adaptformer"), False),
        ("A4", ("accuracy", "time_ms", "gmac"), lambda: _by_layer("A4", "bi-adaptformer"), False),
        ("A5", (), tuple, False),
        ("A6", ("delta_accuracy",), _table_a6, False),
        ("A7", (), tuple, False),
        ("A8", (), tuple, False),
        ("A9", (), tuple, False),
    )
}
"""By the paper's number. Those without rows here are printed as they are."""

MEASURED_AS = {"delta_accuracy": "accuracy", "delta_time_ms": "time_ms", "delta_memory_gb": "memory_gb", "step_s": "step_ms"}
"""Quantities that are worked out of another one."""


def variants_of(tables: Iterable[str], models: Sequence[str] | None, methods: Sequence[str] | None) -> dict[Variant, set[str]]:
    """Every row of these tables once, and the quantities that have to be measured of it."""
    wanted: dict[Variant, set[str]] = {}
    for name in tables:
        quantities = {MEASURED_AS.get(q, q) for q in TABLES[name].quantities}
        for row in TABLES[name].rows_for(models, methods):
            if row.variant is not None:
                wanted.setdefault(row.variant, set()).update(quantities)
                wanted.setdefault(row.variant.plain, set()).update(quantities)  # what ratios are taken to
    return wanted
