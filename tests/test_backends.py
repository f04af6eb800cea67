"""Which backend a call takes, and that a backend a run must test can't go missing unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpet_kernels import backends
from support import random_problem, run


@pytest.fixture
def suite(request):
    """The suite's own conftest."""
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def test_a_required_backend_that_is_missing_fails_the_session(suite, monkeypatch):
    monkeypatch.setenv("FPET_REQUIRE_BACKENDS", "reference")
    suite.pytest_sessionstart()
    monkeypatch.setenv("FPET_REQUIRE_BACKENDS", "reference, fastest")
    with pytest.raises(pytest.UsageError, match="'fastest' is no backend; there are cpu"):
        suite.pytest_sessionstart()
    monkeypatch.setenv("FPET_REQUIRE_BACKENDS", "cpu")
    monkeypatch.setattr(backends, "_NATIVE", backends.Status(False, "the library is gone"))
    with pytest.raises(pytest.UsageError, match="backend 'cpu' is required and can't run: the library is gone"):
        suite.pytest_sessionstart()


def test_the_default_is_the_best_that_runs(device, monkeypatch):
    """Native kernels on the CPU; the reference where there are none; never an interpreter."""
    x = torch.ones(1, 5, 4, device=device)
    chosen = backends.select(x, None)
    assert backends.refuses(chosen, x) is None
    if device == "cpu":
        monkeypatch.setattr(backends, "_NATIVE", backends.Status(True, "native"))
        assert backends.select(x, None) == "cpu"
        monkeypatch.setattr(backends, "_NATIVE", backends.Status(False, "none"))
        assert backends.select(x, None) == "reference"


def test_the_default_gives_what_the_backend_by_name_gives(device):
    problem = random_problem(device=device)
    chosen = backends.select(problem.x, None)
    for name, value in run(problem, None).items():
        assert torch.equal(value, run(problem, chosen)[name]), name


def test_unknown_names():
    for call in (
        backends.status,
        lambda name: backends.refuses(name, torch.ones(1)),
        lambda name: backends.select(torch.ones(1), name),
    ):
        with pytest.raises(ValueError, match=r"backend: expected one of .*reference or None, got 'best'"):
            call("best")
