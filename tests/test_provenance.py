"""Rows say which code, machine and versions they belong to: the same fields from a checkout and from an installation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fpet_kernels
from fpet_kernels import provenance

CPU = torch.device("cpu")


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(("git", *who, *command), cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as if it lay in ``tmp_path``; returns the folder that holds it."""
    package = tmp_path / "fpet_kernels"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    return tmp_path


def test_what_a_row_says() -> None:
    found = provenance.provenance(CPU, "a command")
    assert found["command"] == "a command" and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert found["torch"] == torch.__version__ and found["fpet_kernels"] == fpet_kernels.__version__
    assert found["threads"] == torch.get_num_threads() and found["cpu"] and found["cores"] >= 1
    assert found["gpu"] is found["driver"] is found["cuda"] is None
    json.dumps(found)


def test_an_installation_has_the_same_fields_and_what_its_build_recorded(installed: Path) -> None:
    expected = provenance.provenance(CPU, "").keys()
    assert len(expected) == 18
    assert (provenance.provenance(CPU, "")["commit"], provenance.provenance(CPU, "")["dirty"]) == ("unknown", None)
    (installed / "fpet_kernels" / "_build_info.json").write_text(json.dumps({"commit": "0123abc", "dirty": True}))
    found = provenance.provenance(CPU, "")
    assert (found["commit"], found["dirty"]) == ("0123abc", True) and found.keys() == expected


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around(installed: Path) -> None:
    git(installed, "init", "-q")
    (installed / "code.py").write_text("1\n")
    git(installed, "add", "code.py")
    git(installed, "commit", "-qm", "first")
    found = provenance.provenance(CPU, "")
    assert (found["commit"], found["dirty"]) == (git(installed, "rev-parse", "HEAD"), False)
    (installed / "benchmarks" / "results").mkdir(parents=True)
    (installed / "benchmarks" / "results" / "rows.jsonl").write_text("")
    git(installed, "add", "benchmarks")
    assert provenance.provenance(CPU, "")["dirty"] is False  # what a benchmark writes changes no number
    (installed / "code.py").write_text("2\n")
    assert provenance.provenance(CPU, "")["dirty"] is True


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_package_inside_somebody_elses_repository(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(installed, "init", "-q")
    git(installed, "commit", "-q", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(provenance, "_ROOT", installed / "site-packages")
    (installed / "site-packages").mkdir()
    assert provenance.provenance(CPU, "")["commit"] == "unknown"
