"""Times of several calls that are to be compared: in turns, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

__all__ = ["CLOCKS", "MIN_ROUNDS", "Call", "quotient", "take_turns"]

MIN_ROUNDS, MAX_ROUNDS = 5, 200
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Call = Callable[[], object]
K = TypeVar("K", bound=Hashable)


def take_turns(
    calls: dict[K, Call], device: torch.device, budget: float, *, clock: str = "wall",
    tick: Callable[[float], object] = lambda _share: None,
) -> dict[K, list[float]]:  # fmt: skip
    """Seconds per call, round by round, for about ``budget`` seconds and at least 5 rounds.

    Each round starts with another call, so that whatever else the machine does hits all of them alike; first calls are not
    counted.

    Args:
        clock: "wall"; or "cpu" for the processor time of this process, which on a shared machine says more. CUDA has its own.
        tick: told the share of the work that is done, after every round.
    """
    take = _cuda_seconds(device) if device.type == "cuda" else _cpu_seconds(CLOCKS[clock])
    for call in calls.values():
        take(call)
    seconds: dict[K, list[float]] = {name: [] for name in calls}
    names, start, rounds = list(calls), time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (time.perf_counter() - start < budget and rounds < MAX_ROUNDS):
        shift = rounds % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            seconds[name].append(take(calls[name]))
        rounds += 1
        tick(min(1.0, rounds / MIN_ROUNDS, max((time.perf_counter() - start) / max(budget, 1e-9), rounds / MAX_ROUNDS)))
    return seconds


def _cpu_seconds(clock: Callable[[], float]) -> Callable[[Call], float]:
    def take(call: Call) -> float:
        start = clock()
        call()
        return clock() - start

    return take


def _cuda_seconds(device: torch.device) -> Callable[[Call], float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def take(call: Call) -> float:
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3

    return take


def quotient(one: list[float], other: list[float]) -> float:
    """Median over rounds of the quotient of two times of one round: what slows a whole round down cancels out."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))
