"""What the kernel benchmark times: one call of every backend and baseline on one problem, and what it must hold in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fpet_kernels import backends, bdm_merge
from harness import gate
from harness.cases import Case, Problem
from harness.options import DTYPES

MODES = ("forward", "forward+backward")
BACKWARD = "backward"  # the fused backward by itself, from a forward's results; by default on a GPU only
REFERENCE, PAPER, PAPER_COMPILED, BEST = "reference", "paper", "paper_compiled", "best"
BASELINES = (REFERENCE, PAPER, PAPER_COMPILED, BEST)


@dataclass(frozen=True)
class Setting:
    """One line of the work list: a problem, and how much of it is differentiated."""

    case: Case
    batch: int
    dtype: str
    mode: str

    @property
    def backward(self) -> bool:
        """Whether gradients are part of it."""
        return self.mode != "forward"

    def bytes_moved(self, problem: Problem) -> int:
        """What must be read or written, each once."""
        return problem.bytes_moved(self.mode != BACKWARD, self.backward)

    def __str__(self) -> str:
        return f"{self.case.name}, batch {self.batch}, {self.dtype}, {self.mode}"


@dataclass
class Implementation:
    """Something to time: ``call`` returns (tokens, size, match, …) of the problem it was made for."""

    name: str
    call: Callable[[], tuple]
    lost_tokens: int = 0
    errors: dict[str, float] = field(default_factory=dict)


def backend_calls(name: str, problem: Problem) -> tuple[Callable[[], tuple], Callable[[], tuple]]:
    """The call that is timed, and one for the gate that also returns the runner-up of every source."""
    case, refinement = problem.case, problem.refinement

    def merge() -> tuple:
        return bdm_merge(
            problem.x, problem.key, grid_size=case.grid, num_prefix_tokens=case.num_prefix_tokens, refinement=refinement,
            backend=name,
        )  # fmt: skip

    def with_second() -> tuple:
        if name == REFERENCE:
            second = gate.reference_answer(problem, backward=False).second
        else:
            with torch.no_grad():
                second = backends.forward_op(name)(
                    problem.x, problem.key, None, problem.w_down, problem.w_up, None, None, None, None, *case.grid,
                    case.num_prefix_tokens, 1.0, True,
                )[3]  # fmt: skip
        return (*merge(), second)

    return merge, with_second


def backward_alone(name: str, problem: Problem) -> Callable[[], gate.Answer]:
    """The backward's operator on the results of one forward; returns those with the gradients."""
    case, w_down, w_up = problem.case, problem.w_down, problem.w_up
    inputs = tuple(None if t is None else t.detach() for t in (problem.x, problem.key, None, w_down, w_up, None, None))
    task = (None, None, *case.grid, case.num_prefix_tokens, 1.0, True)
    results = backends.forward_op(name)(*inputs, *task)
    needs = (True, False, w_down is not None, False, False)

    def call() -> gate.Answer:
        found = backends.backward_op(name)(problem.grad_tokens, problem.grad_size, *inputs, *results, *task, *needs)
        return gate.Answer(*results[:4], found[:1] if w_down is None else (found[0], found[2], found[3]))

    return call


def step(call: Callable[[], tuple], problem: Problem, mode: str) -> Callable[[], object]:
    """What is timed: the call, and with ``forward+backward`` the gradients of everything learned."""
    if mode != "forward+backward":
        return call

    def both() -> object:
        tokens, size = call()[:2]
        return gate.gradients(tokens, size, problem)

    return both


def memory_needed(setting: Setting, name: str) -> int:
    """Bytes beyond the inputs, roughly and from above: dense N_A × N_B tensors, and copies of the tokens."""
    case, item = setting.case, DTYPES[setting.dtype].itemsize
    dense, copies = {PAPER: (8, 6), PAPER_COMPILED: (6, 6), REFERENCE: (14, 10)}.get(name, (0, 4))
    if name.startswith("indexed_"):
        dense, copies = 6, 6
    grow = 2 if setting.backward else 1
    num_a, num_b = case.split.a.numel(), case.split.b.numel()
    return setting.batch * max(item, 4) * grow * (dense * num_a * num_b + copies * case.num_tokens * case.dim)
