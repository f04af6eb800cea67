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
from pathlib import Path

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
BACKWARD = {"prepare_backward", "pair_pass", "refined_gradient"}
WEIGHTS = {"weight_partials", "reduce_partials"}


def compiled_rows(target: str, cases: tuple[str, ...], kernels: tuple[str, ...] = ()) -> list[dict]:
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
    """Short grids of D = 384, 768, 1024: one launch forward; it does not spill, shared memory fits, and so many programs at once."""
    from fpet_kernels.triton import configs, report

    rows = compiled_rows(target, SHORT)
    compiled = defaultdict(set)
    for row in rows:
        compiled[row["case"]].add(row["kernel"])
        assert row["shared"] <= configs.TABLES[target].shared, row
        if row["kernel"] == "merge_short":
            assert not row["spills"], row
            case = next(c for c in report.CASES if c.name == row["case"])
            short = configs.TABLES[target].forward[case.x.itemsize, not case.hidden, 128]
            assert short.fit <= row["fit"], f"{row}: the table says {short.fit} at once"
    assert set(compiled) == set(SHORT)
    for case in SHORT:
        assert compiled[case] == {"merge_short"} | BACKWARD | (WEIGHTS if "refined" in case else set())


@pytest.mark.parametrize("target", TARGETS)
def test_long_grids(target):
    """The tiled kernels compile and fit."""
    from fpet_kernels.triton import configs

    rows = compiled_rows(target, ("ViT-L at 1024 bf16, refined",))
    assert {"prepare_keys", "match_tiles", "merge_lists"} | BACKWARD | WEIGHTS <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["shared"] <= configs.TABLES[target].shared, row


def test_float64():
    """float64 takes the tiled kernels, without matrix units."""
    rows = compiled_rows("sm90", ("ViT-B/16 float64, refined",))
    assert "merge_short" not in {row["kernel"] for row in rows}
    assert {"match_tiles"} | BACKWARD | WEIGHTS <= {row["kernel"] for row in rows}


def test_tuner_compiles_and_predicts_without_a_gpu(tmp_path):
    tune = Path(__file__).parents[1] / "benchmarks" / "tune.py"
    if not tune.exists():
        pytest.skip("no benchmarks folder beside tests")
    options = [
        "--dry-run",
        "--slot",
        "forward (2, True, 128)",
        "--candidates",
        "2",
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "rows"),
    ]
    done = subprocess.run([sys.executable, tune, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "rows").read_text()
    assert "dry run: nothing was measured (sm90)" in text
    row = next(line for line in text.splitlines() if "PREDICTED" in line)
    assert row.strip().startswith("(2, True, 128): Short(")
    assert "KiB  1  (2, True, 128): Short(128, 64, 8, 3, 1)" in text, "the frozen configuration is not the first candidate"


class Captured(Exception):
    """Ends a compilation once its graph is there."""


@pytest.fixture
def no_gpu():
    """Torch reads a kernel's code to find what it writes, for the GPU that is there; here for one that is not."""
    from fpet_kernels.triton.report import absent_gpu

    with absent_gpu("sm90"):
        yield


BACKWARD_LAUNCHES = ["prepare_backward", "pair_pass", "refined_gradient", "weight_partials", "reduce_partials"]
SHORT_LAUNCHES = ["merge_short", *BACKWARD_LAUNCHES]
LONG_LAUNCHES = ["prepare_keys", "match_tiles", "join_matches", "merge_lists", "prepare_backward", "pair_pass", "pair_pass",
                 *BACKWARD_LAUNCHES[2:]]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("grid", "launches"), [((14, 14), SHORT_LAUNCHES), ((40, 40), LONG_LAUNCHES)], ids=["short", "long"])
def test_inductor_sees_the_kernels(grid, launches, dynamic, no_gpu):
    """Traced, the operators fall apart into the kernels' launches: nothing opaque is left, and no input is copied for one."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    import fpet_kernels.triton.ops  # noqa: F401  (registers the operators)

    found = []

    def capture(graph, _inputs):
        for node in graph.graph.nodes:
            assert "fpet" not in str(node.target)
            if "triton_kernel_wrapper" in str(node.target):
                found.append((kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__, node))
        raise Captured

    def step(x, key, down, up):
        problem = (None, None, *grid, 1, 1.0, True)
        inputs = (x, key, None, down, up, None, None)
        outputs = torch.ops.fpet.bdm_forward_triton(*inputs, *problem)
        needs = (True, False, True, False, False)
        return outputs[0], *torch.ops.fpet.bdm_backward_triton(outputs[0], None, *inputs, *outputs, *problem, *needs)

    n = 1 + grid[0] * grid[1]
    tensors = (
        torch.empty(3, n, 64),
        torch.empty(3, n, 3, 4, 32).permute(2, 0, 3, 1, 4)[1],
        torch.empty(8, 32),
        torch.empty(32, 8),
    )
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=capture))
    with pytest.raises(BackendCompilerFailed, match="Captured"):
        compiled(*tensors)
    torch._dynamo.reset()
    assert [name for name, _ in found] == launches
    for name, node in found:
        written = node.kwargs["tensors_to_clone"]
        assert written, f"{name} writes nothing"
        copied = [arg for arg in written if node.kwargs["kwargs"][arg].op == "placeholder"]
        assert not copied, f"{name}: Inductor would copy {copied}"
