"""Which backends and devices the suite runs on.

Tests ask for ``backend, device`` (every backend that runs here, on every device it runs on), ``fused, device`` (the same
without the reference) or ``cuda, device`` (that one alone). ``FPET_REQUIRE_BACKENDS="cpu,triton"`` makes a missing backend an
error instead of fewer tests. ``FPET_ONLY_ON=cuda`` leaves out what does not run on such a device.
``FPET_TEST_ALL=1`` (``make test-all``) also runs what is marked ``sweep``: more cases of kinds that others cover.
``FPET_EMULATED_CUDA`` names a library of CUDA kernels compiled for the host (csrc/tests/cuda_emulator.h): backend "cuda" then runs on
CPU tensors too, slowly, as Triton's does under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch
from hypothesis import settings

import fpet_kernels
from fpet_kernels import backends

with suppress(
    ImportError
):  # before anything imports the standard distutils, which setuptools, wanted by Inductor, then refuses
    import setuptools  # noqa: F401

EMULATED = os.environ.get("FPET_EMULATED_CUDA")
if EMULATED:
    from support import emulate_cuda

    emulate_cuda(EMULATED)

# Deterministic examples: a failure is a defect of the change at hand, never of the draw.
settings.register_profile("fpet", derandomize=True, deadline=None, database=None)
settings.load_profile("fpet")


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def targets(*, fused: bool = False) -> list[tuple[str, str]]:
    """(backend, device) pairs that can run here."""
    return [
        (name, device)
        for device in devices()
        for name in backends.ORDER
        if not (fused and name == "reference") and backends.refuses(name, torch.empty(1, 1, 1, device=device)) is None
    ]


def pytest_report_header() -> list[str]:
    tested = ", ".join(f"{name} on {device}" for name, device in targets())
    return [
        f"fpet_kernels {fpet_kernels.__version__}, torch {torch.__version__}, backends: {tested}",
        *fpet_kernels.explain().splitlines(),
    ]


def pytest_sessionstart() -> None:
    required = [name.strip() for name in os.environ.get("FPET_REQUIRE_BACKENDS", "").split(",") if name.strip()]
    here = {name for name, _ in targets()}
    for name in required:
        if name not in backends.ORDER:
            raise pytest.UsageError(f"FPET_REQUIRE_BACKENDS: {name!r} is no backend; there are {', '.join(backends.ORDER)}")
        if name not in here:
            found = backends.status(name)
            why = next((r for d in devices() if (r := backends.refuses(name, torch.empty(1, 1, 1, device=d)))), found.reason)
            raise pytest.UsageError(f"FPET_REQUIRE_BACKENDS: backend {name!r} is required and can't run: {why}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = {name.strip() for mark in metafunc.definition.iter_markers("parametrize") for name in str(mark.args[0]).split(",")}
    cuda = [(name, device) for name, device in targets() if name == "cuda"]
    for fixture, pairs in (("backend", targets()), ("fused", targets(fused=True)), ("cuda", cuda)):
        if fixture in metafunc.fixturenames and fixture not in own:
            metafunc.parametrize((fixture, "device"), pairs, ids=[f"{name}-{device}" for name, device in pairs])
            return
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out sweeps, and under FPET_ONLY_ON all that runs neither on such a device by its parameter nor by the mark ``gpu``."""
    only, sweeps = os.environ.get("FPET_ONLY_ON"), os.environ.get("FPET_TEST_ALL", "") not in ("", "0")

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("sweep") and not sweeps:
            return False
        device = getattr(getattr(item, "callspec", None), "params", {}).get("device")
        return not only or device == only or item.get_closest_marker("gpu") is not None

    if left := [item for item in items if not wanted(item)]:
        items[:] = [item for item in items if wanted(item)]
        config.hook.pytest_deselected(items=left)


@pytest.fixture
def max_tokens(request: pytest.FixtureRequest) -> int:
    """The longest sequence worth running: an interpreter or emulator on CPU tensors is thousands of times slower than a kernel."""
    params = request.node.callspec.params
    name = params.get("backend", params.get("fused"))
    return 65 if name in ("triton", "cuda") and params["device"] == "cpu" else 4097


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
