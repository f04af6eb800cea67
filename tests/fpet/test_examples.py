"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {"trainer": ("transformers", "accelerate"), "accelerate_loop": ("accelerate",), "peft_lora": ("peft",)}


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "examples").glob("*.py")))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if missing := [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_the_list_of_examples_is_whole() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    assert all(p.name in page for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".ipynb"))
