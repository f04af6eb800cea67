"""The build backend: setuptools', plus torch as a build requirement, only where no installed torch can be found.

The native library needs torch's stable-ABI headers and nothing else of it, so any torch from 2.10 on will do. An isolated build
hides the one in the environment being installed into, but runs beside it; :func:`find_torch` looks there first. Where there is
none, pip is about to download it as a dependency anyway, and the build asks for the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_editable, get_requires_for_build_sdist, prepare_metadata_for_build_editable

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "find_compiler",
    "find_nvcc",
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "torch_cuda",
    "torch_version",
]

MIN_TORCH = (2, 10)


def _said(directory: Path, name: str) -> str | None:
    """A string in torch's version.py."""
    try:
        found = re.search(rf"^{name}\b[^=\n]* = ['\"]([^'\"]+)", (directory / "version.py").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def torch_version(directory: Path) -> str | None:
    """Version of the torch package in ``directory``, read without importing it; None if there is none."""
    return _said(directory, "__version__")


def torch_cuda(directory: Path) -> str | None:
    """Version of CUDA that the torch package in ``directory`` was built with; None for other builds."""
    return _said(directory, "cuda")


def _usable(directory: Path) -> bool:
    version = torch_version(directory)
    return version is not None and tuple(int(v) for v in re.findall(r"\d+", version)[:2]) >= MIN_TORCH


def _site_packages() -> Iterator[Path]:
    """Where packages may be, the likeliest first."""
    paths = sysconfig.get_paths()
    yield from (Path(paths["purelib"]), Path(paths["platlib"]))  # pip's isolation changes sys.path, not these
    yield from map(Path, site.getsitepackages())
    yield Path(site.getusersitepackages())
    # Front ends that isolate in a new virtual environment (build, uv) leave the caller's traces in these.
    prefixes = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.base_prefix]
    prefixes += [str(Path(p).parent) for p in os.environ.get("PATH", "").split(os.pathsep) if Path(p).name == "bin"]
    for prefix in filter(None, prefixes):
        yield from sorted(Path(prefix).glob("lib/python3*/*-packages"), reverse=True)


def find_torch() -> Path | None:
    """Directory of an installed torch package, 2.10 or later: FPET_TORCH_DIR, what this Python imports, what lies beside it.

    Raises:
        FileNotFoundError: FPET_TORCH_DIR is set and holds no such package.
    """
    if given := os.environ.get("FPET_TORCH_DIR"):
        if not _usable(Path(given)):
            found = torch_version(Path(given))
            raise FileNotFoundError(f"FPET_TORCH_DIR: expected the folder of torch >= 2.10, got {given!r}, version {found}")
        return Path(given)
    spec = importlib.util.find_spec("torch")
    locations = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for directory in (*locations, *(path / "torch" for path in _site_packages())):
        if _usable(directory):
            return directory
    return None


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of the usual names on PATH; None if it isn't there."""
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if all(map(shutil.which, command[:1]))), None)


def find_nvcc() -> str | None:
    """CUDA's compiler: $CUDACXX, or nvcc on PATH, in CUDA_HOME, in CUDA_PATH or in /usr/local/cuda; None if it isn't there."""
    if given := os.environ.get("CUDACXX"):
        return shutil.which(given)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes if home)), None)


@contextlib.contextmanager
def _writable_tree() -> Iterator[None]:
    """setuptools writes into the source tree: where that can't be, into a copy of it."""
    here = Path.cwd()
    if os.access(here, os.W_OK):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "tree")
        shutil.copytree(here, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info"))
        for path in (copy, *copy.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(here)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    with _writable_tree():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    with _writable_tree():
        return build_meta.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    with _writable_tree():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def _torch_if_missing() -> list[str]:
    wanted = os.environ.get("FPET_NATIVE") != "0" and find_compiler() is not None
    return ["torch>=2.10"] if wanted and find_torch() is None else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_missing()]
