"""Rows as Markdown tables and as a picture: what was measured and what was published, never in one column."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..data import VTAB_TASKS
from .definitions import MEASURED_AS
from .measure import MODELS, Variant
from .paper import PAPER
from .published import Published, lookup

__all__ = [
    "QUANTITIES", "Quantity", "conditions", "embedded_table", "merge_rows", "paper_table", "picture", "table", "task_table",
    "variant_of", "variant_table",
]  # fmt: skip

Row = dict[str, Any]


class Quantity(NamedTuple):
    """Attributes: heading, with its unit; digits; ratio, whether the ratio to the plain method is shown."""

    heading: str
    digits: str
    ratio: bool


QUANTITIES = {
    "accuracy": Quantity("accuracy %", ".1f", False),
    "delta_accuracy": Quantity("Δ accuracy %", "+.2f", False),
    "delta_time_ms": Quantity("Δ ms/image", "+.2f", False),
    "delta_memory_gb": Quantity("Δ training GB", "+.2f", False),
    "step_s": Quantity("s/iteration", "#.3g", True),
    "time_ms": Quantity("ms/image", "#.3g", True),
    "step_ms": Quantity("step ms/image", "#.3g", True),
    "gmac": Quantity("GMAC", ".2f", True),
    "memory_gb": Quantity("training GB", ".2f", True),
    "reserved_gb": Quantity("reserved GB", ".2f", True),
    "parameters_m": Quantity("tuned M", ".3f", False),
    "stored_kib": Quantity("stored KiB", ".1f", False),
}
"""What is measured: time of inference and of a step of tuning, per image; 10⁹ multiply-adds of the forward of one image;
Δ, the difference to the same method with every token
kept; 10⁹ bytes at the batch of the paper, of tensors and of what the allocator takes from a GPU for them; 10⁶ parameters of the
method and the refinement, and what these take to store."""


def variant_of(row: Row) -> Variant:
    return Variant(row["model"], row["method"], row["reduction"], row["layer"], row.get("hidden_dim"))


def merge_rows(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[Variant, Row]]:
    """Rows by setting (device, dtype, attention) and variant; what was measured later replaces what was measured before."""
    merged: dict[tuple[Any, ...], dict[Variant, Row]] = {}
    for row in rows:
        if row["model"] == "embedded":
            continue
        setting = tuple(row[name] for name in ("device", "dtype", "attention"))
        machine = row.get("gpu") or row.get("cpu")
        if machine is not None:  # times of several machines may meet in one column
            timed = {name: {**told, "machine": machine} for name, told in row["conditions"].items() if "clock" in told}
            row = {**row, "conditions": row["conditions"] | timed}
        old = merged.setdefault(setting, {}).get(variant_of(row), {})
        united = {name: {**old.get(name, {}), **row[name]} for name in ("measured", "ratio", "backbone_ratio", "conditions")}
        merged[setting][variant_of(row)] = {**row, **united}
    return merged


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: list[str]


def variant_table(variants: Sequence[Variant], quantities: Sequence[str], rows: dict[Variant, Row]) -> str:
    """Markdown: a line for each variant that there is a row of, with whatever any table of the paper says of it."""
    numbers = [
        ("", v, {name: p for name, p in lookup(*v.key).items()} if v.hidden_dim is None else {}) for v in variants if v in rows
    ]
    return table(numbers, quantities, rows) if numbers else "not measured"


Line = tuple[str, "Variant | None", dict[str, Published]]
"""A label, what it is, None where it can't be measured here, and what was published."""


def table(lines: Sequence[Line], quantities: Sequence[str], rows: dict[Variant, Row]) -> str:
    """Markdown: a line each. Columns "here" come from ``rows`` alone, columns "paper" from what was published."""
    columns = _unless_empty("row", [label or "–" for label, _, _ in lines])
    variants = [v for _, v, _ in lines]
    if len({v.model for v in variants if v is not None}) > 1:
        columns.append(_Column("backbone", ["–" if v is None else MODELS[v.model].title for v in variants]))
    columns.append(_Column("method", ["–" if v is None else _method(v) for v in variants]))
    columns.append(_Column("tokens", ["–" if v is None else _tokens(v) for v in variants]))
    texts = len(columns)
    by_variant = {v: numbers for _, v, numbers in lines if v is not None}
    absent: list[str] = []
    for name in quantities:
        quantity = QUANTITIES[name]
        here = [None if v is None else _measured(rows, v, name) for v in variants]
        if all(value is None for value in here):
            absent.append(quantity.heading)
        columns.append(_Column(f"{quantity.heading}, here", [_number(value, quantity.digits) for value in here]))
        paper = [_published(numbers.get(name), quantity.digits) for _, _, numbers in lines]
        columns += _unless_empty(f"{quantity.heading}, paper", paper)
        measured_as = MEASURED_AS.get(name, name)
        if quantity.ratio:
            ratios = [None if v not in rows else rows[v]["ratio"].get(measured_as) for v in variants]
            columns += _unless_empty("× plain, here", [_number(value, ".3f") for value in ratios])
            ratios = [None if v is None else _published_ratio(v, name, by_variant) for v in variants]
            columns += _unless_empty("× plain, paper", [_number(value, ".3f") for value in ratios])
        if name == "time_ms":
            ratios = [None if v not in rows else rows[v]["backbone_ratio"].get(name) for v in variants]
            columns += _unless_empty("× backbone, here", [_number(value, ".3f") for value in ratios])
            ratios = [None if v is None else _published_backbone_ratio(v, by_variant) for v in variants]
            columns += _unless_empty("× backbone, paper", [_number(value, ".3f") for value in ratios])
    out = [_line([c.heading for c in columns]), _line(["---"] * texts + ["---:"] * (len(columns) - texts))]
    out += [_line([c.cells[i] for c in columns]) for i in range(len(lines))]
    if absent:
        out += ["", f"Not measured: {', '.join(absent)}."]
    doubts = [
        f"† {v.method}, {_tokens(v)}, {QUANTITIES[name].heading}: {p.doubt}."
        for v, numbers in by_variant.items()
        for name, p in numbers.items()
        if p.doubt and name in quantities
    ]
    out += ["", *doubts] if doubts else []
    return "\n".join(out)


def paper_table(name: str) -> str:
    """Markdown: a table of the paper as it stands there."""
    columns, rows = PAPER[name].columns, PAPER[name].rows
    grouped = any(row.group for row in rows)
    head = ["", *columns] if grouped else list(columns)
    lines = [_line(head), _line(["---"] * len(head))]
    return "\n".join([*lines, *(_line([row.group, *row.cells] if grouped else list(row.cells)) for row in rows)])


def task_table(rows: dict[Variant, Row], of: Sequence[tuple[str, Variant | None]]) -> str:
    """Markdown: Table 2 task by task, and below each row what was found here for it, where there is something."""
    columns = PAPER["2"].columns
    lines = [_line(["", *columns]), _line(["---", "---", *["---:"] * (len(columns) - 1)])]
    for paper, (_, variant) in zip(PAPER["2"].rows, of, strict=True):
        lines.append(_line([paper.group, *paper.cells]))
        found = {} if variant not in rows else rows[variant].get("accuracies") or {}
        if found:
            by_task = [found.get(task) for task in VTAB_TASKS]
            mean = rows[variant]["measured"].get("accuracy")  # type: ignore[index]
            cells = [_number(statistics.fmean(v) if v else None, ".1f") for v in by_task]
            lines.append(_line(["", "… here", "–", _number(mean, ".1f"), *cells]))
    return "\n".join(lines)


def _measured(rows: dict[Variant, Row], variant: Variant, name: str) -> float | None:
    """What was measured of a variant; a difference is taken to its plain form, of the same rows."""
    if variant not in rows:
        return None
    found: float | None = rows[variant]["measured"].get(MEASURED_AS.get(name, name))
    if found is not None and name.startswith("delta_"):
        plain = rows.get(variant.plain, {"measured": {}})["measured"].get(MEASURED_AS[name])
        return None if plain is None else found - plain
    if found is not None and name == "step_s":
        return found * rows[variant]["conditions"]["step_ms"]["batch"] / 1e3
    return found


def conditions(rows: dict[Variant, Row], quantities: Sequence[str]) -> list[str]:
    """Under what conditions the measured columns came about, a line for each."""
    lines = []
    for name in quantities:
        told: dict[str, dict[str, None]] = {}
        for row in rows.values():
            for key, value in row["conditions"].get(name, {}).items():
                told.setdefault(key, {})[str(value)] = None
        if told:
            words = "; ".join(f"{key} {' or '.join(values)}" for key, values in told.items())
            lines.append(f"{QUANTITIES[name].heading}: {words}")
    return lines


def embedded_table(rows: Sequence[Row]) -> str:
    """Markdown: accuracies on the embedded tasks, seed by seed, mean and sample standard deviation, and the order of means.

    The difference to every token kept is taken seed by seed, on the same images and the same backbone.
    """
    parts = []
    latest = {(r["task"], r["method"], r["reduction"]): r for r in rows if r["model"] == "embedded"}
    for task, method in dict.fromkeys((task, method) for task, method, _ in latest):
        group = {name: r["measured"]["accuracies"] for (t, m, name), r in latest.items() if (t, m) == (task, method)}
        plain = group.get("none")
        count = max(map(len, group.values()))
        head = ["tokens", *(f"run {i + 1}" for i in range(count)), "mean %", "± std", "minus none", "± std"]
        rule = ["---", *["---:"] * (count + 4)]
        lines = [f"Embedded task {task}, {method}; test accuracy in %", "", _line(head), _line(rule)]
        order = sorted(group, key=lambda name: -statistics.fmean(group[name]))
        for name in order:
            values = group[name]
            paired = [] if plain is None or len(plain) != len(values) else [a - b for a, b in zip(values, plain, strict=True)]
            cells = [f"{v:.1f}" for v in values] + ["–"] * (count - len(values))
            lines.append(_line([name, *cells, *_mean_std(values, ".2f"), *_mean_std(paired, "+.2f")]))
        parts.append("\n".join([*lines, "", "Order of the means: " + _order(group)]))
    return "\n\n".join(parts)


def _order(group: dict[str, Sequence[float]]) -> str:
    """Names by falling mean; "=" between those whose means are printed alike."""
    means = sorted(((statistics.fmean(values), name) for name, values in group.items()), key=lambda pair: -pair[0])
    text = means[0][1]
    for (before, _), (mean, name) in pairwise(means):
        text += (" = " if f"{before:.2f}" == f"{mean:.2f}" else " > ") + name
    return text


def picture(rows: dict[Variant, Row], title: str, path: Path) -> None:
    """What was measured, as Figures 3 and A1 are drawn: cost to the right, accuracy upwards; GMAC where none was measured.

    Raises:
        RuntimeError: no row has a time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {v: r for v, r in rows.items() if "time_ms" in r["measured"]}
    if not timed:
        raise RuntimeError("--plot: expected rows with a time per image, got none")
    upwards = "accuracy" if any("accuracy" in r["measured"] for r in timed.values()) else "gmac"
    timed = {v: r for v, r in timed.items() if upwards in r["measured"]}
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for reduction, marker in zip(dict.fromkeys(v.reduction for v in timed), "os^vDPX*<>", strict=False):
        points = [(r["measured"]["time_ms"], r["measured"][upwards], v) for v, r in timed.items() if v.reduction == reduction]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker, label=reduction)
        for x, y, v in points:
            text = v.method + ("" if v.layer is None else f" @{v.layer}")
            axes.annotate(text, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="ms per image, measured here", ylabel=f"{QUANTITIES[upwards].heading}, measured here", title=title)
    axes.legend(title="tokens")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _method(variant: Variant) -> str:
    return variant.method + ("" if variant.hidden_dim is None else f", {variant.hidden_dim}")


def _tokens(variant: Variant) -> str:
    return {"none": "all"}.get(variant.reduction, variant.reduction) + ("" if variant.layer is None else f" @{variant.layer}")


def _number(value: float | None, digits: str) -> str:
    if value is None:
        return "–"
    text = f"{value:{digits}}".removesuffix(".")
    return f"{float(text):.0f}" if "e+" in text else text


def _published(number: Published | None, digits: str) -> str:
    return "–" if number is None else f"{number.value:g}" + ("†" if number.doubt else "")


def _published_ratio(variant: Variant, quantity: str, of: dict[Variant, dict[str, Published]]) -> float | None:
    if variant == variant.plain:
        return None
    one = of[variant].get(quantity)
    other = of.get(variant.plain, {}).get(quantity) or lookup(*variant.plain.key).get(quantity)
    return None if one is None or other is None else one.value / other.value


def _published_backbone_ratio(variant: Variant, of: dict[Variant, dict[str, Published]]) -> float | None:
    one = of[variant].get("time_ms")
    bare = lookup(variant.model, "full", "none", None).get("time_ms")  # full tuning adds nothing to the backbone
    return None if one is None or bare is None else one.value / bare.value


def _unless_empty(heading: str, cells: list[str]) -> list[_Column]:
    return [] if all(cell == "–" for cell in cells) else [_Column(heading, cells)]


def _mean_std(values: Sequence[float], digits: str) -> tuple[str, str]:
    if not values:
        return "–", "–"
    return f"{statistics.fmean(values):{digits}}", f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
