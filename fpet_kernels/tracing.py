"""Who watches calls go by: compilers, exporters, tracers and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["constant_while_compiling", "observed", "requires_gradient", "transformed"]

F = TypeVar("F", bound=Callable[..., Any])

transformed = torch._C._are_functorch_transforms_active  # under torch.func.grad, vjp, vmap, jvp …


def observed() -> bool:
    """Whether a call must go by as one operator that carries its derivatives: it is recorded, or transformed."""
    return torch.compiler.is_compiling() or transformed() or torch._C._is_tracing()


def requires_gradient(t: Tensor) -> bool:
    """At any level of torch.func."""
    if torch.compiler.is_compiling() or not transformed():
        return t.requires_grad
    while not t.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


def constant_while_compiling(function: F) -> F:
    """Dynamo calls ``function`` while it traces and takes the result as a constant, instead of tracing into it.

    What torch.compiler.assume_constant_result does; calling that would import Dynamo, and with it Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
