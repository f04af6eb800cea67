"""Which backend a call takes, and that a backend a run must test can't go missing unseen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fpet_kernels import backends, native
from support import random_problem, run


@pytest.fixture
def suite(request):
    """The suite's own conftest."""
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def test_a_required_backend_that_is_missing_fails_the_session(suite, monkeypatch):
    monkeypatch.setenv("FPET_REQUIRE_BACKENDS", "reference")
    suite.pytest_sessionstart()
    monkeypatch.setenv("FPET_REQUIRE_BACKENDS", "reference, fastest")
    with pytest.raises(pytest.UsageError, match="'fastest' is no backend; there are cuda, triton, cpu"):
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


class OnGpu:
    """What choosing a backend looks at, of a tensor on a GPU."""

    def __init__(self, tokens: int = 197, dtype: torch.dtype = torch.bfloat16, device: str = "cuda:0") -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, (2, tokens, 768)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with a CUDA library and Triton, as far as the dispatcher can tell."""
    monkeypatch.setattr(backends, "_CUDA", backends.Status(True, "native CUDA kernels"))
    monkeypatch.setattr(backends, "_status_cuda", lambda: backends._CUDA)
    monkeypatch.setattr(backends, "_REFUSED_BY_CUDA", {0: None})
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_TOO_OLD", {0: None})
    return monkeypatch


def test_order_on_a_gpu(gpu):
    """cuda, triton, reference; a device that a backend doesn't run on takes the next, and explain says why."""
    x = OnGpu()
    assert backends.select(x, None) == "cuda"
    assert backends.explain(x).splitlines()[-1] == (
        "bdm_merge takes 'cuda': the first that runs on cuda:0; not measured yet: cuda is taken where built."
    )
    assert backends.forward_op("cuda") is torch.ops.fpet.bdm_forward.default  # the tensors' device chooses the kernels
    assert backends.backward_op("cuda") is torch.ops.fpet.bdm_backward.default
    gpu.setitem(backends._REFUSED_BY_CUDA, 0, "on compute capability 12.1, compiled for 80-real: no kernel image")
    assert backends.select(x, None) == "triton"
    assert "cuda       no: on compute capability 12.1, compiled for 80-real: no kernel image" in backends.explain(x)
    with pytest.raises(RuntimeError, match=r"backend: 'cuda' can't run here: on compute capability 12.1.*no kernel image"):
        backends.select(x, "cuda")
    gpu.setitem(backends._TOO_OLD, 0, "too old")
    assert backends.select(x, None) == "reference"
    assert backends.select(OnGpu(device="meta"), None) == "cpu"


def test_a_measured_preference_decides(gpu):
    row = backends.Preference("triton", (torch.float32,), range(1000, 5000), "H999, benchmarks/kernel_vs_ref.py")
    gpu.setattr(backends, "PREFERRED", (row,))
    long, short, half = OnGpu(4097, torch.float32), OnGpu(197, torch.float32), OnGpu(4097)
    assert [backends.select(x, None) for x in (long, short, half)] == ["triton", "cuda", "cuda"]
    assert backends.explain(long).splitlines()[-1] == (
        "bdm_merge takes 'triton': measured to be the fastest for 4097 tokens of float32 (H999, benchmarks/kernel_vs_ref.py)."
    )
    assert "no measurement prefers another here" in backends.explain(short)
    assert backends.select(long, "cuda") == "cuda"
    gpu.setitem(backends._TOO_OLD, 0, "too old")
    assert backends.select(long, None) == "cuda", "a preference for what can't run"


def test_preferences_are_data():
    """Names, dtypes and lengths that exist, and where each was measured."""
    for row in backends.PREFERRED:
        assert row.backend in backends.ORDER and row.dtypes and len(row.tokens) and row.measured


def test_the_cuda_library_is_not_for_every_torch(monkeypatch):
    """A torch without CUDA, or with ROCm, whose tensors say cuda, never meets the kernels."""
    monkeypatch.setattr(native, "_load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in native._load_cuda_library().reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "is built for ROCm" in native._load_cuda_library().reason


def test_why_the_cuda_library_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "library_path", lambda name="libfpet_ops.so": tmp_path / name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("FPET_DISABLE_NATIVE", raising=False)
    assert native._load_cuda_library().reason == "libfpet_cuda_ops.so was not built"
    (tmp_path / "_build_info.json").write_text(
        '{"native": true, "cuda": {"built": false, "reason": "no nvcc was found:\\nat all"}}'
    )
    found = native._load_cuda_library()
    assert found.reason == "libfpet_cuda_ops.so was not built: no nvcc was found" and "FPET_CUDA=1" in found.fix
    (tmp_path / "libfpet_cuda_ops.so").write_text("no library")
    assert "libfpet_cuda_ops.so does not load: " in native._load_cuda_library().reason
    monkeypatch.setenv("FPET_DISABLE_NATIVE", "1")
    assert native._load_cuda_library().reason == "FPET_DISABLE_NATIVE is set"


def test_the_default_gives_what_the_backend_by_name_gives(device):
    problem = random_problem(device=device)
    chosen = backends.select(problem.x, None)
    for name, value in run(problem, None).items():
        assert torch.equal(value, run(problem, chosen)[name]), name


@pytest.mark.parametrize(
    ("capability", "targets", "driver", "why"),
    [
        ((9, 0), "80-real 90a-real", 13000, None),
        ((9, 0), "80-real", 13000, "on compute capability 9.0, compiled for 80-real: no kernel image"),
        ((8, 9), "80-real 90a-real", 13000, None),
        ((8, 0), "86-real 90a-real", 13000, "no kernel image"),
        ((10, 3), "100", 13000, None),
        ((11, 0), "100 120", 13000, None),
        ((11, 0), "100-real 120", 13000, "no kernel image"),
        ((12, 1), "90-virtual", 13020, None),
        ((12, 1), "90-virtual", 13010, None),
        ((12, 1), "90a", 13000, "no kernel image"),
        ((10, 1), "100a-real", 13000, "no kernel image"),
        ((10, 3), "100f-real", 13000, None),
        ((9, 0), "90a-real", 12080, "the driver is for CUDA 12.8, and these kernels were compiled by CUDA 13.0"),
        ((9, 0), "90a-real", 0, "the driver is for no CUDA at all"),
    ],
)
def test_which_gpus_the_compiled_kernels_run_on(capability, targets, driver, why):
    found = backends._no_code_for(capability, targets, 13000, driver)
    assert (found is None) if why is None else (found is not None and why in found), found


def test_ptx_needs_a_driver_no_older_than_its_compiler():
    assert backends._no_code_for((12, 0), "100", 13020, 13020) is None
    assert "its PTX needs a driver for CUDA 13.2, and this one is for 13.0" in (
        backends._no_code_for((12, 0), "100", 13020, 13000) or ""
    )


def test_a_first_call_asks_the_gpu_nothing(gpu):
    """It may be one that a CUDA graph captures, and attributes of all kernels load them all."""

    def ask(question, *arguments):
        assert question == "fpet_cuda_build", f"{question} was asked"
        return {"architectures": "80-real 90a-real", "runtime": 13000, "nvcc": "13.0.1"}

    gpu.setattr(backends, "_REFUSED_BY_CUDA", {})
    gpu.setattr(backends, "_ask_cuda", ask)
    gpu.setattr(backends, "_cuda_driver", lambda: 13000)
    gpu.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    assert backends.select(OnGpu(), None) == "cuda"
    gpu.setattr(backends, "_REFUSED_BY_CUDA", {})
    gpu.setattr(torch.cuda, "get_device_capability", lambda _index: (7, 5))
    assert "no kernel image" in backends.refuses("cuda", OnGpu())


def test_unknown_names():
    for call in (
        backends.status,
        lambda name: backends.refuses(name, torch.ones(1)),
        lambda name: backends.select(torch.ones(1), name),
    ):
        with pytest.raises(ValueError, match=r"backend: expected one of .*reference or None, got 'best'"):
            call("best")


@pytest.mark.parametrize("loaded, refused", [(True, "no kernel image"), (True, None), (False, "no kernel image")])
def test_unmerge_leaves_a_gpu_that_the_loaded_kernels_refuse_to_the_reference(monkeypatch, loaded, refused):
    """And asks nobody but a dict: no call of the library, which would end a traced graph."""
    monkeypatch.setattr(backends, "_CUDA", backends.Status(loaded, "in this test"))
    monkeypatch.setattr(backends, "_REFUSED_BY_CUDA", {0: refused})
    monkeypatch.setattr(backends, "_ask_cuda", lambda *_: pytest.fail("the library was asked"))
    tokens = SimpleNamespace(device=torch.device("cuda", 0))
    assert backends.cuda_kernels_fail(tokens) is (loaded and refused is not None)
    assert not backends.cuda_kernels_fail(torch.empty(1, 1, 1))
