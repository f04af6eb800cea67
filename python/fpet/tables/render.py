"""Rows as Markdown tables and as a picture: what was measured and what was published, never in one column."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .measure import MODELS, Variant
from .published import Published, lookup

__all__ = ["QUANTITIES", "Quantity", "conditions", "embedded_table", "merge_rows", "picture", "variant_of", "variant_table"]

Row = dict[str, Any]


class Quantity(NamedTuple):
    """Attributes: heading, with its unit; digits; ratio, whether the ratio to the plain method is shown."""

    heading: str
    digits: str
    ratio: bool


QUANTITIES = {
    "accuracy": Quantity("accuracy %", ".1f", False),
    "time_ms": Quantity("ms/image", "#.3g", True),
    "step_ms": Quantity("step ms/image", "#.3g", True),
    "gmac": Quantity("GMAC", ".2f", True),
    "memory_gb": Quantity("training GB", ".2f", True),
    "reserved_gb": Quantity("reserved GB", ".2f", True),
    "parameters_m": Quantity("tuned M", ".3f", False),
    "stored_kib": Quantity("stored KiB", ".1f", False),
}
"""What is measured: time of inference and of a step of tuning, per image; 10⁹ multiply-adds of the forward of one image;
10⁹ bytes at the batch of the paper, of tensors and of what the allocator takes from a GPU for them; 10⁶ parameters of the
method and the refinement, and what these take to store."""


def variant_of(row: Row) -> Variant:
    return Variant(row["model"], row["method"], row["reduction"], row["layer"])


def merge_rows(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[Variant, Row]]:
    """Rows by setting (device, dtype, attention) and variant; what was measured later replaces what was measured before."""
    merged: dict[tuple[Any, ...], dict[Variant, Row]] = {}
    for row in rows:
        if row["model"] == "embedded":
            continue
        setting = tuple(row[name] for name in ("device", "dtype", "attention"))
        old = merged.setdefault(setting, {}).get(variant_of(row), {})
        united = {name: {**old.get(name, {}), **row[name]} for name in ("measured", "ratio", "backbone_ratio", "conditions")}
        merged[setting][variant_of(row)] = {**row, **united}
    return merged


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: list[str]


def variant_table(variants: Sequence[Variant], quantities: Sequence[str], rows: dict[Variant, Row]) -> str:
    """Markdown: a line for each variant. Columns "here" come from ``rows`` alone, columns "paper" from what was published."""
    variants = [v for v in variants if v in rows]
    if not variants:
        return "not measured"
    columns = []
    if len({v.model for v in variants}) > 1:
        columns.append(_Column("backbone", [MODELS[v.model].title for v in variants]))
    columns += [_Column("method", [v.method for v in variants]), _Column("tokens", [_tokens(v) for v in variants])]
    absent: list[str] = []
    for name in quantities:
        quantity = QUANTITIES[name]
        here = [rows[v]["measured"].get(name) for v in variants]
        paper = [lookup(v.model, v.method, v.reduction, v.layer).get(name) for v in variants]
        if all(value is None for value in here):
            absent.append(quantity.heading)
        columns.append(_Column(f"{quantity.heading}, here", [_number(value, quantity.digits) for value in here]))
        columns += _unless_empty(f"{quantity.heading}, paper", [_published(p, quantity.digits) for p in paper])
        if quantity.ratio:
            columns += _unless_empty("× plain, here", [_number(rows[v]["ratio"].get(name), ".3f") for v in variants])
            columns += _unless_empty("× plain, paper", [_number(_published_ratio(v, name), ".3f") for v in variants])
        if name == "time_ms":
            columns += _unless_empty(
                "× backbone, here", [_number(rows[v]["backbone_ratio"].get(name), ".3f") for v in variants]
            )
            columns += _unless_empty("× backbone, paper", [_number(_published_backbone_ratio(v), ".3f") for v in variants])
    lines = [_line([c.heading for c in columns]), _line(["---", "---", *["---:"] * (len(columns) - 2)])]
    lines += [_line([c.cells[i] for c in columns]) for i in range(len(variants))]
    if absent:
        lines += ["", f"Not measured: {', '.join(absent)}."]
    doubts = [
        f"† {v.method}, {_tokens(v)}, {QUANTITIES[name].heading}: {p.doubt}."
        for v in variants
        for name, p in lookup(v.model, v.method, v.reduction, v.layer).items()
        if p.doubt and name in quantities
    ]
    lines += ["", *doubts] if doubts else []
    return "\n".join(lines)


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
        parts.append("\n".join([*lines, "", "Order of the means: " + " > ".join(order)]))
    return "\n\n".join(parts)


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


def _tokens(variant: Variant) -> str:
    return {"none": "all"}.get(variant.reduction, variant.reduction) + ("" if variant.layer is None else f" @{variant.layer}")


def _number(value: float | None, digits: str) -> str:
    if value is None:
        return "–"
    text = f"{value:{digits}}".removesuffix(".")
    return f"{float(text):.0f}" if "e+" in text else text


def _published(number: Published | None, digits: str) -> str:
    return "–" if number is None else f"{number.value:g}" + ("†" if number.doubt else "")


def _published_ratio(variant: Variant, quantity: str) -> float | None:
    if variant == variant.plain:
        return None
    plain = variant.plain
    one, other = (lookup(v.model, v.method, v.reduction, v.layer).get(quantity) for v in (variant, plain))
    return None if one is None or other is None else one.value / other.value


def _published_backbone_ratio(variant: Variant) -> float | None:
    one = lookup(variant.model, variant.method, variant.reduction, variant.layer).get("time_ms")
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
