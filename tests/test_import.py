"""Importing fpet_kernels costs nothing it does not need, and the doctor reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fpet_kernels
from fpet_kernels import __version__, backends

PACKAGE = Path(fpet_kernels.__file__).parent


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "FPET_DISABLE_NATIVE": "", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=cwd)


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


def test_flop_formulas_are_there_whatever_is_imported_or_looked_for_first():
    """torch.utils.flop_counter imports Triton, so it is not imported with the package; the formulas follow it."""
    count = """
import torch
x = torch.ones(1, 5, 4)
with FlopCounterMode(display=False) as counter:
    torch.ops.fpet.bdm_forward(x, x, None, None, None, None, None, None, None, 2, 2, 1, 1.0, True)
print(counter.get_total_flops())
"""
    first, second = "from torch.utils.flop_counter import FlopCounterMode\n", "import fpet_kernels\n"
    look = "import importlib.util\nimportlib.util.find_spec('torch.utils.flop_counter')\n"
    purge = "import sys\nimport torch.utils.flop_counter\ndel sys.modules['torch.utils.flop_counter']\n"
    for script in (first + second, second + first, second + look + first, look + second + look + first, second + purge + first):
        done = python("-c", script + count)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{2 * 2 * 2 * 4}\n"


@pytest.mark.parametrize(
    "stub",
    [
        "types.ModuleType('triton')",
        "unittest.mock.MagicMock()",
        "type('Stub', (types.ModuleType,), {'__getattr__': lambda self, name: None})('triton')",
        "types.SimpleNamespace(__version__='3.0.0', __spec__=importlib.machinery.ModuleSpec('triton', None))",
        "None",
    ],
)
def test_something_else_called_triton(stub):
    """A stand-in, as documentation builders and tests put one in sys.modules, is no backend, and no obstacle."""
    setup = f"import sys, types, importlib.machinery, unittest.mock, torch\nsys.modules['triton'] = {stub}\n"
    done = python(
        "-c",
        setup
        + "import fpet_kernels\nfrom fpet_kernels import bdm_merge"
        + CALL.replace("print(", "(")
        + "print(fpet_kernels.explain())",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "triton     no: " + ("the package triton is not" if stub == "None" else "sys.modules['triton'] is not") in done.stdout
    )


AGAIN = """
import sys, torch, fpet_kernels
first = fpet_kernels
for _ in range(2):
    for name in [name for name in sys.modules if name.partition(".")[0] == "fpet_kernels"]:
        del sys.modules[name]
    import fpet_kernels
    from fpet_kernels import bdm_merge, bdm_unmerge
    assert fpet_kernels is not first
    x = torch.randn(2, 21, 8, requires_grad=True)
    def loss(x, backend=None):
        merged = bdm_merge(x, x, grid_size=(4, 5), detach_key=False, backend=backend)
        return bdm_unmerge(merged.tokens, merged.match, grid_size=(4, 5)).square().sum()
    (want,) = torch.autograd.grad(loss(x, "reference"), x)
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], want)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(x.detach()), want)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        torch.ops.fpet.bdm_forward(x, x, None, None, None, None, None, None, None, 4, 5, 1, 1.0, True)
    assert counter.get_total_flops() == 2 * 2 * 10 * 10 * 8
"""


@pytest.mark.parametrize("native", ["", "1"], ids=["native", "no native"])
def test_a_second_import(native):
    """After a purge of sys.modules, as notebooks and test runners do it, everything works as at first."""
    done = python("-c", AGAIN, FPET_DISABLE_NATIVE=native)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("record", ["", "{", "[]", '{"native": true}', '{"native": false, "cuda": 3}', "\xff\xfe"])
def test_a_damaged_build_record(record, tmp_path):
    """Neither the import nor a call minds; the doctor says what is wrong."""
    package = tmp_path / "fpet_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (package / "_build_info.json").write_bytes(record.encode("latin-1"))
    cuda = "import sys, torch\ntorch.version.cuda = '13.0'\n"  # whose library's record is asked for at import
    done = python("-c", cuda + "from fpet_kernels import bdm_merge" + CALL, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = python("-m", "fpet_kernels", PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert ("the record of the build is damaged" in done.stdout) == (record != '{"native": true}'), done.stdout


def test_import_from_a_zip(tmp_path):
    """No library can be loaded out of an archive: the reference steps in, and says so."""
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", PACKAGE.parent, "fpet_kernels")
    code = "import sys, fpet_kernels, torch\nfrom fpet_kernels import bdm_merge" + CALL + "print(fpet_kernels.explain(x))"
    done = python("-W", "error", "-c", code, PYTHONPATH=archive, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"libfpet_ops.so can't be loaded out of {archive}; fix: unpack it" in done.stdout
    assert "bdm_merge takes 'reference'" in done.stdout


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
