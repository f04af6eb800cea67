"""No tensor of N_A × N_B elements outside the reference: extra memory is far below it, and grows with N.

On the CPU the peak resident set of a fresh process is measured, which no allocation escapes; on a GPU the peak of PyTorch's
allocator. The same measurement of the reference shows that the method sees a dense matrix where there is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fpet_kernels import checkerboard
from support import full_problem, run

pytestmark = pytest.mark.alone

SCRIPT = """
import sys
import json
import torch
from pathlib import Path
from support import full_problem, run

def status(field):  # bytes
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field)) * 1024

torch.set_num_threads(2)
backend, side, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
problem = full_problem(grid=(side, side), **options)
run(full_problem(grid=(8, 8), **options), backend)  # threads, code and pools exist before
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
outputs = run(problem, backend)
print(status("VmHWM") - before - sum(t.nbytes for t in outputs.values()))
"""


EVERYTHING = dict(dim=32, channels=32, hidden=32)  # every input given, every gradient asked for
# ViT-B tuned by FPET
PAPER = dict(dim=768, channels=64, hidden=32, heads=12, size=False, mask=False, delta=False, detach_key=True)


def extra(backend: str, device: str, side: int, batch: int, **options: Any) -> int:
    """Bytes that forward and backward of a batch of side × side grids hold at most, beyond their inputs and results."""
    options = {**(options or EVERYTHING), "batch": batch}
    if device == "cuda":
        problem = full_problem(grid=(side, side), **options, device=device)
        run(problem, backend)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = run(problem, backend)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in outputs.values())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(side), json.dumps(options)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def measurable(device, max_tokens):
    if max_tokens < 4097:
        pytest.skip("the interpreter's own memory would be measured")
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a process is read from Linux's /proc")


@pytest.mark.parametrize("options", [EVERYTHING, PAPER], ids=["everything", "paper"])
def test_4097_tokens(fused, device, measurable, options):
    """Below a thirtieth of the reference's extra memory, and below one byte for every pair of a source and a destination."""
    batch, split = 4, checkerboard(64, 64)
    pairs = batch * split.a.numel() * split.b.numel()
    dense, got = extra("reference", device, 64, batch, **options), extra(fused, device, 64, batch, **options)
    assert dense > 4 * pairs, (
        f"the dense reference was measured at {dense} bytes, less than one float32 for each of {pairs} pairs"
    )
    assert got < pairs, f"{got} bytes for {pairs} pairs"
    assert got < dense / 30, f"{got} bytes, the reference {dense}: 1/{dense / got:.1f}"


def test_growth_is_linear(fused, device, measurable):
    """Four times the tokens: at most five times the memory, where a dense matrix takes sixteen."""
    wide = {**EVERYTHING, "dim": 512}  # so much work that the CPU's threads share it, however busy the machine is
    small, large = extra(fused, device, 48, 1, **wide), extra(fused, device, 96, 1, **wide)
    slack = 1 << 20  # pages and the allocator's granularity
    assert large < 5 * small + slack, f"{small} bytes at 2305 tokens, {large} at 9217"
