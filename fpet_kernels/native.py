"""The native libraries: where they belong, loading them, and what their build recorded."""

from __future__ import annotations

import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["CPU", "CPU_LIBRARY", "CUDA", "CUDA_LIBRARY", "Status", "build_record", "library_path"]

CPU_LIBRARY = "libfpet_ops.so"
CUDA_LIBRARY = "libfpet_cuda_ops.so"
_MIN_TORCH = (2, 10)


class Status(NamedTuple):
    """Whether a backend can run here at all, why (not), and a one-line fix."""

    available: bool
    reason: str
    fix: str = ""


def library_path(name: str = CPU_LIBRARY) -> Path:
    """Where a native library belongs: beside this file."""
    return Path(__file__).parent / name


def build_record() -> dict[str, Any]:
    """What the installation recorded of its build. Empty: nothing; ``{"damaged": why}``: a file that can't be read."""
    path = library_path("_build_info.json")
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not isinstance(record.get("cuda", {}), dict):
            raise ValueError("it holds no record")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        return {"damaged": f"{path}: {error}"}
    return record


def _load(name: str, works: str, rebuild: str) -> Status:
    """Loads a native library, whose kernels register themselves. It asks for no GPU and no driver."""
    if os.environ.get("FPET_DISABLE_NATIVE", "") not in ("", "0"):
        return Status(False, "FPET_DISABLE_NATIVE is set", "unset FPET_DISABLE_NATIVE")
    path = library_path(name)
    if not path.exists():
        archive = next((parent for parent in path.parents if parent.is_file()), None)
        if archive is not None:
            return Status(False, f"{name} can't be loaded out of {archive}", f"unpack it, or {rebuild}")
        return Status(False, f"{name} was not built", rebuild)
    if tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2]) < _MIN_TORCH:
        why = f"torch {torch.__version__} is older than 2.10, the first with this stable ABI"
        return Status(False, why, "pip install -U torch")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = error.__cause__ or error  # the loader's own words, where torch wraps them
        return Status(False, f"{name} does not load: {cause}", rebuild)
    return Status(True, works)


def _load_cpu_library() -> Status:
    rebuild = "pip install --force-reinstall --no-cache-dir . (with a C++20 compiler: apt install g++)"
    found = _load(CPU_LIBRARY, f"native C++ kernels for {platform.machine()}", rebuild)
    record = {} if found.available or library_path(CPU_LIBRARY).exists() else build_record()
    if record.get("failed") and found.reason.endswith("was not built"):  # pip shows nothing of an install that succeeds
        why = str(record.get("reason", "")).partition("\n")[0].rstrip(":")
        message = f"the native library could not be built when fpet_kernels was installed: {why}"
        warnings.warn(
            f"{message}. Tensors on the CPU take the slower PyTorch path; python -m fpet_kernels says more", stacklevel=2
        )
        return found._replace(reason=message)
    return found


def _load_cuda_library() -> Status:
    if torch.version.hip:  # its tensors say that they are on cuda, but must not meet these kernels
        why = f"torch {torch.__version__} is built for ROCm, and these kernels for CUDA"
        return Status(False, why, "none needed: Triton runs there")
    if not torch.version.cuda:
        return Status(False, f"torch {torch.__version__} is built without CUDA", "install a build of torch with CUDA")
    rebuild = "FPET_CUDA=1 pip install --force-reinstall --no-cache-dir . (with nvcc 12.4 or later)"
    found = _load(CUDA_LIBRARY, "native CUDA kernels", rebuild)
    if found.available or library_path(CUDA_LIBRARY).exists():
        return found
    why = str(build_record().get("cuda", {}).get("reason", "")).partition("\n")[0].rstrip(":")
    return found._replace(reason=f"{found.reason}: {why}") if why else found


# Loaded once, and before fpet_kernels.ops looks which schemas there are.
CPU = _load_cpu_library()
CUDA = _load_cuda_library()
