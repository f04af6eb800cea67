"""What a model costs: memory of a training step, what an allocator takes for it, FLOPs."""

from .allocator import MIB, CachingAllocator
from .flops import flop_counter
from .memory import SavedTensors, StepMemory, reserved_memory, step_memory

__all__ = [
    "MIB",
    "CachingAllocator",
    "SavedTensors",
    "StepMemory",
    "flop_counter",
    "reserved_memory",
    "step_memory",
]
