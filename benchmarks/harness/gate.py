"""The gate in front of the benchmark: nobody's speed is printed before its results are right.

A fused backend is compared, on the very tensors that are timed, with the formulas in float64. Rules:

- Decisions. A match (or a runner-up, which the gradient needs) that differs from float64's must be a provable near tie: its
  float64 score is below the best by at most four times the largest error that plain PyTorch's scores have on these inputs
  (two scores, each twice as wrong as PyTorch's).
- Values. With the decisions held fixed, the error of every output and gradient is at most twice that of plain PyTorch
  (``fpet_kernels.reference`` in the same dtype), plus one unit in the last place of the largest value. For float64, where
  plain PyTorch is the yardstick itself, 1e-11 of the largest value; the same for ties.
- Reproducibility. Bitwise the same in a second call, and for the same image anywhere in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fpet_kernels import reference

from .cases import Problem

__all__ = ["Answer", "Finding", "Verdict", "answer", "examine", "reference_answer", "with_decisions"]

FLOAT64_ERROR = 1e-11


class Answer(NamedTuple):
    """What one implementation says about a problem; ``grads`` in the order of ``Problem.leaves``, empty for a forward."""

    tokens: Tensor
    size: Tensor
    match: Tensor
    second: Tensor | None
    grads: tuple[Tensor, ...]


class Finding(NamedTuple):
    what: str
    error: float
    allowed: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed  # NaN is wrong


class Verdict(NamedTuple):
    findings: tuple[Finding, ...]
    flips: int

    @property
    def right(self) -> bool:
        return not any(f.wrong for f in self.findings)

    def complaint(self) -> str:
        return "; ".join(f"{f.what}: error {f.error:.3g}, allowed {f.allowed:.3g}" for f in self.findings if f.wrong)


def answer(call: Callable[[], tuple], problem: Problem, backward: bool) -> Answer:
    """Runs ``call``, which returns (tokens, size, match[, second]), and its backward where wanted."""
    if not backward:
        with torch.no_grad():
            tokens, size, match, *rest = call()
        return Answer(tokens, size, match, rest[0] if rest else None, ())
    tokens, size, match, *rest = call()
    grads = gradients(tokens, size, problem)
    return Answer(tokens.detach(), size.detach(), match, rest[0] if rest else None, grads)


def gradients(tokens: Tensor, size: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """d/d leaves of ⟨tokens, grad_tokens⟩ + ⟨size, grad_size⟩; size takes part where anything it depends on is learned."""
    if size.requires_grad:
        return torch.autograd.grad((tokens, size), problem.leaves, (problem.grad_tokens, problem.grad_size.to(size.dtype)))
    return torch.autograd.grad(tokens, problem.leaves, problem.grad_tokens)


def first_images(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The different images of a batch, once each, as leaves of their own; in ``dtype``."""

    def part(t: Tensor | None, images: bool = True) -> Tensor | None:
        if t is None:
            return None
        return (t[: problem.distinct] if images else t).detach().to(dtype or t.dtype)

    out = replace(
        problem, x=part(problem.x), key=part(problem.key), w_down=part(problem.w_down, False), w_up=part(problem.w_up, False),
        grad_tokens=part(problem.grad_tokens), grad_size=part(problem.grad_size),
    )  # fmt: skip
    out.requires_grad_(problem.x.requires_grad)
    return out


def scores_of(problem: Problem, dtype: torch.dtype) -> Tensor:
    """(B, N_A, N_B) similarities as the reference computes them, in ``dtype``."""
    key = reference.average_heads(problem.key.detach(), dtype)
    refined = reference.refine_key(key, problem.w_down, problem.w_up, 1.0, None, None)
    a, b = problem.case.split.on(problem.x.device)
    return reference.match_scores(refined, a, b, problem.case.num_prefix_tokens, "cosine")


def with_decisions(problem: Problem, match: Tensor, second: Tensor, backward: bool) -> Answer:
    """The paper's formulas in the dtype of ``problem``, given which destinations are the best and the second best.

    Args: match, second: (B, N_A) indices among the merged tokens.
    """

    def call() -> tuple:
        x, p = problem.x, problem.case.num_prefix_tokens
        a, b = problem.case.split.on(x.device)
        scores = scores_of(problem, x.dtype)
        best, runner_up = (match - p).unsqueeze(-1), (second - p).unsqueeze(-1)
        soft = torch.sigmoid(scores - (scores.gather(-1, best) + scores.gather(-1, runner_up)) / 2)
        hard = torch.zeros_like(soft).scatter(-1, best, 1.0)
        matching = F.pad(hard + (soft - soft.detach()), (p, 0))
        kept = torch.cat((torch.arange(p, device=x.device), b + p))
        size = 1 + matching.sum(1).unsqueeze(-1)
        return (x[:, kept] + matching.mT @ x[:, a + p]) / size, size, match, second

    return answer(call, problem, backward)


def reference_answer(problem: Problem, backward: bool) -> Answer:
    """Plain PyTorch: fpet_kernels.reference in the problem's own dtype."""
    case = problem.case

    def call() -> tuple:
        return reference.bdm_merge_reference(
            problem.x, problem.key, split=case.split, num_prefix_tokens=case.num_prefix_tokens,
            w_down=problem.w_down, w_up=problem.w_up,
        )[:4]  # fmt: skip

    return answer(call, problem, backward)


class Examiner:
    """Holds what the answers about one problem are judged by, so that several implementations can be examined."""

    def __init__(self, problem: Problem, backward: bool) -> None:
        self.problem, self.backward = problem, backward
        self.few, self.exact = first_images(problem), first_images(problem, torch.float64)
        self.scores = scores_of(self.exact, torch.float64).detach()
        compute = reference.compute_dtype(problem.x, problem.key)
        noise = (scores_of(self.few, compute).detach().double() - self.scores).abs().max().item()
        self.tie = FLOAT64_ERROR if compute == torch.float64 else 4 * noise + 4 * torch.finfo(compute).eps
        plain = reference_answer(self.few, backward)
        self.plain_errors = self._errors(plain, self._exact(plain), 1)

    def _exact(self, given: Answer) -> Answer:
        assert given.second is not None
        return with_decisions(self.exact, given.match, given.second, self.backward)

    def _errors(self, given: Answer, exact: Answer, copies: int) -> dict[str, tuple[float, float, float]]:
        """name → (largest error, largest magnitude, unit in the last place at 1); weight gradients count every copy."""
        out = {}
        values = {"tokens": (given.tokens, exact.tokens), "size": (given.size, exact.size)}
        values |= {f"d {n}": pair for n, pair in zip(("x", "w_down", "w_up"), zip(given.grads, exact.grads, strict=True))}  # noqa: B905
        for name, (got, want) in values.items():
            if name.startswith("d w"):
                want = want * copies
            else:
                got = got[: self.problem.distinct]
            error = (got.double() - want).abs().max().item()
            out[name] = (error, want.abs().max().item(), torch.finfo(got.dtype).eps)
        return out

    def examine(self, given: Answer, again: Answer | None = None) -> Verdict:
        """Judges an answer to the whole batch; ``again`` is a second one, which must be bitwise the same."""
        distinct, p = self.problem.distinct, self.problem.case.num_prefix_tokens
        copies = self.problem.batch // distinct
        num_b = self.scores.shape[-1]
        findings = []

        match = given.match[:distinct]
        valid = bool(((match >= p) & (match < p + num_b)).all())
        findings.append(Finding("match outside of the destinations", 0.0 if valid else 1.0, 0.0))
        if not valid:
            return Verdict(tuple(findings), 0)
        best = (match - p).unsqueeze(-1)
        below = self.scores.amax(-1, keepdim=True) - self.scores.gather(-1, best)
        flips = int((self.scores.argmax(-1, keepdim=True) != best).sum())
        findings.append(Finding("match", below.max().item(), self.tie))

        rest = self.scores.scatter(-1, best, float("-inf"))
        second = rest.argmax(-1) + p if given.second is None else given.second[:distinct]
        if given.second is not None:
            runner_up = (second - p).clamp(0, num_b - 1).unsqueeze(-1)
            below = rest.amax(-1, keepdim=True) - rest.gather(-1, runner_up)
            findings.append(Finding("second", below.max().item(), self.tie))
            if findings[-1].wrong:
                return Verdict(tuple(findings), flips)

        few = given._replace(match=match, second=second)
        for name, (error, magnitude, ulp) in self._errors(few, self._exact(few), copies).items():
            plain = self.plain_errors[name][0] * (copies if name.startswith("d w") else 1)
            floor = FLOAT64_ERROR if self.problem.x.dtype == torch.float64 else ulp
            findings.append(Finding(name, error, 2 * plain + floor * magnitude))

        if again is not None:
            findings.append(Finding("second run differs", float(not _same(given, again)), 0.0))
            repeated = _per_image(given)
            same = all(torch.equal(t, t[:distinct].repeat(copies, *(1,) * (t.dim() - 1))) for t in repeated)
            findings.append(Finding("an image's result depends on its place in the batch", float(not same), 0.0))
        return Verdict(tuple(findings), flips)


def _per_image(given: Answer) -> tuple[Tensor, ...]:
    return (given.tokens, given.size, given.match, *given.grads[:1])


def _same(one: Answer, other: Answer) -> bool:
    pairs = zip((*_per_image(one), *one.grads[1:]), (*_per_image(other), *other.grads[1:]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def examine(call: Callable[[], tuple], examiner: Examiner, *, twice: bool = True) -> Verdict:
    """Runs ``call`` once or twice on the problem of ``examiner`` and judges it."""
    first = answer(call, examiner.problem, examiner.backward)
    again = answer(call, examiner.problem, examiner.backward) if twice else None
    return examiner.examine(first, again)
