"""Drives CMake: CMakeLists.txt is the one list of native sources, pyproject.toml has the metadata.

Environment: FPET_NATIVE=auto|0|1 (build the native library if possible, never, or fail where it can't be built),
FPET_CUDA=auto|0|1 (likewise for its CUDA kernels), FPET_TORCH_DIR (folder of the torch package to compile against), CXX,
CXXFLAGS, CMAKE_ARGS, MAX_JOBS.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import find_compiler, find_torch, torch_version  # noqa: E402


class Unavailable(Exception):
    """Why the native library can't be built here, and how to change that."""


def switch(name: str) -> str:
    """The value of an environment switch: "auto", "0" or "1"."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise OptionError(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def tool(name: str, folder: str) -> str:
    """Path of a build tool: on PATH, among this Python's scripts, or inside the package that carries it."""
    places = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    with contextlib.suppress(ImportError, AttributeError):
        places.append(str(getattr(importlib.import_module(name), folder)))
    if found := shutil.which(name, path=os.pathsep.join(places)):
        return found
    raise Unavailable(f"{name} was not found: pip install {name}")


def run(*command: str | Path) -> None:
    """Runs a build step, its output passed on; raises Unavailable with the errors in it."""
    lines: list[str] = []
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as p:
        for line in p.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if p.returncode:
        first = next((i for i, line in enumerate(lines) if "error" in line.lower() or "FAILED" in line), max(0, len(lines) - 5))
        step = f"{Path(command[0]).name} {command[1]}"
        raise Unavailable(f"{step} failed with status {p.returncode}:\n" + "\n".join(lines[first : first + 12]))


def build_native(prefix: Path) -> dict[str, object]:
    """Compiles the native library and installs it under ``prefix``/fpet_kernels; returns the facts worth recording."""
    compiler = find_compiler()
    if compiler is None:
        wanted = f"CXX={os.environ['CXX']!r}" if os.environ.get("CXX") else "c++, g++ or clang++ on PATH"
        raise Unavailable(f"no C++ compiler was found ({wanted}): apt install g++")
    try:
        torch = find_torch()
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from None
    if torch is None:
        raise Unavailable("torch >= 2.10 was not found: pip install torch, or set FPET_TORCH_DIR to the folder of the package")
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")

    chosen = [compiler, str(torch), os.environ.get("CXXFLAGS"), os.environ.get("CMAKE_ARGS"), sys.implementation.cache_tag]
    build = ROOT / "build" / f"native-{hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]}"
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release", f"-DFPET_TORCH_DIR={torch}"]
    introspection = Path(sysconfig.get_path("include"), "Python.h").exists()
    try:
        pybind11 = importlib.import_module("pybind11").get_cmake_dir()
    except ImportError:
        introspection = False
    options.append(f"-DFPET_INTROSPECT={'ON' if introspection else 'OFF'}")
    if introspection:
        options += [f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *options)
    run(cmake, "--build", build, *(["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []))
    run(cmake, "--install", build, "--component", "python", "--prefix", prefix)
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
    return {"compiler": version.partition("\n")[0], "torch": torch_version(torch), "introspection": introspection}


class BuildNative(build_ext):
    """Builds the native library or, where it can't be, records why and leaves the pure-PyTorch path."""

    def run(self) -> None:
        native, cuda = switch("FPET_NATIVE"), switch("FPET_CUDA")
        if cuda == "1":
            raise CompileError("FPET_CUDA=1: expected auto or 0, because this version has no CUDA kernels to compile")
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = prefix / "fpet_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in (package / "libfpet_ops.so", *package.glob("_introspect.*.so")):
            stale.unlink(missing_ok=True)  # never leave a library of other sources behind
        info: dict[str, object] = {"native": False}
        try:
            if native == "0":
                raise Unavailable("FPET_NATIVE=0 was set when it was installed: unset it and install again")
            info = {"native": True, **build_native(prefix)}
        except Unavailable as why:
            info["reason"] = str(why)
            if native == "1":
                raise CompileError(f"FPET_NATIVE=1, and the native library can't be built: {why}") from None
            print(
                f"\nfpet_kernels: the native C++ library was NOT built; the pure-PyTorch path is in use. Reason: {why}\n"
                "Everything works, more slowly. Mend it and install again; `python -m fpet_kernels` says what is active.\n",
                file=sys.stderr,
                flush=True,
            )
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        self.info = info

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """Tags the wheel after what was built: the operators need one platform, the introspection module one Python as well."""

    def get_tag(self) -> tuple[str, str, str]:
        info = getattr(self.get_finalized_command("build_ext"), "info", {})
        python, abi, platform = super().get_tag()
        if not info.get("introspection"):
            python, abi = "py3", "none"
        return python, abi, platform if info.get("native") else "any"


setup(
    packages=[*find_packages(include=["fpet_kernels", "fpet_kernels.*"]), *find_packages("python", include=["fpet", "fpet.*"])],
    package_dir={"fpet": "python/fpet"},
    ext_modules=[Extension("fpet_kernels._introspect", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
