"""Wrong arguments: the error names the argument, what was expected and what came; nothing is touched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fpet_kernels import KeyRefinement, backends, bdm_merge, bdm_unmerge, checkerboard, explain
from support import backward_op_args, full_problem, op_args

W = dict(w_down=torch.zeros(4, 8), w_up=torch.zeros(8, 4))


def call(**changes):
    """A correct call (B 2, N 1 + 4·5, D 6, C 8) with some arguments changed."""
    arguments = {"x": torch.ones(2, 21, 6), "key": torch.ones(2, 21, 8), "grid_size": (4, 5), **changes}
    x, key = arguments.pop("x"), arguments.pop("key")
    return bdm_merge(x, key, **arguments)


def refinement(**changes) -> KeyRefinement:
    return KeyRefinement(**{**W, **changes})


MERGE = {
    "x is an array": (dict(x=[[1.0]]), TypeError, r"x: expected a torch.Tensor, got list"),
    "x is 2-D": (dict(x=torch.ones(21, 6)), ValueError, r"x: expected \(B, N, D\), got shape \(21, 6\)"),
    "x is integer": (dict(x=torch.ones(2, 21, 6, dtype=torch.int64)), TypeError, r"x: expected float32.*got torch.int64"),
    "x is complex": (dict(x=torch.ones(2, 21, 6, dtype=torch.complex64)), TypeError, r"x: expected float32.*got torch.complex64"),
    "x has no feature": (dict(x=torch.ones(2, 21, 0)), ValueError, r"x.*: expected D.* at least 1, got.*\(2, 21, 0\)"),
    "key is None": (dict(key=None), TypeError, r"key: expected a torch.Tensor, got NoneType"),
    "key is 2-D": (dict(key=torch.ones(21, 8)), ValueError, r"key: expected \(B, N, C\) or \(B, heads, N, C\), got shape \(21, 8\)"),
    "key is 5-D": (dict(key=torch.ones(1, 1, 1, 21, 8)), ValueError, r"key: expected .*got shape \(1, 1, 1, 21, 8\)"),
    "key is bool": (dict(key=torch.ones(2, 21, 8, dtype=torch.bool)), TypeError, r"key: expected float32.*got torch.bool"),
    "key has another B": (dict(key=torch.ones(3, 21, 8)), ValueError, r"key: expected B = 2 and N = 21, as x, got shape \(3, 21, 8\)"),
    "key has another N": (dict(key=torch.ones(2, 20, 8)), ValueError, r"key: expected B = 2 and N = 21, as x, got shape \(2, 20, 8\)"),
    "key has heads last": (dict(key=torch.ones(2, 21, 4, 8)), ValueError, r"key: expected B = 2 and N = 21.*got shape \(2, 21, 4, 8\)"),
    "key has no channel": (dict(key=torch.ones(2, 21, 0)), ValueError, r"key: expected .*C.* at least 1, got.*\(2, 21, 0\)"),
    "key has no head": (dict(key=torch.ones(2, 0, 21, 8)), ValueError, r"key: expected .*heads.* at least 1, got.*\(2, 0, 21, 8\)"),
    "key is elsewhere": (dict(key=torch.ones(2, 21, 8, device="meta")), ValueError, r"key: expected device cpu, as x, got meta"),
    "grid does not fit": (dict(grid_size=(4, 6)), ValueError, r"x: expected N = 1 prefix tokens \+ 24 of a 4×6 grid = 25, got N = 21"),
    "prefix does not fit": (dict(num_prefix_tokens=2), ValueError, r"x: expected N = 2 prefix tokens \+ 20 .*= 22, got N = 21"),
    "negative prefix": (dict(num_prefix_tokens=-1), ValueError, r"num_prefix_tokens: expected at least 0, got -1"),
    "fractional prefix": (dict(num_prefix_tokens=1.0), TypeError, r"num_prefix_tokens: expected an int.*got"),
    "grid of one row of three": (dict(x=torch.ones(2, 4, 6), key=torch.ones(2, 4, 8), grid_size=(1, 3)), ValueError, r"two destinations"),
    "grid of nothing": (dict(grid_size=(0, 20)), ValueError, r"expected a positive integer, got 0"),
    "grid of one number": (dict(grid_size=20), (TypeError, ValueError), r"grid_size: expected \(H, W\), got 20"),
    "grid of three numbers": (dict(grid_size=(1, 4, 5)), ValueError, r"grid_size: expected \(H, W\), got \(1, 4, 5\)"),
    "grid of fractions": (dict(grid_size=(4.0, 5.0)), ValueError, r"expected a positive integer, got 4.0"),
    "neither grid nor split": (dict(grid_size=None), ValueError, r"grid_size, split: expected exactly one of them, got neither"),
    "grid and split": (dict(split=checkerboard(4, 5)), ValueError, r"grid_size, split: expected exactly one of them, got both"),
    "split of another type": (dict(grid_size=None, split=(4, 5)), TypeError, r"split: expected a fpet_kernels.Split, got tuple"),
    "split does not fit": (dict(grid_size=None, split=checkerboard(4, 4)), ValueError, r"x: expected N = 1 prefix tokens \+ 16 .*got N = 21"),
    "similarity": (dict(similarity="l2"), ValueError, r"similarity: expected 'cosine' or 'dot', got 'l2'"),
    "size is 2-D": (dict(size=torch.ones(2, 21)), ValueError, r"size: expected shape \(2, 21, 1\), got \(2, 21\)"),
    "size is integer": (dict(size=torch.ones(2, 21, 1, dtype=torch.int32)), TypeError, r"size: expected float32.*got torch.int32"),
    "size is a number": (dict(size=1.0), TypeError, r"size: expected a torch.Tensor, got float"),
    "size is elsewhere": (dict(size=torch.ones(2, 21, 1, device="meta")), ValueError, r"size: expected device cpu, as x, got meta"),
    "delta of another C": (dict(key_delta=torch.ones(2, 21, 7)), ValueError, r"key_delta: expected shape \(2, 21, 8\), got \(2, 21, 7\)"),
    "delta is bool": (dict(key_delta=torch.ones(2, 21, 8, dtype=torch.bool)), TypeError, r"key_delta: expected float32.*got torch.bool"),
    "refinement is a tuple": (dict(refinement=tuple(W.values())), TypeError, r"refinement: expected a fpet_kernels.KeyRefinement, got tuple"),
    "w_down is 1-D": (dict(refinement=refinement(w_down=torch.ones(8))), ValueError, r"refinement.w_down: expected shape \(h, 8\).*got \(8,\)"),
    "w_down of another C": (dict(refinement=refinement(w_down=torch.ones(4, 7))), ValueError, r"w_down: expected shape \(4, 8\), got \(4, 7\)"),
    "w_down is None": (dict(refinement=refinement(w_down=None)), (TypeError, ValueError), r"refinement.w_down: expected .*got NoneType"),
    "no hidden unit": (dict(refinement=refinement(w_down=torch.ones(0, 8))), ValueError, r"w_down: expected .*h of at least 1, got \(0, 8\)"),
    "w_up transposed": (dict(refinement=refinement(w_up=torch.ones(4, 8))), ValueError, r"w_up: expected shape \(8, 4\), got \(4, 8\)"),
    "w_up of another dtype": (
        dict(refinement=refinement(w_up=torch.ones(8, 4, dtype=torch.float64))), TypeError, r"w_up: expected torch.float32, as w_down, got torch.float64"),
    "w_up is integer": (dict(refinement=refinement(w_up=torch.ones(8, 4).int())), TypeError, r"w_up: expected float32.*got torch.int32"),
    "scale is a string": (dict(refinement=refinement(scale="1")), TypeError, r"refinement.scale: expected a number, got"),
    "mask of another shape": (
        dict(refinement=refinement(dropout_mask=torch.ones(2, 21, 8))), ValueError, r"dropout_mask: expected shape \(2, 21, 4\), got \(2, 21, 8\)"),
    "mask is integer": (
        dict(refinement=refinement(dropout_mask=torch.ones(2, 21, 4).int())), TypeError, r"dropout_mask: expected float32.*got torch.int32"),
    "mask is elsewhere": (
        dict(refinement=refinement(dropout_mask=torch.ones(2, 21, 4, device="meta"))), ValueError, r"dropout_mask: expected device cpu"),
    "no such backend": (dict(backend="cudnn"), ValueError, r"backend: expected one of .*reference.* or None, got 'cudnn'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGE)
def test_merge(case):
    changes, kind, message = MERGE[case]
    given = [
        t for t in (*changes.values(), *(changes.get("refinement") or ())) if isinstance(t, torch.Tensor) and not t.is_meta
    ]
    before = [t.clone() for t in given]
    with pytest.raises(kind, match=message):
        call(**changes)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)


def test_the_unchanged_call_is_correct():
    call()
    call(refinement=refinement())
    call(refinement=refinement(scale=2, dropout_mask=torch.ones(2, 21, 4, dtype=torch.bool)), size=torch.ones(2, 21, 1))


UNMERGE = {
    "tokens are an array": (dict(tokens=[1.0]), TypeError, r"tokens: expected a torch.Tensor, got list"),
    "tokens are 2-D": (dict(tokens=torch.ones(11, 6)), ValueError, r"tokens: expected \(B, M, D\), got shape \(11, 6\)"),
    "tokens are integer": (dict(tokens=torch.ones(2, 11, 6).int()), TypeError, r"tokens: expected float32.*got torch.int32"),
    "tokens of another M": (dict(tokens=torch.ones(2, 12, 6)), ValueError, r"tokens: expected M = .*= 11, got M = 12"),
    "match is a list": (dict(match=[1]), TypeError, r"match: expected a torch.Tensor, got list"),
    "match is int32": (dict(match=torch.ones(2, 10).int()), TypeError, r"match: expected int64, got torch.int32"),
    "match of another shape": (dict(match=torch.ones(2, 11).long()), ValueError, r"match: expected shape \(2, 10\), got \(2, 11\)"),
    "match is elsewhere": (dict(match=torch.ones(2, 10, device="meta").long()), ValueError, r"match: expected device cpu, as tokens, got meta"),
    "neither grid nor split": (dict(grid_size=None), ValueError, r"split: expected exactly one of them, got neither"),
    "grid and split": (dict(split=checkerboard(4, 5)), ValueError, r"grid_size, split: expected exactly one of them, got both"),
    "no such backend": (dict(backend="cudnn"), ValueError, r"backend: expected one of .* got 'cudnn'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNMERGE)
def test_unmerge(case):
    changes, kind, message = UNMERGE[case]
    arguments = {"tokens": torch.ones(2, 11, 6), "match": torch.ones(2, 10, dtype=torch.int64), "grid_size": (4, 5), **changes}
    tokens, match = arguments.pop("tokens"), arguments.pop("match")
    with pytest.raises(kind, match=message):
        bdm_unmerge(tokens, match, **arguments)


def test_a_forced_backend_that_cannot_run():
    """Every backend that refuses this device says so, with its reason."""
    x = torch.ones(2, 21, 6, device="meta")
    refused = [name for name in backends.ORDER if backends.refuses(name, x)]
    assert refused, "some backend must refuse meta tensors"
    for name in refused:
        with pytest.raises(RuntimeError, match=f"backend: '{name}' can't run here: "):
            bdm_merge(x, x, grid_size=(4, 5), backend=name)


def test_a_forced_native_backend_that_is_absent():
    script = """
import torch
from fpet_kernels import bdm_merge, explain
x = torch.ones(2, 21, 6)
assert bdm_merge(x, x, grid_size=(4, 5)).tokens.shape == (2, 11, 6)  # the reference steps in
try:
    bdm_merge(x, x, grid_size=(4, 5), backend="cpu")
except RuntimeError as error:
    print(error)
print(explain(x))
"""
    environment = {**os.environ, "FPET_DISABLE_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "backend: 'cpu' can't run here: FPET_DISABLE_NATIVE is set" in done.stdout
    assert "Fix: unset FPET_DISABLE_NATIVE" in done.stdout and "takes 'reference'" in done.stdout


def test_explain(backend, device):
    x = torch.ones(1, 5, 4, device=device)
    said = explain(x, backend)
    assert f"bdm_merge takes {backend!r}: asked for by name." in said
    for name in backends.ORDER:
        assert f" {name} " in said
    assert explain().count("\n") == len(backends.ORDER) - 1
    with pytest.raises(ValueError, match="backend: expected one of"):
        explain(x, "cudnn")


def test_the_operator_itself_trusts_nothing(fused, device):
    """A direct call with sizes that do not fit raises instead of reading beyond a tensor."""
    problem = full_problem(grid=(4, 5), device=device)
    forward, backward = backends.forward_op(fused), backends.backward_op(fused)
    good = list(op_args(problem))
    outputs = forward(*good)
    if fused == "triton":
        pytest.skip("launchers in Python are reached through bdm_merge, which has checked")
    names = ("x", "key", "size", "w_down", "w_up", "dropout_mask", "key_delta")
    for i, name in enumerate(names):
        for shrunk in (good[i][..., :-1], good[i][:-1], good[i].flatten()):
            if shrunk.shape == good[i].shape or (name == "x" and shrunk.dim() == 3 and shrunk.shape[:2] == good[i].shape[:2]):
                continue
            with pytest.raises(RuntimeError):
                forward(*good[:i], shrunk, *good[i + 1 :])
    good = list(backward_op_args(problem, outputs))
    for i, bad in (
        (0, good[0][:, :-1]),
        (1, good[1][:1]),
        *(((11, good[11] + 100), (11, good[11] - 100), (12, good[12] - 100)) if device == "cpu" else ()),  # a GPU's are clamped
        (13, good[13][:, 1:]),
    ):
        with pytest.raises(RuntimeError):
            backward(*good[:i], bad, *good[i + 1 :])
