"""Importing fpet_kernels costs nothing it does not need, and the doctor reports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fpet_kernels import __version__, backends


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


IMPORT = """
import sys
import torch
before = set(sys.modules)
import fpet_kernels
from fpet_kernels import bdm_merge
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "timm", "torchvision", "fpet"}), torch.cuda.is_initialized())
"""
CALL = """
x = torch.ones(1, 5, 4, requires_grad=True)
bdm_merge(x, x, grid_size=(2, 2)).tokens.sum().backward()
print(sorted({"triton", "timm"} & set(sys.modules)), torch.cuda.is_initialized())
"""


@pytest.mark.parametrize("native", ["", "1"], ids=["native", "no native"])
def test_light(native):
    """Neither Triton nor timm nor a CUDA context, no warning and no output: at import, and at a call on the CPU."""
    done = python("-W", "error", "-c", IMPORT + CALL, FPET_DISABLE_NATIVE=native, TRITON_INTERPRET="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] False", "[] False"]


def test_works_without_triton_and_numpy():
    """Nothing but torch is needed."""
    hide = "import sys\nfor name in ('triton', 'timm', 'torchvision', 'hypothesis'): sys.modules[name] = None\n"
    done = python("-c", hide + IMPORT + CALL.replace('print(sorted({"triton", "timm"} & set(sys.modules)), ', "print("))
    assert done.returncode == 0, done.stderr


def test_flop_formulas_are_there_whichever_is_imported_first():
    """torch.utils.flop_counter imports Triton, so it is not imported with the package; the formulas follow it."""
    count = """
import torch
x = torch.ones(1, 5, 4)
with FlopCounterMode(display=False) as counter:
    torch.ops.fpet.bdm_forward(x, x, None, None, None, None, None, None, None, 2, 2, 1, 1.0, True)
print(counter.get_total_flops())
"""
    first, second = "from torch.utils.flop_counter import FlopCounterMode\n", "import fpet_kernels\n"
    for script in (first + second, second + first):
        done = python("-c", script + count)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{2 * 2 * 2 * 4}\n"


def test_public_names():
    import fpet_kernels

    for name in fpet_kernels.__all__:
        assert hasattr(fpet_kernels, name), name
        assert name.startswith("__") or getattr(fpet_kernels, name).__doc__, f"{name} has no docstring"


def test_doctor():
    """python -m fpet_kernels: versions, and every backend with its state."""
    done = python("-m", "fpet_kernels")
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout
    for name in backends.ORDER:
        assert name in done.stdout
