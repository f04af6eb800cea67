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
    assert {"match_tiles", "row_pass", "column_pass", "refined_gradient", "weight_partials"} <= {row["kernel"] for row in rows}


def test_inductor_sees_the_kernels():
    """Functionalised, as AOTAutograd does it, the operators fall apart into the kernels' launches: nothing opaque is left."""
    import torch
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from fpet_kernels.triton import configs
    from fpet_kernels.triton import ops as _  # noqa: F401  (registers the operators)

    def step(x, key, delta):
        problem = (None, None, 14, 14, 1, 1.0, True)
        inputs = (x, key, None, None, None, None, delta)
        outputs = torch.ops.fpet.bdm_forward_triton(*inputs, *problem)
        needs = (True, False, False, True, False)
        return outputs[0], *torch.ops.fpet.bdm_backward_triton(outputs[0], None, *inputs, *outputs, *problem, *needs)

    def functionalised(*tensors):
        with FunctionalTensorMode():
            outputs = step(*(FunctionalTensor.to_functional(t) for t in tensors))
            return [torch._from_functional_tensor(t.elem) for t in outputs]

    with configs.pretend("sm90"), FakeTensorMode():
        tensors = [torch.empty(4, 197, width, dtype=torch.bfloat16, device="cuda") for width in (768, 64, 64)]
        graph = make_fx(functionalised)(*tensors).graph
    launched = [
        kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
        for node in graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    assert launched == ["merge_short", "prepare_backward", "backward_short", "refined_gradient"]
    assert not [node for node in graph.nodes if "fpet" in str(node.target)]
