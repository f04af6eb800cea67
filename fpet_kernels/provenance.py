"""Which code, machine and versions a measured row belongs to: :func:`provenance`."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import backends
from .version import __version__

__all__ = ["cpu_model", "package_version", "provenance"]

UNKNOWN = "unknown"
_ROOT = Path(__file__).resolve().parents[1]  # the source tree, where this is one
_PRODUCTS = (":(top,exclude)benchmarks/results", ":(top,exclude)docs/*.png")  # what benchmarks write changes no number


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=_ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _revision() -> tuple[str, bool | None]:
    """Commit, and whether tracked files differ from it: the checkout's; else what the build recorded; else unknown."""
    if (_ROOT / ".git").exists():  # an installed package may lie inside somebody else's repository
        commit = _run("git", "rev-parse", "HEAD")
        changed = _run("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", *_PRODUCTS)
        return commit or UNKNOWN, None if changed is None else bool(changed)
    try:
        record = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        record = {}
    return record.get("commit") or UNKNOWN, record.get("dirty")


def package_version(name: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Which code, machine and versions the numbers of this run belong to. The same fields from a checkout and an installation.

    Args:
        device: where it was measured. command: what was typed.
    """
    commit, dirty = _revision()
    gpu = device.type == "cuda"
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "isa": backends.cpu_facts().get("cpu_isa_in_use"),  # None: no native kernels
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "triton": package_version("triton"),
        "timm": package_version("timm"),
        "fpet_kernels": __version__,
    }
