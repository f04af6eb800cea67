"""Drives CMake: CMakeLists.txt is the one list of native sources, pyproject.toml has the metadata.

Environment: FPET_NATIVE=auto|0|1 (build the native library if possible, never, or fail where it can't be built),
FPET_CUDA=auto|0|1 (likewise for the library of CUDA kernels), FPET_CUDA_ARCHS (as CMAKE_CUDA_ARCHITECTURES) or
TORCH_CUDA_ARCH_LIST (as for PyTorch's extensions), CUDACXX (nvcc), FPET_TORCH_DIR (folder of the torch package to compile
against), CXX, CXXFLAGS, CMAKE_ARGS, MAX_JOBS.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import find_compiler, find_nvcc, find_torch, torch_cuda, torch_version  # noqa: E402

MIN_NVCC = (12, 4)
ANNOUNCED = re.compile(r"CUDA kernels: nvcc (?P<version>\S+), architectures (?P<architectures>.*)")  # by CMakeLists.txt


class Unavailable(Exception):
    """Why the native library can't be built here, and how to change that; ``missing``: for want of a tool."""

    missing = True


class Failed(Unavailable):
    """A build that was tried."""

    missing = False


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


def run(*command: str | Path) -> list[str]:
    """Runs a build step, its output passed on and returned; raises Unavailable with the errors in it."""
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
        raise Failed(f"{step} failed with status {p.returncode}:\n" + "\n".join(lines[first : first + 12]))
    return lines


def revision() -> dict[str, object]:
    """Commit of the checkout, for rows measured by an installation (fpet_kernels/provenance.py); nothing outside of one."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return {}

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, errors="replace")
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))} if commit else {}


def remove(folder: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        path.unlink()


def fingerprint() -> str:
    """Of the sources that the libraries are built of."""
    folders = ("bindings", "cpu", "cuda", "include")
    files = [path for folder in folders for path in sorted((ROOT / "csrc" / folder).rglob("*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in (ROOT / "CMakeLists.txt", *files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def recorded() -> dict[str, Any]:
    """What the last build in this tree recorded; empty where there is none, or none that can be read."""
    try:
        record = json.loads((ROOT / "fpet_kernels" / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("cuda", {}), dict) else {}


def keep(package: Path, files: tuple[str, ...]) -> bool:
    """Brings the libraries of an earlier build in this tree to ``package``; whether the first of them was there."""
    tree = ROOT / "fpet_kernels"
    for path in (tree / name for name in files if package != tree and (tree / name).exists()):
        shutil.copy2(path, package)
    return (package / files[0]).exists()


class Build:
    """What both libraries are built with."""

    def __init__(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            wanted = f"CXX={os.environ['CXX']!r}" if os.environ.get("CXX") else "c++, g++ or clang++ on PATH"
            raise Unavailable(f"no C++ compiler was found ({wanted}): apt install g++")
        try:
            torch = find_torch()
        except FileNotFoundError as error:
            raise Unavailable(str(error)) from None
        if torch is None:
            raise Unavailable(
                "torch >= 2.10 was not found: pip install torch, or set FPET_TORCH_DIR to the folder of the package"
            )
        self.compiler, self.torch = compiler, torch
        self.cmake, self.ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")

    def run(self, prefix: Path, component: str, target: str, *options: str, **chosen: object) -> tuple[Path, list[str]]:
        """Configures, compiles ``target`` and installs ``component`` under ``prefix``/fpet_kernels.

        Returns the folder it was compiled in, where `make ctest` finds the objects, and what CMake said.
        """
        given = {name: os.environ.get(name) for name in ("CXXFLAGS", "CMAKE_ARGS")}
        key = json.dumps([str(ROOT), self.compiler, str(self.torch), given, chosen])
        folder = ROOT / "build" / f"{target}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        common = [f"-DCMAKE_MAKE_PROGRAM={self.ninja}", "-DCMAKE_BUILD_TYPE=Release", f"-DFPET_TORCH_DIR={self.torch}"]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))

        def build() -> tuple[Path, list[str]]:
            said = run(self.cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *common, *options, *arguments)
            run(self.cmake, "--build", folder, "--target", target, *jobs)
            run(self.cmake, "--install", folder, "--component", component, "--prefix", prefix)
            return folder, said

        used_before = folder.exists()
        try:
            return build()
        except Unavailable as why:
            if not used_before:
                raise
            # CMake's cache holds paths of a folder that was moved, or of tools that are gone.
            reason = str(why).partition("\n")[0]
            print(f"fpet_kernels: {folder} does not build ({reason}); once more from nothing", flush=True)
            shutil.rmtree(folder)
            return build()

    def cpu(self, prefix: Path) -> dict[str, object]:
        """Builds the CPU library; returns the facts worth recording."""
        folder, _ = self.run(prefix, "python", "fpet_ops", "-DFPET_CUDA=OFF")
        version = subprocess.run([*self.compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
        torch = torch_version(self.torch)
        return {"compiler": version.partition("\n")[0], "torch": torch, "folder": folder.relative_to(ROOT).as_posix()}

    def cuda(self, prefix: Path) -> dict[str, object]:
        """Builds the library of CUDA kernels."""
        if torch_cuda(self.torch) is None and os.environ.get("FPET_CUDA") != "1":
            raise Unavailable(f"torch {torch_version(self.torch)} is built without CUDA: install a build with CUDA")
        nvcc = find_nvcc()
        if nvcc is None:
            wanted = f"CUDACXX={os.environ['CUDACXX']!r}" if os.environ.get("CUDACXX") else "PATH, CUDA_HOME, /usr/local/cuda"
            raise Unavailable(f"no nvcc was found ({wanted}): install the CUDA toolkit, 12.4 or later")
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace").stdout
        found = re.search(r"V(\d+)\.(\d+)[.\d]*", release)
        if found is None or (int(found[1]), int(found[2])) < MIN_NVCC:
            raise Unavailable(f"expected nvcc 12.4 or later, got {found[0] if found else repr(release[:80])} ({nvcc})")
        options = ["-DFPET_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        if os.environ.get("CXX") and not os.environ.get("CUDAHOSTCXX"):
            options.append(f"-DCMAKE_CUDA_HOST_COMPILER={shutil.which(self.compiler[-1]) or self.compiler[-1]}")
        archs = {name: os.environ.get(name) for name in ("FPET_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAHOSTCXX")}
        folder, said = self.run(prefix, "python_cuda", "fpet_cuda_ops", *options, nvcc=nvcc, **archs)
        facts = next(m.groupdict() for line in said if (m := ANNOUNCED.search(line)))
        return {"nvcc": nvcc, **facts, "folder": folder.relative_to(ROOT).as_posix()}


class BuildNative(build_ext):
    """Builds the native libraries or, where one can't be, records why and leaves what there is without it."""

    def run(self) -> None:
        wanted = {"FPET_NATIVE": switch("FPET_NATIVE"), "FPET_CUDA": switch("FPET_CUDA")}
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = prefix / "fpet_kernels"
        package.mkdir(parents=True, exist_ok=True)
        before, sources = recorded(), fingerprint()

        def attempt(name: str, build: Callable[[Build, Path], dict[str, object]], *files: str) -> dict[str, object]:
            off = next((n for n in (name, "FPET_NATIVE") if wanted[n] == "0" and wanted[name] != "1"), None)
            try:
                if off:
                    raise Unavailable(f"{off}=0 was set when it was installed: unset it and install again")
                return {"built": True, "sources": sources, **build(Build(), prefix)}
            except Unavailable as why:
                if wanted[name] == "1":
                    raise CompileError(f"{name}=1, and it can't be built: {why}") from None
                known = before if name == "FPET_NATIVE" else before.get("cuda", {})
                known = {
                    key: value for key, value in known.items() if key not in ("native", "cuda", "built", "reason", "failed")
                }
                # One that was built before stays, and is installed, unless it is known to be of other sources.
                if not off and known.get("sources", sources) == sources and keep(package, files):
                    print(
                        f"fpet_kernels: {files[0]} of an earlier build is kept, since this one failed: {why}", file=sys.stderr
                    )
                    return {**known, "built": True, "kept": str(why)}
                remove(package, *files)
                failed = {} if off or why.missing else {"failed": True}
                return {"built": False, "reason": str(why), **failed}

        cpu = attempt("FPET_NATIVE", Build.cpu, "libfpet_ops.so")
        cuda = attempt("FPET_CUDA", Build.cuda, "libfpet_cuda_ops.so")
        self.say("native C++ library", cpu, "Tensors on the CPU take the pure-PyTorch path: right, but slower.")
        self.say("library of CUDA kernels", cuda, "Tensors on a GPU take Triton where it is installed.")
        self.info = {"native": cpu.pop("built"), **cpu, "cuda": cuda, **revision()}
        (package / "_build_info.json").write_text(json.dumps(self.info, indent=1) + "\n")

    @staticmethod
    def say(what: str, outcome: dict[str, object], otherwise: str) -> None:
        if "=0 was set" in str(outcome.get("reason")):
            print(f"fpet_kernels: no {what}: {outcome['reason']}", flush=True)
        elif outcome["built"]:
            how = ", ".join(f"{key} {value}" for key, value in outcome.items() if key != "built")
            print(f"fpet_kernels: built the {what}: {how}", flush=True)
        else:
            message = f"the {what} was NOT built. Reason: {outcome['reason']}\n{otherwise}"
            print(
                f"\nfpet_kernels: {message} Mend it and install again; `python -m fpet_kernels` says what is active.\n",
                file=sys.stderr,
                flush=True,
            )

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        """For editable_mode=strict, which links what is in the source tree: what a build has put there."""
        if not self.inplace:
            return {}
        found = (path for name in ("*.so", "_build_info.json") for path in (ROOT / "fpet_kernels").glob(name))
        return {str(Path(self.build_lib, "fpet_kernels", path.name)): str(path) for path in found}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """Tags the wheel after what was built: the libraries need a platform, and no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        info = getattr(self.get_finalized_command("build_ext"), "info", {})
        return "py3", "none", super().get_tag()[2] if info.get("native") or info.get("cuda", {}).get("built") else "any"


setup(
    packages=[*find_packages(include=["fpet_kernels", "fpet_kernels.*"]), *find_packages("python", include=["fpet", "fpet.*"])],
    package_dir={"fpet": "python/fpet"},
    ext_modules=[Extension("fpet_kernels._native", sources=[])],  # so that there is something to build
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
