"""Other ways to have fewer tokens, to compare with."""

from .reducers import COMPARATORS, Reducer, apply, flops_target, remove

__all__ = ["COMPARATORS", "Reducer", "apply", "flops_target", "remove"]
