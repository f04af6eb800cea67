"""The plan for a GPU that is there for minutes: what it runs, in which order, how it ends in time, and what it says it did not do."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks" / "gpu_plan.py").exists():
    pytest.skip("benchmarks are not here", allow_module_level=True)
spec = importlib.util.spec_from_file_location("gpu_plan", ROOT / "benchmarks" / "gpu_plan.py")
assert spec and spec.loader
gpu_plan = importlib.util.module_from_spec(spec)
sys.modules["gpu_plan"] = gpu_plan
spec.loader.exec_module(gpu_plan)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_steps_end_in_time_and_say_what_became_of_them(tmp_path, capsys):
    plan = gpu_plan.Plan(tmp_path / "out" / "log.txt", 0.25)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('going', flush=True); time.sleep(60)"
    gpu_plan.GRACE, before = 1.0, gpu_plan.GRACE
    begin = time.monotonic()
    try:
        plan.run(
            gpu_plan.Step("right", [python("print('fine')"), python("print('as well')")], 30),
            gpu_plan.Step("wrong", [python("raise SystemExit(3)"), python("print('after it')")], 30),
            gpu_plan.Step("stubborn", [python("pass"), python(stubborn)], 8.5),
            gpu_plan.Step(
                "unsupported", [python("print('Device not supported'); raise SystemExit(9)")], 30, {}, "Device not supported"
            ),
            gpu_plan.Step("absent", [["/no/such/program"]], 30),
        )
        plan.run(gpu_plan.Step("late", [python("pass")], 30))
        status = plan.finish(["the rest"])
    finally:
        gpu_plan.GRACE = before
    assert time.monotonic() - begin < 14 and status == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log == capsys.readouterr().out
    for line in (
        "right: done", "wrong: FAILED with status 3", "stubborn: NOT FINISHED in 8 s: 1 of 2 commands ended",
        "unsupported: NOT CHECKED: Device not supported", "absent: FAILED with status 127", "late: NOT DONE: no time was left",
        "not part of this: the rest",
    ):  # fmt: skip
        assert line in log, line
    assert "going" in log and "after it" in log, "output is kept, whatever became of the step"


def test_a_step_that_is_stopped_can_say_how_far_it_came(tmp_path):
    plan = gpu_plan.Plan(tmp_path / "log.txt", 1)
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    text, status = plan._command(python(code), {}, time.monotonic() + 1.5)
    assert (text.strip(), status) == ("so far", None)


class Recorded(gpu_plan.Plan):
    """Runs nothing."""

    def run(self, *group):
        self.groups = [*getattr(self, "groups", []), group]


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("target", gpu_plan.TARGETS)
def test_every_option_and_path_of_the_plan_exists(target, rehearse, tmp_path, monkeypatch):
    """What a GPU would meet first: each benchmark parses its options, each test file is there, every step has its share of time."""
    monkeypatch.setenv("FPET_EMULATED_CUDA", str(tmp_path / "libfpet_cuda_emulated_ops.so"))
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    here = gpu_plan.Here(sys.executable, tmp_path, tmp_path / "rows.jsonl", 9.0, rehearse)
    plan = Recorded(tmp_path / "log.txt", 9)
    assert gpu_plan.TARGETS[target](here, plan), "nothing is said to be left out"
    steps = [step for group in plan.groups for step in group]
    assert len({step.what for step in steps}) == len(steps)
    for step in steps:
        assert gpu_plan.LEAST < step.seconds <= 9 * 60
        for command in step.commands:
            words = list(map(str, command))
            assert not any(word.startswith("tests/") and not (ROOT / word).exists() for word in words)
            assert not any(word.startswith("benchmarks/") and not (ROOT / word).exists() for word in words)


def test_benchmarks_take_the_options_of_the_plan(tmp_path, monkeypatch):
    seen = []
    for target in ("tables", "model", "tune"):
        here = gpu_plan.Here(sys.executable, tmp_path, tmp_path / "rows.jsonl", 9.0, False)
        plan = Recorded(tmp_path / "log.txt", 9)
        gpu_plan.TARGETS[target](here, plan)
        for group in plan.groups:
            for step in group:
                for command in map(list, step.commands):
                    if str(command[1]).startswith("benchmarks/"):
                        seen.append((Path(command[1]).stem, list(map(str, command[2:]))))
    assert {script for script, _ in seen} == {"kernel_vs_ref", "model_latency", "tune"}
    by_script: dict[str, list[list[str]]] = {}
    for script, options in seen:
        by_script.setdefault(script, []).append(options)
    for script, calls in by_script.items():
        code = (
            "import json, sys, torch; sys.path.insert(0, 'benchmarks'); torch.cuda.is_available = lambda: True\n"
            f"import {script} as s\nfor options in json.loads(sys.argv[1]): s.parse(options)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(calls)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if "fpet_kernels and triton must be importable" in done.stderr:
            continue
        assert done.returncode == 0, f"{script}: {done.stderr[-600:]}"


def test_pytest_xdist_gets_its_option(tmp_path):
    here = gpu_plan.Here(sys.executable, tmp_path, tmp_path / "rows.jsonl", 9.0, False)
    found = importlib.util.find_spec("xdist") is not None
    assert gpu_plan.parallel(here) == (["-n", "8"] if found else [])


def test_install_takes_what_was_prepared(tmp_path, monkeypatch):
    prepared, package = tmp_path / "prepared", tmp_path / "package"
    prepared.mkdir(), package.mkdir()
    for name in (*gpu_plan.LIBRARIES, *gpu_plan.TESTS, "_build_info.json"):
        (prepared / name).write_text(f"new {name}")
    (package / gpu_plan.LIBRARIES[0]).write_text("old")
    monkeypatch.setattr(gpu_plan, "PREPARED", prepared)
    monkeypatch.setattr(gpu_plan, "PACKAGE", package)
    monkeypatch.setattr(gpu_plan, "prepare", lambda _: pytest.fail("built although it was there"))
    gpu_plan.install("90a-real")
    assert {f.name: f.read_text() for f in package.iterdir()} == {
        name: f"new {name}" for name in (*gpu_plan.LIBRARIES, "_build_info.json")
    }
    (prepared / gpu_plan.TESTS[0]).unlink()
    built = []
    monkeypatch.setattr(
        gpu_plan, "prepare", lambda architecture: (built.append(architecture), (prepared / gpu_plan.TESTS[0]).touch())
    )
    gpu_plan.install("90a-real")
    assert built == ["90a-real"], "the fall-back: it is built where it was not carried along"


def test_the_doctor_reads_what_is_recorded_of_the_build():
    import torch

    from fpet_kernels.__main__ import _build_facts, _build_lines

    recorded = gpu_plan.record(Path(torch.__file__).parent, "/usr/local/cuda/bin/nvcc", "90a-real")
    lines = "\n".join(_build_lines({**_build_facts(), "recorded": recorded}))
    assert f"against torch {torch.__version__}" in lines
    assert recorded["cuda"]["architectures"] == "90a-real"  # type: ignore[index]


def test_make_runs_the_plan():
    for target in gpu_plan.TARGETS:
        done = subprocess.run(
            ["make", "-n", f"gpu-{target}", f"FPET_PYTHON={sys.executable}", "OUT=/there", "MINUTES=4"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"benchmarks/gpu_plan.py {target} --minutes 4 --out /there" in done.stdout, done.stderr
