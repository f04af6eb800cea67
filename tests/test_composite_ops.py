"""The operators where no binary was built: the composite implementations give the authors' results too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from fpet_kernels import backends
from support import DTYPES, check, errors, full_problem, random_problem, run
from test_golden import FILES, load

assert not backends.status("cpu").available
assert backends.select(torch.ones(1), None) == "reference"
backends._NATIVE = backends.Status(True, "the composite implementations under the operators' names")
for path in FILES:
    problem, theirs = load(path, "cpu", torch.float64)
    got = run(problem, "cpu")
    assert torch.equal(got["match"], theirs.pop("match").long())
    for name, error in errors(got, theirs).items():
        assert error < 1e-11, f"{path.stem} {name}: {error:.3g}"
for dtype in DTYPES:
    for similarity in ("cosine", "dot"):
        check(full_problem(dtype=dtype, similarity=similarity), "cpu")
        check(full_problem(dtype=dtype, similarity=similarity, detach_key=True, heads=0), "cpu")
        check(random_problem((3, 5), dtype=dtype, similarity=similarity, prefix=3), "cpu")
print("checked")
"""


def test_golden_and_gradients_without_the_library():
    environment = {**os.environ, "FPET_DISABLE_NATIVE": "1", "FPET_REQUIRE_BACKENDS": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked\n"
