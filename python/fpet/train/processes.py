"""The processes of a run: the device of each, the group that a launcher set up, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["first_decides", "gather", "launched_world", "pick_device", "place", "process_group"]


def pick_device(name: str) -> torch.device:
    """ "cpu", "cuda" or "auto": the device of this process, under a launcher the local rank's GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def place() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def launched_world() -> int:
    """How many processes there are, or will be once :func:`process_group` is entered."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, world size). Joins the group that a launcher such as torchrun has set the environment for, if there is one."""
    if dist.is_initialized() or launched_world() == 1:
        yield place()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield place()
    finally:
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """What every process has, in the order of the ranks."""
    _, world = place()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def first_decides(value: Any) -> Any:
    """The value that process 0 has."""
    box = [value]
    if place()[1] > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
