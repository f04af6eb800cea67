"""The doctor, ``python -m fpet_kernels [--json]``: versions, every backend or the reason why not, build facts, a self-test.

Exit status: 0, every device here has a fused backend and all backends pass the self-test; 1, some device is left to the
pure-PyTorch path; 2, a backend gives wrong results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends
from .merge import KeyRefinement, bdm_merge
from .native import build_record
from .provenance import cpu_model, package_version
from .split import checkerboard
from .version import __version__

__all__ = ["main", "report", "self_test"]

TOLERANCE = 1e-4  # float32 against float64 on a tiny problem, relative to the largest value; 1e-6 is usual


def _build_facts() -> dict[str, Any]:
    """What the installation recorded, and what the CPU library says of itself."""
    facts: dict[str, Any] = {}
    if record := build_record():
        facts["recorded"] = record
    facts["library"] = backends.cpu_facts()
    return facts


def _run(dtype: torch.dtype, device: torch.device, backend: str) -> list[Tensor]:
    """Outputs and all gradients of a small problem: heads, two prefix tokens, refinement, sizes, an odd grid."""
    grid, prefix, dim, channels, hidden, batch = (5, 7), 2, 24, 16, 8, 2
    n = prefix + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    key = draw(batch, 2, n, channels)
    leaves = [
        draw(batch, n, dim),
        draw(batch, n, 1).abs() + 0.5,
        draw(hidden, channels),
        draw(channels, hidden),
        draw(batch, n, channels),
    ]
    x, size, w_down, w_up, key_delta = (leaf.requires_grad_() for leaf in leaves)
    out = bdm_merge(
        x, key, grid_size=grid, num_prefix_tokens=prefix, size=size, refinement=KeyRefinement(w_down, w_up, 0.1),
        key_delta=key_delta, backend=backend,
    )  # fmt: skip
    merged = prefix + checkerboard(*grid).b.shape[0]
    loss = (out.tokens * draw(batch, merged, dim)).sum() + (out.size * draw(batch, merged, 1)).sum()
    return [out.tokens, out.size, out.match, *torch.autograd.grad(loss, leaves)]


def self_test(backend: str, device: torch.device) -> dict[str, Any]:
    """Runs a tiny forward and backward in float32 on ``backend`` and compares with the reference in float64.

    Returns:
        ``ok``, and ``max_error`` (relative to the largest value of each output or gradient) or the ``error`` raised.
    """
    try:
        found, expected = _run(torch.float32, device, backend), _run(torch.float64, torch.device("cpu"), "reference")
        if not torch.equal(found[2].cpu(), expected[2]):
            return {"ok": False, "error": "the match differs from the reference's"}
        pairs = [(f.double().cpu(), e.double()) for f, e in zip(found, expected, strict=True)]
        worst = torch.stack([(f - e).abs().max() / e.abs().max() for f, e in pairs]).max().item()  # NaN prevails
    except Exception as error:  # whatever breaks a backend is the finding
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"ok": worst <= TOLERANCE, "max_error": worst}


def report() -> dict[str, Any]:
    """All that the doctor knows, as plain data: versions, system, devices, backends, build, status."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    probes = {device: torch.empty(1, 1, 1, device=device) for device in devices}
    chosen = {str(device): backends.select(probe, None) for device, probe in probes.items()}

    found: dict[str, dict[str, Any]] = {}
    for name in backends.ORDER:
        entry: dict[str, Any] = dict(backends.status(name)._asdict())
        refused = {device: backends.refuses(name, probe) for device, probe in probes.items()}
        runs_on = [device for device, why in refused.items() if why is None]
        if entry["available"] and name != "cpu":
            entry["refused"] = {str(device): why for device, why in refused.items() if why and device.type != "cpu"}
        if runs_on and entry["available"]:
            entry["self_test"] = {str(device): self_test(name, device) for device in runs_on}
        found[name] = entry

    tests = [test for entry in found.values() for test in entry.get("self_test", {}).values()]
    status = 2 if not all(test["ok"] for test in tests) else int("reference" in chosen.values())
    return {
        "fpet_kernels": {"version": __version__, "location": str(Path(__file__).parent)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": package_version("triton"),
            "timm": package_version("timm"),
        },
        "system": {
            "os": platform.platform(),
            "machine": platform.machine(),
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "devices": [
                {"name": p.name, "capability": f"{p.major}.{p.minor}"}
                for p in map(torch.cuda.get_device_properties, devices[1:])
            ],
            "library": backends.cuda_facts(),
        },
        "backends": found,
        "chosen": chosen,
        "build": _build_facts(),
        "status": status,
    }


def _build_lines(build: dict[str, Any]) -> list[str]:
    lines = []
    recorded = build.get("recorded")
    if recorded is None:
        lines.append("native      no record: this source tree was never installed; fix: pip install -e . --no-build-isolation")
    elif "damaged" in recorded:
        lines.append(f"native      the record of the build is damaged: {recorded['damaged']}; fix: install again")
    elif recorded.get("native"):
        lines.append(f"native      built with {recorded.get('compiler')}, against torch {recorded.get('torch')}")
    else:
        lines.append("native      not built: " + str(recorded.get("reason")).replace("\n", "\n" + 14 * " "))
    if recorded and "kept" in recorded:
        lines.append(
            "native      of an earlier build, since the last one failed: " + recorded["kept"].replace("\n", "\n" + 14 * " ")
        )
    cuda = (recorded or {}).get("cuda", {})
    if "reason" in cuda:
        lines.append("CUDA        not built: " + cuda["reason"].replace("\n", "\n" + 14 * " "))
    if facts := build["library"]:
        in_use = facts.get("cpu_isa_refused") or f"{facts['cpu_isa_in_use']} in use"
        lines += [
            f"compiler    {facts['compiler']}, C++ {facts['cxx_standard']}, {' '.join(facts['flags'])}",
            f"ISA         {in_use}; compiled: {', '.join(facts['cpu_isas_compiled'])}",
        ]
    return lines


def _cuda_lines(library: dict[str, Any]) -> list[str]:
    """The CUDA library: what it was compiled for, and every kernel on every device."""
    if not library:
        return []
    runtime = f"{library['runtime'] // 1000}.{library['runtime'] % 1000 // 10}"
    lines = [f"CUDA        nvcc {library['nvcc']}, runtime {runtime}, architectures {library['architectures']}"]
    for device, found in library["devices"].items():
        if "error" in found:
            lines.append(f"  {device}  {found['error']}")
        for kernel in found.get("kernels", ()):
            shared = kernel["static_shared"] + kernel["dynamic_shared"]
            verdict = kernel["error"] or (
                f"{kernel['registers']} registers, {kernel['spilled_bytes']} bytes spilled, {shared} bytes of shared memory, "
                f"{kernel['blocks_per_sm']} blocks of {kernel['threads']} threads a multiprocessor"
            )
            lines.append(f"  {device}  {kernel['name']}: {verdict}")
    return lines


def render(facts: dict[str, Any]) -> str:
    """The report for people."""
    versions, system, cuda = facts["versions"], facts["system"], facts["cuda"]
    gpus = ", ".join(f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in cuda["devices"]) or "no GPU"
    lines = [f"fpet_kernels {facts['fpet_kernels']['version']}  {facts['fpet_kernels']['location']}"]
    lines += [f"  {name:<10}  {version or 'not installed'}" for name, version in versions.items()]
    lines += [
        f"  {'system':<10}  {system['os']}",
        f"  {'CPU':<10}  {system['cpu']}, {system['cpus']} CPUs, torch uses {system['torch_threads']} threads",
        f"  {'GPU':<10}  {gpus}; torch is built for CUDA {cuda['torch_built_for'] or '(none)'}",
        "backends",
    ]
    for name, entry in facts["backends"].items():
        lines.append(f"  {name:<10}  {'yes' if entry['available'] else 'no'}: {entry['reason']}")
        if entry["fix"] and not entry["available"]:
            lines.append(f"  {'':<10}  fix: {entry['fix']}")
        for device, why in entry.get("refused", {}).items():
            lines.append(f"  {'':<10}  not on {device}: {why}")
        for device, test in entry.get("self_test", {}).items():
            verdict = "forward and backward agree with float64, largest error" if test["ok"] else "WRONG:"
            detail = test["error"] if "error" in test else f"{test['max_error']:.1e}"
            lines.append(f"  {'':<10}  self-test on {device}: {verdict} {detail}")
    lines += [
        "build",
        *(f"  {line}" for line in _build_lines(facts["build"])),
        *(f"  {line}" for line in _cuda_lines(cuda["library"])),
    ]
    lines.append("; ".join(f"{device}: bdm_merge takes {name!r}" for device, name in facts["chosen"].items()))
    lines.append(
        (
            "All is well.",
            "The pure-PyTorch path is in use where it says 'reference': right, but slower. See above for the fix.",
            "A backend is WRONG here. Force another with backend=..., and report this output.",
        )[facts["status"]]
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fpet_kernels", description="What is active on this machine, what is not, and why."
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    args = parser.parse_args(argv)
    facts = report()
    print(json.dumps(facts, indent=1) if args.json else render(facts))
    return int(facts["status"])


if __name__ == "__main__":
    sys.exit(main())
