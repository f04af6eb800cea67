"""What concerns the CPU's kernels alone: the choice of an instruction set, and threads beside busy processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fpet_kernels import KeyRefinement, backends, bdm_merge

pytestmark = pytest.mark.skipif(not backends.status("cpu").available, reason="the native CPU library is not built")

MERGE = """
import torch
from fpet_kernels import bdm_merge
print(float(bdm_merge(torch.ones(1, 17, 8), torch.eye(17)[None], grid_size=(4, 4)).size.sum()))
"""


def merge_with(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FPET_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", MERGE], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["axv2", "AVX2", "avx2 ", "reference"])
def test_an_unknown_instruction_set_is_refused(isa: str) -> None:
    found = merge_with(isa)
    assert found.returncode != 0
    assert "RuntimeError: FPET_CPU_ISA: expected one of " in found.stderr
    assert f"baseline, or nothing; got {isa}" in found.stderr


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    cpu = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpu.exists() or "avx512_bf16" in cpu.read_text():
        pytest.skip("this machine may have every instruction set")
    found = merge_with("avx512bf16")
    assert found.returncode != 0
    assert "got avx512bf16, which this machine does not have" in found.stderr


@pytest.mark.parametrize("isa", ["baseline", ""])
def test_a_known_instruction_set_is_taken(isa: str) -> None:
    found = merge_with(isa)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == 17


def test_the_doctor_tells_of_an_unknown_instruction_set() -> None:
    environment = {**os.environ, "FPET_CPU_ISA": "axv2"}
    found = subprocess.run([sys.executable, "-m", "fpet_kernels"], env=environment, capture_output=True, text=True)
    assert "FPET_CPU_ISA: expected one of " in found.stdout
    assert "Traceback" not in found.stdout + found.stderr


@pytest.mark.parametrize("batch", [1, 3])
def test_busy_cores_change_no_bit(batch: int) -> None:
    """Threads that get no core begin late or are stopped midway; calls then move to the caller's thread and back."""
    generator = torch.Generator().manual_seed(0)
    x, key = torch.randn(batch, 197, 96, generator=generator), torch.randn(batch, 3, 197, 32, generator=generator)
    weights = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((16, 32), (32, 16))]
    x.requires_grad_()

    def call() -> list[torch.Tensor]:
        merged = bdm_merge(x, key, grid_size=(14, 14), refinement=KeyRefinement(*weights), backend="cpu")
        return [*merged, *torch.autograd.grad(merged.tokens.square().sum() + merged.size.square().sum(), [x, *weights])]

    want = call()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for got, expected in zip(call(), want, strict=True):
                assert torch.equal(got, expected)
    finally:
        for process in busy:
            process.kill()
            process.wait()
