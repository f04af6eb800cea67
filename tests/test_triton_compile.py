"""What the compiler makes of the Triton kernels for GPUs that are not here: no spills, no more shared memory than there is.

Compiled in a process of their own, because the interpreter, once chosen, leaves nothing to compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "") not in ("", "0"),
        reason="TRITON_INTERPRET is set: these are the compiler's checks, run without it",
    ),
]

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
SHORT = ("ViT-S/16 bf16", "ViT-B/16 bf16", "ViT-L/16 bf16", "ViT-B/16 autocast, refined", "ViT-B/16 bf16, refined")
FUSED = {"merge_short", "backward_short"}


def report(target: str, cases: tuple[str, ...], kernels: tuple[str, ...] = ()) -> list[dict]:
    """Rows of ``python -m fpet_kernels.triton.report``."""
    options = [f"--target={target}", "--json", *(f"--case={c}" for c in cases), *(f"--kernel={k}" for k in kernels)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fpet_kernels.triton.report", *options], capture_output=True, text=True, env=environment
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, f"nothing was compiled:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_short_grids(target):
    """Everything that short grids of D = 384, 768, 1024 launch fits, and the fused kernels keep their values in registers."""
    from fpet_kernels.triton import configs

    rows = report(target, SHORT)
    compiled = defaultdict(set)
    for row in rows:
        compiled[row["case"]].add(row["kernel"])
        assert row["shared"] <= configs.TABLES[target].shared, row
        if row["kernel"] in FUSED:
            assert row["spills"] == 0, row
    assert set(compiled) == set(SHORT)
    for case in SHORT:
        assert "merge_short" in compiled[case], f"{case}: the forward is not fused"
    for case in SHORT[:3]:
        assert "backward_short" in compiled[case], f"{case}: the backward is not fused"


@pytest.mark.parametrize("target", TARGETS)
def test_long_grids(target):
    """The tiled kernels compile and fit."""
    from fpet_kernels.triton import configs

    rows = report(target, ("ViT-L at 1024 bf16, refined",))
    assert {"prepare_keys", "match_tiles", "merge_lists", "row_pass", "column_pass"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["shared"] <= configs.TABLES[target].shared, row


def test_float64():
    """float64 takes the tiled kernels, without matrix units."""
    rows = report("sm90", ("ViT-B/16 float64, refined",))
    assert not FUSED & {row["kernel"] for row in rows}
    assert {"match_tiles", "row_pass", "column_pass", "key_gradient", "weight_partials"} <= {row["kernel"] for row in rows}
