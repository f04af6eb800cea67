"""Every kernel, compiled for sm_80 and sm_90 and executed: values as the other suites judge them, and nothing found on the way."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

from fpet_kernels import second_checkerboard
from support import (
    Problem,
    assert_close,
    assert_near_ties_only,
    backward_op_args,
    exact,
    op_args,
    random_problem,
    rounding,
    yardstick,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "") not in ("", "0"), reason="TRITON_INTERPRET is set: nothing is compiled"
    ),
]
TARGETS = ("sm80", "sm90")
GRADIENTS = ("x", "size", "w_down", "w_up", "key_delta", "key")


def execute(problem: Problem, emulation) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """The forward's five results, and the gradients by name."""
    from fpet_kernels.triton import ops

    forward = ops._launch_forward(*op_args(problem))
    wanted = problem.leaves
    needs = ("x" in wanted, "size" in wanted, "w_down" in wanted, "key_delta" in wanted, "key" in wanted)
    gradients = ops._launch_backward(*backward_op_args(problem, forward, needs))
    found = {f"grad_{name}": gradients[GRADIENTS.index(name)] for name in wanted}
    if problem.key.dim() == 4 and "grad_key" in found:  # the operator's is that of the mean over heads
        found["grad_key"] = found["grad_key"][:, None].expand_as(problem.key)
    return forward, found


def check(problem: Problem, target: str, **options) -> list[str]:
    """Executes forward and backward, and judges them; returns which kernels ran."""
    from .emulate import emulated

    with emulated(target, **options) as emulation:
        forward, gradients = execute(problem, emulation)
    emulation.assert_clean()
    tokens, size, best, second, _ = forward
    assert_near_ties_only(problem, best, second)
    want = exact(problem, best, second)
    got = {"tokens": tokens, "size": size, **gradients}
    assert_close(problem, got, want, yardstick(problem, "triton"), rounding(problem, best, second))
    return [name for name, _ in emulation.machines]


EVERYTHING = dict(
    grid=(5, 6), batch=2, dim=40, channels=24, hidden=5, heads=2, size=True, mask=True, delta=True, detach_key=False
)
TILED = EVERYTHING | dict(grid=(12, 12), batch=1)  # several tiles of destinations, which programs share out
CASES = {
    "everything": EVERYTHING,
    "16-bit key as it is": dict(grid=(10, 11), batch=1, dim=72, channels=64, dtype=torch.bfloat16, detach_key=False),
}
# Behind make test-ptx: minutes each.
MORE = {
    "ViT-B/16": dict(grid=(14, 14), batch=1, dim=768, channels=64, heads=12, hidden=32, dtype=torch.bfloat16),
    "float32": dict(grid=(14, 14), batch=1, dim=96, channels=64, heads=2, hidden=32, size=True),
    "bfloat16, everything": EVERYTHING | dict(dtype=torch.bfloat16),
    "float16, everything": EVERYTHING | dict(dtype=torch.float16),
    "float16 key as it is": dict(grid=(14, 14), batch=1, dim=96, channels=64, dtype=torch.float16, detach_key=False),
    "dot, many prefix tokens": EVERYTHING | dict(similarity="dot", prefix=19, dtype=torch.bfloat16),
    "listed": EVERYTHING | dict(split=second_checkerboard(6, 5), grid=(0, 0)),
    "several blocks of sources": dict(grid=(22, 22), batch=1, dim=96, channels=64, dtype=torch.bfloat16, delta=True),
    "long": dict(grid=(23, 24), batch=1, dim=96, channels=64, heads=2, hidden=32, dtype=torch.bfloat16),
    "long, everything": dict(EVERYTHING, grid=(23, 24), batch=1, dim=72, channels=40),
    "several launches of pairs": dict(grid=(33, 34), batch=1, dim=32, channels=16, delta=True, dtype=torch.bfloat16),
    "float64": dict(EVERYTHING, dtype=torch.float64),
}
every = pytest.mark.skipif(os.environ.get("FPET_PTX") != "all", reason="make test-ptx runs it: minutes")


@pytest.fixture
def tiled(monkeypatch):
    """Every problem goes to the tiled kernels."""
    from fpet_kernels.triton import configs

    monkeypatch.setattr(configs, "short_class", lambda *_: None)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_short(case, target):
    assert check(random_problem(**CASES[case]), target)[0] == "merge_short"


@pytest.mark.parametrize("target", TARGETS)
def test_tiled(target, tiled):
    ran = check(random_problem(**TILED), target)
    assert {"prepare_keys", "match_tiles", "join_matches", "merge_lists", "pair_pass", "attached_gradient"} <= set(ran)


@every
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", MORE)
def test_more(case, target):
    check(random_problem(**MORE[case]), target)


@every
@pytest.mark.parametrize("target", TARGETS)
def test_matrix_units_that_truncate(target):
    """Sums stay within the rule where matrix units cut off instead of rounding, as NVIDIA's do."""
    check(random_problem(**MORE["float32"]), target, truncate=True)


NAN = {"w_down": (0, 0), "w_up": (0, 0), "key": (slice(None), 0, 1), "key_delta": (slice(None), 1, 3)}  # token 1 is a source


@pytest.mark.parametrize("long", [False, True], ids=["short", "tiled"])
@pytest.mark.parametrize("target", [pytest.param("sm80", marks=every), "sm90"])
def test_nan_shows(target, long, request):
    """What diverged is NaN wherever it is in plain PyTorch: in mid, and in every gradient but those of prefix tokens' keys.

    On GPUs a maximum drops NaN, as it does not in Triton's interpreter.
    """
    from fpet_kernels import ops as base

    from .emulate import emulated

    if long:
        request.getfixturevalue("tiled")
    sound = random_problem(**(TILED if long else EVERYTHING))
    for name, where in NAN.items():
        spoiled = getattr(sound, name).clone()
        spoiled[where] = float("nan")
        problem = replace(sound, **{name: spoiled})
        with emulated(target) as emulation:
            forward, gradients = execute(problem, emulation)
        emulation.assert_clean()
        plain = base._forward(*op_args(problem))
        wanted = base._backward(*backward_op_args(problem, plain))
        for got, want in zip(forward, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert forward[4].isnan().any()
        for of, got in gradients.items():
            want = wanted[GRADIENTS.index(of.removeprefix("grad_"))]
            got = got[:, 0] if of == "grad_key" else got
            if of in ("grad_key", "grad_key_delta"):
                got, want = (t[..., sound.num_prefix_tokens :, :] for t in (got, want))
            assert torch.equal(got.isnan(), want.isnan()), f"{name}: {of}"
