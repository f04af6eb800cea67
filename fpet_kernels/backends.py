"""Which backends there are, why not the others, and which one a call takes.

To add a backend: a name in ``ORDER``, a ``_status_*`` function, a rule in :func:`refuses`, and its two operators in
:func:`forward_op` and :func:`backward_op`. docs/backends.md says more.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import (
    native,
    ops,  # noqa: F401  (so that the operators below have their schemas)
)
from .native import Status, library_path
from .tracing import constant_while_compiling

__all__ = [
    "ORDER",
    "PREFERRED",
    "Preference",
    "Status",
    "backward_op",
    "cuda_facts",
    "explain",
    "forward_op",
    "library_path",
    "refuses",
    "select",
    "status",
]

# Preference; every backend runs only on the devices that refuses() lets through.
ORDER = ("cuda", "triton", "cpu", "reference")


class Preference(NamedTuple):
    """A class of calls for which a measurement puts ``backend`` before what ``ORDER`` says."""

    backend: str
    dtypes: tuple[torch.dtype, ...]  # of x
    tokens: range  # N, prefix tokens included
    measured: str  # the device and the command

    def covers(self, x: Tensor) -> bool:
        return x.dtype in self.dtypes and x.shape[1] in self.tokens


# The first that covers a call and whose backend can run it wins. Rows come from the tables of `make gpu-tables`, by hand: where
# they show Triton faster for a dtype and a range of lengths. Empty: nothing has been measured on a GPU yet.
PREFERRED: tuple[Preference, ...] = ()


_NATIVE, _CUDA = native.CPU, native.CUDA


def _ask(library: str, question: str, *arguments: int) -> dict[str, Any]:
    """The answer of one of the plain C functions of a library (csrc/bindings/introspect.cpp, cuda_ops.cpp)."""
    ask = getattr(ctypes.CDLL(str(library_path(library))), question)
    ask.restype = ctypes.c_char_p
    answer: dict[str, Any] = json.loads(ask(*arguments))
    return answer


def _ask_cuda(question: str, *arguments: int) -> dict[str, Any]:
    return _ask(native.CUDA_LIBRARY, question, *arguments)


def cpu_facts() -> dict[str, Any]:
    """The CPU library's ``compiler``, ``flags``, ``cxx_standard``, ``cpu_isas_compiled`` (best first), ``cpu_isa_in_use`` and
    ``cpu_isa_refused``: why FPET_CPU_ISA can't be followed, if it can't.

    Empty without it, or where it is of an older build that can't tell.
    """
    if not _NATIVE.available:
        return {}
    try:
        facts = _ask(native.CPU_LIBRARY, "fpet_cpu_build")
    except AttributeError:
        return {}
    return {**facts, "flags": facts["flags"].split(), "cpu_isas_compiled": facts["cpu_isas_compiled"].split()}


def _cuda_driver() -> int:
    """The CUDA version that the driver is for, as 1000 major + 10 minor; 0 without one."""
    return ctypes.CDLL(str(library_path(native.CUDA_LIBRARY))).fpet_cuda_driver()


def cuda_facts() -> dict[str, Any]:
    """The CUDA library's ``nvcc``, ``architectures``, ``runtime`` version, and kernels by device; empty without it."""
    if not _CUDA.available:
        return {}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {**_ask_cuda("fpet_cuda_build"), "devices": {f"cuda:{i}": _ask_cuda("fpet_cuda_kernels", i) for i in range(count)}}


def _status_cuda() -> Status:
    if not _CUDA.available:
        return _CUDA
    build = _ask_cuda("fpet_cuda_build")
    if not torch.cuda.is_available():
        fix = f"needs an NVIDIA GPU with a driver for CUDA {build['runtime'] // 1000} or later; nvidia-smi shows what there is"
        return Status(False, "built, but torch finds no CUDA device here", fix)
    return Status(True, f"native CUDA kernels, compiled by nvcc {build['nvcc']} for {build['architectures']}")


_REFUSED_BY_CUDA: dict[int, str | None] = {}


@constant_while_compiling
def _refused_by_cuda(index: int) -> str | None:
    """Why the compiled kernels don't run on this GPU; None if they do.

    Worked out from what was compiled, without a question to the device: a first call may be one that a CUDA graph captures.
    """
    if index not in _REFUSED_BY_CUDA:
        build = _ask_cuda("fpet_cuda_build")
        why = _no_code_for(torch.cuda.get_device_capability(index), build["architectures"], build["runtime"], _cuda_driver())
        _REFUSED_BY_CUDA[index] = why
    return _REFUSED_BY_CUDA[index]


def _no_code_for(capability: tuple[int, int], targets: str, runtime: int, driver: int) -> str | None:
    """Why code compiled for ``targets`` (CMake's names) by CUDA ``runtime`` doesn't run under ``driver`` on this GPU, or None.

    Machine code runs on its own compute capability and on later minor ones; where its name ends in a letter, on its own alone
    ("a") or its family ("f", later minors). PTX runs on all later ones, compiled by a driver no older than its compiler.
    """
    if driver // 1000 < runtime // 1000:
        version = f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "no CUDA at all"
        return f"the driver is for {version}, and these kernels were compiled by CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    by_ptx = False
    for target in targets.split():
        number, _, kind = target.partition("-")
        compiled, letter = divmod(int(number.rstrip("af")), 10), number[len(number.rstrip("af")) :]
        same = capability == compiled if letter == "a" else capability[0] == compiled[0] and capability[1] >= compiled[1]
        if kind != "virtual" and same:
            return None
        by_ptx |= kind != "real" and (capability == compiled if letter == "a" else capability >= compiled)
    if by_ptx and driver >= runtime:
        return None
    why = f"on compute capability {capability[0]}.{capability[1]}, compiled for {targets}: "
    if by_ptx:
        wanted, here = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
        return f"{why}its PTX needs a driver for CUDA {wanted}, and this one is for {here}"
    return f"{why}no kernel image for it"


def _find_triton() -> bool:
    """Whether Triton is installed, without importing it. A stand-in that somebody put in its place does not count."""
    module = sys.modules.get("triton")
    if module is not None:
        return isinstance(getattr(module, "__version__", None), str) and isinstance(getattr(module, "JITFunction", None), type)
    return importlib.util.find_spec("triton") is not None


_HAS_TRITON = _find_triton()
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
_NO_TRITON = Status(False, "the package triton is not installed", "pip install triton")
if sys.modules.get("triton") is not None and not _HAS_TRITON:
    _NO_TRITON = Status(False, "sys.modules['triton'] is not the package triton", "import fpet_kernels before it is replaced")


def _status_triton() -> Status:
    if not _HAS_TRITON:
        return _NO_TRITON
    if _INTERPRETED:
        return Status(True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), to debug on the CPU")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return Status(False, "no GPU that Triton knows", "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to debug")
    return Status(True, "Triton kernels, compiled at their first call")


_TOO_OLD: dict[int | None, str | None] = {}


@constant_while_compiling
def _too_old_for_triton(index: int | None) -> str | None:
    """Why the kernels don't compile for this NVIDIA GPU; None if they do."""
    if index not in _TOO_OLD:
        major, minor = (9, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
        _TOO_OLD[index] = (
            f"compute capability {major}.{minor} has no bfloat16 matrix units; 8.0 is the first that has" if major < 8 else None
        )
    return _TOO_OLD[index]


def _triton_operators() -> tuple[Any, Any]:
    """Imports Triton, at the first call that takes it."""
    from .triton import ops as triton_ops

    return triton_ops.forward, triton_ops.backward


def status(name: str) -> Status:
    """Status of backend ``name``; raises ValueError for a name that is none."""
    if name == "reference":
        return Status(True, "pure PyTorch, any device")
    if name == "cpu":
        return _NATIVE
    if name == "cuda":
        return _status_cuda()
    if name == "triton":
        return _status_triton()
    raise ValueError(f"backend: expected one of {', '.join(ORDER)} or None, got {name!r}")


def cuda_kernels_fail(x: Tensor) -> bool:
    """Whether x's device dispatches to CUDA kernels that are loaded and do not run on it; costs a look into a dict."""
    return x.device.type == "cuda" and _CUDA.available and _refused_by_cuda(x.device.index) is not None


def refuses(name: str, x: Tensor) -> str | None:
    """Why backend ``name`` can't take a call with tokens like ``x``; None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if x.device.type != "cpu":
            return f"x is on {x.device}, and this backend runs on the CPU"
        return None if _NATIVE.available else _NATIVE.reason
    if name == "cuda":
        device = x.device
        if device.type != "cuda":
            return f"x is on {device}, and this backend runs on cuda"
        return _refused_by_cuda(device.index) if _CUDA.available else _CUDA.reason
    if name == "triton":
        if not _HAS_TRITON:
            return _NO_TRITON.reason
        if x.device.type == "cpu":
            return None if _INTERPRETED else "x is on the CPU, where Triton runs only under TRITON_INTERPRET=1"
        if x.device.type not in ("cuda", "xpu"):
            return f"x is on {x.device}, and Triton runs on cuda (ROCm too) and xpu"
        return _too_old_for_triton(x.device.index) if x.device.type == "cuda" else None
    raise ValueError(f"backend: expected one of {', '.join(ORDER)} or None, got {name!r}")


def _preferred(x: Tensor) -> Preference | None:
    """The row of PREFERRED that decides a call with tokens ``x``."""
    for row in PREFERRED:
        if row.covers(x) and refuses(row.backend, x) is None:
            return row
    return None


def select(x: Tensor, backend: str | None) -> str:
    """The backend a call takes: ``backend`` itself, or the best one for x's device.

    Raises:
        ValueError: no backend has that name. RuntimeError: it has, and can't run this call.
    """
    if backend is None:
        kind = x.device.type
        if kind == "cpu":  # the interpreter is a debugging tool: never chosen by itself
            return "cpu" if _NATIVE.available else "reference"
        if kind == "meta":  # shapes alone, by the operators' fake functions: the same for every backend
            return "cpu"
        if PREFERRED and (row := _preferred(x)) is not None:
            return row.backend
        for name in ORDER:
            if refuses(name, x) is None:
                return name
    status(backend)  # type: ignore[arg-type]
    why = refuses(backend, x)  # type: ignore[arg-type]
    if why is not None:
        fix = status(backend).fix  # type: ignore[arg-type]
        raise RuntimeError(f"backend: {backend!r} can't run here: {why}" + (f". Fix: {fix}" if fix else ""))
    return backend  # type: ignore[return-value]


# The tensors' device chooses the kernel.
_OPS = dict.fromkeys(("cpu", "cuda"), (torch.ops.fpet.bdm_forward.default, torch.ops.fpet.bdm_backward.default))


def forward_op(name: str) -> Any:
    """The operator that runs the forward on backend ``name``."""
    if name == "triton":
        return _triton_operators()[0]
    return _OPS[name][0]


def backward_op(name: str) -> Any:
    """The operator that runs the backward on backend ``name``."""
    if name == "triton":
        return _triton_operators()[1]
    return _OPS[name][1]


def explain(x: Tensor | None = None, backend: str | None = None) -> str:
    """Says in words which backend a call with tokens ``x`` takes and why the others are passed over.

    Without ``x``: what is available on this machine.
    """
    lines = []
    chosen = None if x is None else select(x, backend)
    for name in ORDER:
        found = status(name)
        why_not = (None if found.available else found.reason) if x is None else refuses(name, x)
        mark = "→" if name == chosen else " "
        verdict = found.reason if why_not is None else f"no: {why_not}" + (f"; fix: {found.fix}" if found.fix else "")
        lines.append(f"{mark} {name:<10} {verdict}")
    if x is not None:
        row = None if backend or x.device.type in ("cpu", "meta") else _preferred(x)
        why = "asked for by name" if backend else f"the first that runs on {x.device}"
        if row is not None:
            why = f"measured to be the fastest for {x.shape[1]} tokens of {str(x.dtype)[6:]} ({row.measured})"
        elif chosen == "cuda" and not backend:
            why += "; no measurement prefers another here" if PREFERRED else "; not measured yet: cuda is taken where built"
        lines.append(f"bdm_merge takes {chosen!r}: {why}.")
    return "\n".join(lines)
