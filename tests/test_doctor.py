"""``python -m fpet_kernels``: what it reports, and that it notices what is wrong."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpet_kernels import __main__ as doctor
from fpet_kernels import __version__, backends, native


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fpet_kernels", *arguments]
    root = str(Path(doctor.__file__).parents[1])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, text=True)


def test_json_and_text_agree_and_the_status_says_whether_all_is_fused() -> None:
    as_json, as_text = run("--json"), run()
    facts = json.loads(as_json.stdout)
    assert facts["fpet_kernels"]["version"] == __version__
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["python"] == platform.python_version()
    assert list(facts["backends"]) == list(backends.ORDER)
    assert as_json.returncode == as_text.returncode == int("reference" in facts["chosen"].values())
    for value in (__version__, torch.__version__, facts["system"]["cpu"], *backends.ORDER):
        assert value in as_text.stdout
    for entry in facts["backends"].values():
        assert entry["reason"] in as_text.stdout
        assert entry["available"] or entry["fix"] in as_text.stdout
        assert all(test["ok"] and test["max_error"] < 1e-5 for test in entry.get("self_test", {}).values())


def test_a_disabled_library_is_named_with_the_fix() -> None:
    done = run(FPET_DISABLE_NATIVE="1")
    assert done.returncode == 1
    assert "no: FPET_DISABLE_NATIVE is set" in done.stdout and "fix: unset FPET_DISABLE_NATIVE" in done.stdout
    assert "cpu: bdm_merge takes 'reference'" in done.stdout


def test_every_available_backend_is_tested_on_every_device_it_runs_on(backend: str, device: str) -> None:
    facts = doctor.report()
    tests = facts["backends"][backend]["self_test"]
    assert [test["ok"] for name, test in tests.items() if torch.device(name).type == device]


def perturbed(position: int, change: float):
    """doctor._run, but its result at ``position`` is off in float32."""
    honest = doctor._run

    def run(dtype: torch.dtype, device: torch.device, backend: str) -> list[torch.Tensor]:
        results = honest(dtype, device, backend)
        if dtype == torch.float32:
            results[position] = results[position] + change
        return results

    return run


@pytest.mark.parametrize(
    ("position", "change", "says"),
    [(0, 0.01, "WRONG: "), (5, 0.1, "WRONG: "), (3, float("nan"), "WRONG: nan"), (2, 1, "WRONG: the match differs")],
    ids=["tokens", "gradient", "nan", "match"],
)
def test_a_wrong_backend_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], position: int, change: float, says: str
) -> None:
    monkeypatch.setattr(doctor, "_run", perturbed(position, change))
    assert doctor.main([]) == 2
    out = capsys.readouterr().out
    assert says in out and "A backend is WRONG here" in out


def test_a_backend_that_raises_is_reported_not_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("illegal instruction, say")

    monkeypatch.setattr(doctor, "bdm_merge", lambda *args, **kwargs: broken())
    assert doctor.main([]) == 2
    assert "WRONG: RuntimeError: illegal instruction, say" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (None, "this source tree was never installed"),
        ({"native": False, "reason": "no C++ compiler was found"}, "not built: no C++ compiler was found"),
        ({"native": True, "compiler": "g++ 99", "torch": "2.99.0"}, "built with g++ 99, against torch 2.99.0"),
        (
            {"native": False, "reason": "?", "cuda": {"built": False, "reason": "no nvcc:\nnone"}},
            "CUDA        not built: no nvcc:\n              none",
        ),
    ],
    ids=["none", "failed", "built", "no CUDA"],
)
def test_the_build_record_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: dict | None, says: str) -> None:
    monkeypatch.setattr(native, "library_path", lambda name: tmp_path / name)
    if record is not None:
        (tmp_path / "_build_info.json").write_text(json.dumps(record))
    facts = doctor.report()
    assert facts["build"].get("recorded") == record
    assert says in doctor.render(facts)


def test_what_the_library_says_of_itself_is_shown_and_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "compiler": "GCC 99",
        "flags": ["-O3", "-fvery-fast"],
        "cxx_standard": 202002,
        "cpu_isas_compiled": ["avx9", "old"],
        "cpu_isa_in_use": "avx9",
    }
    monkeypatch.setattr(backends, "cpu_facts", lambda: facts)
    text = doctor.render(doctor.report())
    assert "GCC 99, C++ 202002, -O3 -fvery-fast" in text
    assert "avx9 in use; compiled: avx9, old" in text
    monkeypatch.setattr(backends, "cpu_facts", dict)
    assert "in use; compiled" not in doctor.render(doctor.report())


@pytest.mark.skipif(not backends.status("cpu").available, reason="no native library here")
def test_the_library_knows_its_build() -> None:
    facts = backends.cpu_facts()
    assert facts["cpu_isa_in_use"] in facts["cpu_isas_compiled"] and "baseline" in facts["cpu_isas_compiled"]
    assert facts["compiler"] and "-std=c++20" in facts["flags"] and facts["cxx_standard"] >= 202002


def test_the_cuda_kernels_are_listed_by_device() -> None:
    kernel = {
        "name": "merge_short", "registers": 120, "spilled_bytes": 8, "threads": 256, "blocks_per_sm": 2, "static_shared": 1024,
        "dynamic_shared": 30000, "error": "",
    }  # fmt: skip
    facts = doctor.report()
    facts["cuda"]["library"] = {
        "nvcc": "13.0.88",
        "architectures": "80-real 90a",
        "runtime": 13020,
        "devices": {"cuda:0": {"kernels": [kernel, {**kernel, "error": "no kernel image"}]}, "cuda:1": {"error": "no driver"}},
    }
    text = doctor.render(facts)
    assert "nvcc 13.0.88, runtime 13.2, architectures 80-real 90a" in text
    assert (
        "cuda:0  merge_short: 120 registers, 8 bytes spilled, 31024 bytes of shared memory, 2 blocks of 256 threads a multiprocessor"
        in text
    )
    assert "cuda:0  merge_short: no kernel image" in text and "cuda:1  no driver" in text


def test_a_device_that_a_backend_does_not_run_on_is_named() -> None:
    facts = doctor.report()
    facts["backends"]["cuda"]["refused"] = {"cuda:0": "compiled for 80-real: no kernel image"}
    assert "not on cuda:0: compiled for 80-real: no kernel image" in doctor.render(facts)


def test_versions_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    facts = doctor.report()
    assert facts["versions"]["timm"] is None
    assert "timm        not installed" in doctor.render(facts)


def test_unknown_arguments_are_refused() -> None:
    done = run("--jsonn")
    assert done.returncode == 2 and "--jsonn" in done.stderr
