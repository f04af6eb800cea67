"""What the way to a kernel costs on the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import fpet_kernels
from fpet_kernels import bdm_merge
from harness.rows import Row


def overhead(names: list[str], device: torch.device, budget: float) -> list[Row]:
    """µs that one forward on a tiny input takes on the host: what the way to the kernel costs."""
    x = torch.randn(1, 17, 16, device=device)
    key, w_down, w_up = torch.randn(1, 17, 8, device=device), torch.randn(4, 8, device=device), torch.randn(8, 4, device=device)
    refinement, learned = fpet_kernels.KeyRefinement(w_down, w_up), x.clone().requires_grad_()
    calls: dict[str, Callable[[], object]] = {"torch.add, for scale": lambda: torch.add(x, x)}
    for name in names:
        calls[f"{name}: bdm_merge"] = lambda n=name: bdm_merge(x, key, grid_size=(4, 4), backend=n)  # type: ignore[misc]
        calls[f"{name}: bdm_merge with refinement"] = lambda n=name: bdm_merge(  # type: ignore[misc]
            x, key, grid_size=(4, 4), refinement=refinement, backend=n
        )
        calls[f"{name}: bdm_merge recorded for backward"] = lambda n=name: bdm_merge(learned, key, grid_size=(4, 4), backend=n)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {n: [] for n in calls}
    start, count = time.perf_counter(), 100
    while time.perf_counter() - start < budget or len(seconds[next(iter(seconds))]) < 5:
        for name, call in calls.items():
            for _ in range(count // 10):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - begin) / count)
    rows = []
    for name, found in seconds.items():
        found.sort()
        rows.append({
            "benchmark": "host_overhead", "implementation": name, "device": device.type,
            "us_per_call": found[len(found) // 2] * 1e6, "us_per_call_min": found[0] * 1e6,
            "rounds": len(found), "calls_per_round": count,
        })  # fmt: skip
    return rows
