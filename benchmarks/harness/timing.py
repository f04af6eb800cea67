"""Time, bandwidth and memory of callables, on the CPU and on CUDA devices.

All implementations are timed in one run, in turns: round by round, each round starting with another one, so that whatever
else the machine does hits all of them alike. A plain copy takes its turn too: its bandwidth is the machine's during this very
measurement. Reported are medians over rounds; first calls (compilation, caches) are not among them.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["COPY", "Samples", "available_bytes", "capture", "keep_freed_pages", "measure", "peak_extra_bytes"]

COPY = "copy"  # the name under which the copy takes its turns
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
MIN_ROUNDS = 5
MAX_ROUNDS = 400
SAMPLE_SECONDS = 3e-3  # a sample is one call, or as many as fill this


@dataclass
class Samples:
    """Seconds per call, one entry per round; ``calls`` made in each."""

    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        return sorted(self.seconds)[round(q * (len(self.seconds) - 1))]


def _copy_call(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy between two buffers several times as large as the last cache, and the bytes it reads and writes."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def measure(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    budget: float,
    *,
    graph: bool = False,
    tick: Callable[[float], object] = lambda _share: None,
) -> tuple[dict[str, Samples], float]:
    """Times ``calls``, warm already, in turns for about ``budget`` seconds, at least :data:`MIN_ROUNDS` rounds.

    Args:
        graph: CUDA only: the calls are replays (:func:`capture`), whose launch should not be timed.
        tick: told the share of the budget that has passed, after every round.

    Returns:
        the samples per name, and the bytes per second of the copy.
    """
    copy, copied = _copy_call(device)
    calls = {**calls, COPY: copy}
    take = _cuda_sampler(calls, device, graph) if device.type == "cuda" else _cpu_sampler(calls)
    samples = {name: Samples() for name in calls}
    for name in calls:  # the first sample says how many calls make a good one, and is dropped
        estimate = take(name, 1)
        if estimate < SAMPLE_SECONDS:
            estimate = min(take(name, 1) for _ in range(3))
        samples[name].calls = 1 if device.type == "cuda" else max(1, min(1000, round(SAMPLE_SECONDS / max(estimate, 1e-9))))
    names, start, rounds = list(calls), time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (time.perf_counter() - start < budget and rounds < MAX_ROUNDS):
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].seconds.append(take(name, samples[name].calls))
        rounds += 1
        tick(min(1.0, max((time.perf_counter() - start) / budget, rounds / MAX_ROUNDS)))
    return samples, copied / samples.pop(COPY).median


def _cpu_sampler(calls: dict[str, Callable[[], object]]) -> Callable[[str, int], float]:
    def take(name: str, count: int) -> float:
        call = calls[name]
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    return take


def _cuda_sampler(calls: dict[str, Callable[[], object]], device: torch.device, graph: bool) -> Callable[[str, int], float]:
    """One call per sample, between two events, with an L2 cache that holds none of its data, nor anything yet to be written
    back: something large is read, not written, before each sample.

    Graphs: the device is still flushing when the replay is enqueued, so device time is measured, launch costs hidden.
    Plain calls: the device is idle when the call is made, so the time holds what the host needs to launch it.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush, total = torch.ones(max(4 * l2, 1 << 28) // 4, device=device), torch.empty((), device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def take(name: str, count: int) -> float:
        torch.sum(flush, dim=0, out=total)
        if not graph:
            torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            calls[name]()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / count

    return take


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of ``call``; RuntimeError where the call can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# --- memory ----------------------------------------------------------------------------------------------------------


def keep_freed_pages() -> bool:
    """Tells glibc to hand freed memory out again instead of returning it to the system; False where that isn't possible.

    By default every large result of a PyTorch operator on the CPU is mapped anew, and touching its pages for the first time
    can cost more than computing it. Servers often avoid that by an allocator that keeps pages.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(mallopt(m_mmap_threshold, 1 << 30)) and bool(mallopt(m_trim_threshold, (1 << 31) - 1))


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found.group(1)) * 1024


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that one call holds at a time beyond what was there before it; its results are part of that.

    On the CPU: the high-water mark of the resident set, reset before the call; exact to some hundred KB. None where the
    system doesn't tell. On CUDA: what PyTorch's allocator counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages that are still resident would hide new ones
        Path("/proc/self/clear_refs").write_text("5")  # 5: set the high-water mark to the present resident set
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 1 << 62
