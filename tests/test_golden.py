"""The authors' published implementation, run in float64: inputs, outputs and gradients in golden/*.npz."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fpet_kernels import checkerboard
from support import DTYPES, Problem, assert_close, assert_near_ties_only, decisions, errors, exact, rounding, run, yardstick

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
OUTPUTS = {"tokens": "out", "size": "size_out", "match": "match", "grad_x": "grad_x", "grad_size": "grad_size"} | {
    "grad_w_down": "grad_w_down",
    "grad_w_up": "grad_w_up",
    "grad_key_delta": "grad_key_refined",
}


def load(path: Path, device: str, dtype: torch.dtype) -> tuple[Problem, dict[str, torch.Tensor]]:
    """The problem in ``dtype`` and the authors' float64 results; a key_delta of zeros reads off the gradient at k'."""
    with np.load(path) as data:
        arrays = {name: torch.from_numpy(data[name]).to(device) for name in data.files if name != "meta"}
        meta = json.loads(str(data["meta"]))
    problem = Problem(
        x=arrays["x"], key=arrays["key"], split=checkerboard(meta["side"], meta["side"]), grid_size=(meta["side"],) * 2,
        num_prefix_tokens=meta["prefix"], size=arrays.get("size"), w_down=arrays.get("w_down"), w_up=arrays.get("w_up"),
        key_delta=torch.zeros_like(arrays["key"]), similarity=meta["similarity"], grad_tokens=arrays["grad_out"],
        grad_size=arrays["grad_size_out"], note=path.stem,
    )  # fmt: skip
    return problem.to(dtype), {name: arrays[theirs] for name, theirs in OUTPUTS.items() if theirs in arrays}


def test_files_are_there():
    assert len(FILES) == 5


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_float64(path, backend, device, max_tokens):
    problem, theirs = load(path, device, torch.float64)
    if problem.x.shape[1] > max_tokens:
        pytest.skip(f"{problem.x.shape[1]} tokens are too many for the interpreter")
    got = run(problem, backend)
    assert torch.equal(got["match"], theirs.pop("match").long())
    assert set(got) == {*theirs, "match"}, "an output of the authors' code is not compared"
    for name, error in errors(got, theirs).items():
        assert error < 1e-11, f"{name}: {error:.3g}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_gradient_at_an_attached_key(path, backend, device, max_tokens):
    """Where nothing refines the key, the gradient at k' is the key's own under detach_key=False."""
    problem, theirs = load(path, device, torch.float64)
    if problem.x.shape[1] > max_tokens:
        pytest.skip(f"{problem.x.shape[1]} tokens are too many for the interpreter")
    problem.w_down = problem.w_up = None
    problem.detach_key = False
    got = run(problem, backend)
    torch.testing.assert_close(got["grad_key"], got["grad_key_delta"], rtol=0, atol=1e-13)
    if "grad_w_down" not in theirs:
        assert errors(got, {"grad_key": theirs["grad_key_delta"]})["grad_key"] < 1e-11


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_reduced_precision(path, dtype, backend, device, max_tokens):
    """At most twice plain PyTorch's error against float64 on the same, rounded inputs; and float32 against the authors'."""
    problem, theirs = load(path, device, dtype)
    if problem.x.shape[1] > max_tokens:
        pytest.skip(f"{problem.x.shape[1]} tokens are too many for the interpreter")
    got = run(problem, backend)
    best, second = decisions(problem, backend)
    assert torch.equal(got["match"], best)
    assert_near_ties_only(problem, best, second)
    if dtype == torch.float32:  # the inputs are float32-representable, and their gaps are wider than its rounding
        assert torch.equal(best, theirs.pop("match").long())
        want = theirs
    else:
        want = exact(problem, best, second)
    plain = yardstick(problem, backend)
    assert_close(problem, got, want, plain, rounding(problem, best, second))
    for name, error in errors(got, want).items():  # the rule without its allowance, on the worst element of each output
        ulp = torch.finfo(got[name].dtype).eps * float(want[name].abs().max())
        assert backend == "reference" or error <= 2 * plain[name] + ulp / 2, f"{name}: {error:.3g}, plain {plain[name]:.3g}"
