"""Whether a barrier, a wait or a fence that is missing from a kernel would be noticed: one by one they are taken out."""

from __future__ import annotations

import os
import re

import pytest
import torch

from support import random_problem

from .memory import Fault
from .test_kernels import execute, pytestmark  # noqa: F401  (the marks hold here too)

# How many of a hundred may go unnoticed: barriers that other barriers make up for.
UNNOTICED = 20
SYNCHRONISES = r"(bar\.sync|cp\.async\.wait_group|wgmma\.wait_group|fence\.proxy\.async)[^;]*;"


@pytest.mark.skipif(os.environ.get("FPET_PTX") != "all", reason="make test-ptx runs it: minutes")
@pytest.mark.parametrize("kernel", ["merge_short", "pair_pass"])
def test_what_is_missing_is_noticed(kernel):
    problem = random_problem(grid=(10, 11), batch=1, dim=64, heads=2, channels=64, delta=True, dtype=torch.bfloat16)
    found = [ending for nth in range(1000) if (ending := _without(problem, kernel, nth)) is not None]
    assert len(found) > 10
    missed = [text for text, noticed in found if not noticed]
    assert 100 * len(missed) <= UNNOTICED * len(found), f"{len(missed)} of {len(found)} went unnoticed:\n" + "\n".join(missed)


def _without(problem, kernel: str, nth: int) -> tuple[str, bool] | None:
    """The ``nth`` synchronising instruction, and whether its absence was noticed; None where there are fewer."""
    from .emulate import emulated

    taken: list[str] = []

    def change(name: str, ptx: str) -> str:
        places = list(re.finditer(SYNCHRONISES, ptx))
        if name != kernel or nth >= len(places):
            return ptx
        start, end = places[nth].span()
        taken[:] = [ptx[start:end]]
        return ptx[:start] + ptx[end:]

    with emulated("sm90") as emulation:
        emulation.change = change
        emulation.only = lambda _grid: [(0, 0, 0)]
        try:
            execute(problem, emulation)
        except Fault:
            return taken[0], True
    if not taken:
        return None
    return taken[0], any(machine.findings.counts for name, machine in emulation.machines if name == kernel)
