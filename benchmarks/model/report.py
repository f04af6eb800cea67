"""Tables of the benchmark of whole models."""

from __future__ import annotations

from collections.abc import Iterable

from harness.rows import Row, latest

from .implementations import FPET, HIDDEN, TIMM, TOME

HEADINGS = ("ms/image", "× timm", "CPU ms", "× timm", "GFLOP", "× timm", "extra MB", "× timm", "merging")
LABELS = {TIMM: "timm, unpatched", FPET: "fpet, bdm_merge", TOME: "ToMe's matching"}


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same setting together, the latest of each implementation and execution."""
    return latest(rows, ("device", "model", "layer", "batch", "dtype", "mode", "threads"), ("implementation", "execution"))


def table(group: list[Row]) -> str:
    """One setting as text."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else f"{value:{form}}"

    first = group[0]
    left = next((r["tokens_left"] for r in group if r["tokens_left"]), None)
    what = "forward" if first["mode"] == "inference" else f"step with AdaptFormer, {HIDDEN} hidden units"
    lines = [
        f"{first['timm_name']}, {first['image_size']} pixels · batch {first['batch']} · {first['dtype']} · {first['mode']} "
        f"({what}) · {first['device']}",
        f"  merging in block {first['layer']}: {first['tokens']} tokens → {left}; SDPA on all sides; medians of "
        f"{first['rounds']} rounds",
    ]
    names = [f"{LABELS[r['implementation']]}, {r['execution']}" for r in group]
    width = max(map(len, names))
    lines.append("  " + " " * width + "".join(f"{h:>10}" for h in HEADINGS))
    for name, r in zip(names, group, strict=True):
        share = r["merging_share"]
        cells = (
            number(r["ms_per_image"], ".3g" if r["ms_per_image"] < 100 else ".0f"), number(r["time_ratio"], ".3f"),
            number(r.get("processor_ms_per_image"), ".3g"), number(r.get("processor_time_ratio"), ".3f"),
            number(r["gflops_per_image"], ".1f"), number(r["flop_ratio"], ".3f"), number(r["peak_extra_mb"], ".0f"),
            number(r["memory_ratio"], ".2f"), "–" if share is None else f"{100 * share:.2f} %",
        )  # fmt: skip
        lines.append(f"  {name:<{width}}" + "".join(f"{c:>10}" for c in cells))
    return "\n".join(lines)
