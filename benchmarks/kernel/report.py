"""Tables and pictures of the kernel benchmark's rows."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fpet_kernels import backends
from harness.cases import require
from harness.rows import Row, latest

from .implementations import BASELINES, PAPER, PAPER_COMPILED, REFERENCE

LABELS = {
    REFERENCE: "fpet_kernels.reference, eager",
    PAPER: "paper's formulation, eager",
    PAPER_COMPILED: "paper's formulation, compiled",
}


def label(name: str) -> str:
    """What a table calls an implementation."""
    if name.startswith("indexed_"):
        return f"indexed PyTorch ({name.removeprefix('indexed_')}), compiled"
    return LABELS.get(name, f"bdm_merge, {name}")


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A figure with ``digits`` significant places, never in exponents; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}{unit}"


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same setting together, the latest of each implementation."""
    setting = ("device", "case", "batch", "dtype", "mode", "timing", "key", "refinement", "malloc")
    return latest(rows, setting, ("implementation",))


HEADINGS = ("ms/image", "× reference", "× paper", "× paper compiled", "× best PyTorch", "GB/s", "of copy", "extra MB")
OVER_FLOOR = "÷ floor"


def table(group: list[Row]) -> str:
    """One setting as text."""
    first = group[0]
    what = "strided per-head keys" if first["key"] == "heads" else "averaged keys"
    what += f", refinement h = {first['refinement']}" if first["refinement"] else ", no refinement"
    kind = "" if first["device"] == "cpu" else f", {first['timing']} timing, cold L2"
    lines = [
        f"{first['case']} · batch {first['batch']} · {first['dtype']} · {first['mode']} · {first['device']}{kind}",
        f"  N {first['tokens']}, D {first['dim']}, {what}; {first['bytes_per_image'] / 1e6:.2f} MB per image, "
        f"floor {number(first['floor_ms_per_image'])} ms at {number(first['copy_gb_per_s'])} GB/s of copying",
    ]
    names = [label(r["implementation"]) for r in group]
    width = max(map(len, names))
    headings = HEADINGS if first["device"] == "cpu" else (OVER_FLOOR, *HEADINGS)
    lines.append("  " + " " * width + "".join(f"{h:>{max(10, len(h) + 2)}}" for h in headings))
    for name, r in zip(names, group, strict=True):
        cells = [
            number(r["ms_per_image"]),
            *(number(r.get(f"speedup_over_{b}")) for b in BASELINES),
            number(r["gb_per_s"]),
            f"{100 * r['share_of_copy']:.0f} %",
            number(r["peak_extra_mb"]),
        ]
        if headings is not HEADINGS:
            cells.insert(0, number(1 / r["share_of_copy"]))
        lost = f"   loses {r['lost_tokens']} tokens in {r['of_images']} images" if r["lost_tokens"] else ""
        lines.append(
            f"  {name:<{width}}" + "".join(f"{c:>{max(10, len(h) + 2)}}" for c, h in zip(cells, headings, strict=True)) + lost
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Bars of ms per image, one panel per setting, with the floor drawn in."""
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [g for g in grouped(rows) if g[0]["timing"] == ("graph" if g[0]["device"] == "cuda" else "plain")]
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.2 * columns, 0.5 + 2.1 * lines), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        indexed = [r for r in group if r["implementation"].startswith("indexed_")]
        best = min(indexed, key=lambda r: r["ms_per_image"], default=None)
        bars = [r for r in group if r is best or r not in indexed]
        bars.sort(key=lambda r: r["ms_per_image"])
        names = ["best PyTorch found, compiled" if r is best else label(r["implementation"]) for r in bars]
        fused = [r["implementation"] in backends.ORDER and r["implementation"] != REFERENCE for r in bars]
        drawn = axis.barh(names, [r["ms_per_image"] for r in bars], color=["#c0392b" if f else "#95a5a6" for f in fused])
        axis.bar_label(drawn, [number(r["ms_per_image"]) for r in bars], padding=3, fontsize=8)
        floor = bars[0]["floor_ms_per_image"]
        axis.axvline(floor, color="black", linewidth=1, linestyle=":")
        axis.annotate("copy", (floor, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom")
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("ms per image (lower is better)", fontsize=8)
        head = bars[0]
        axis.set_title(f"{head['case']}, batch {head['batch']}, {head['dtype']}, {head['mode']}", fontsize=9, pad=12)
    machine = rows[0].get("gpu") or f"{rows[0].get('cpu')}, {rows[0].get('threads')} threads"
    figure.suptitle(f"{machine} · torch {rows[0].get('torch')}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
