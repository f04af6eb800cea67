"""Ways to have fewer tokens, to compare with FPET's: :func:`apply_reduction`; :func:`register_reduction` adds one's own."""

from .model import ReducedVisionTransformer, apply_reduction, flops_target, remove_reduction
from .registry import REDUCTIONS, Place, Reducer, Reduction, ReductionConfig, Tokens, register_reduction

__all__ = [
    "REDUCTIONS",
    "Place",
    "ReducedVisionTransformer",
    "Reducer",
    "Reduction",
    "ReductionConfig",
    "Tokens",
    "apply_reduction",
    "flops_target",
    "register_reduction",
    "remove_reduction",
]
