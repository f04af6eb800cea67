"""Problems to merge, an independent float64 solution of them, and the rules by which a backend's answer is judged.

Two rules. A *decision* may differ from the exact one only where the two scores tie within rounding. A *value* is compared with
the exact value under the decisions that the backend took; its error may be at most twice the error that plain PyTorch
(fpet_kernels/reference.py) makes on the same input, plus one rounding to the output's dtype, plus a bound from a first-order
rounding analysis, which matters where plain PyTorch happens to hit the exact value.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpet_kernels import KeyRefinement, Merged, Split, backends, bdm_merge, checkerboard, ops
from fpet_kernels.reference import bdm_merge_reference, compute_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INPUTS = ("x", "key", "size", "w_down", "w_up", "dropout_mask", "key_delta")
LEAVES = ("x", "size", "w_down", "w_up", "key_delta", "key")  # what a gradient can be asked for
# How many times the first-order rounding bound is let pass: about three times what 10,000 random problems needed. The deeper a
# gradient lies, the less, because the worst cases of all factors in its bound never meet.
ROUNDINGS = {
    "scores": 4.0, "tokens": 3.0, "size": 2.0, "grad_x": 3.0, "grad_size": 3.0,
    "grad_key_delta": 0.5, "grad_key": 0.5, "grad_w_up": 0.02, "grad_w_down": 0.02,
}  # fmt: skip


@dataclass
class Problem:
    """The arguments of one call of bdm_merge, and the gradients that come back from above."""

    x: Tensor
    key: Tensor
    split: Split
    grid_size: tuple[int, int] | None = None
    num_prefix_tokens: int = 1
    size: Tensor | None = None
    w_down: Tensor | None = None
    w_up: Tensor | None = None
    dropout_mask: Tensor | None = None
    key_delta: Tensor | None = None
    scale: float = 1.0
    similarity: str = "cosine"
    detach_key: bool = True
    grad_tokens: Tensor | None = None
    grad_size: Tensor | None = None
    note: str = field(default="", compare=False)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Everything that a gradient can reach."""
        return tuple(n for n in LEAVES if getattr(self, n) is not None and not (n == "key" and self.detach_key))

    def map(self, f: Any) -> Problem:
        """The same problem with ``f`` applied to every tensor."""
        names = (*INPUTS, "grad_tokens", "grad_size")
        return replace(self, **{n: f(getattr(self, n)) for n in names if getattr(self, n) is not None})

    def double(self) -> Problem:
        return self.map(lambda t: t.double())

    def to(self, dtype: torch.dtype) -> Problem:
        """All inputs in ``dtype``; the upstream gradient of size stays in size's dtype."""
        moved = self.map(lambda t: t.to(dtype))
        return replace(moved, grad_size=self.grad_size.to(size_dtype(dtype)) if self.grad_size is not None else None)

    def on(self, device: str) -> Problem:
        """On ``device`` with the strides kept."""
        if device == "cpu":
            return self

        def move(t: Tensor) -> Tensor:
            storage = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device=device)
            storage.copy_(t.as_strided(storage.shape, (1,), 0))
            return storage.as_strided(t.shape, t.stride(), t.storage_offset())

        return self.map(move)

    def __repr__(self) -> str:
        def show(t: Tensor) -> str:
            return f"{str(t.dtype)[6:]}{tuple(t.shape)} strides {t.stride()}"

        tensors = ", ".join(f"{n} {show(t)}" for n in (*INPUTS, "grad_tokens") if (t := getattr(self, n)) is not None)
        return (
            f"Problem({self.note} {self.split}, prefix {self.num_prefix_tokens}, {self.similarity}, scale {self.scale}, "
            f"detach_key {self.detach_key}: {tensors})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every element


def sweep(*values: Any, id: str | None = None) -> Any:
    """A case that ``make test`` leaves to ``make test-all``, because others check the same kind of thing."""
    return pytest.param(*values, marks=pytest.mark.sweep, id=id)


def size_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_problem(
    grid: tuple[int, int] = (4, 5),
    *,
    batch: int = 2,
    dim: int = 12,
    channels: int = 8,
    prefix: int = 1,
    hidden: int = 0,
    heads: int = 0,
    size: bool = False,
    mask: bool = False,
    delta: bool = False,
    split: Split | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Normal tokens and keys, whose scores are well apart; everything optional on request."""
    g = torch.Generator().manual_seed(seed)
    grid_size = grid if split is None else None
    split = split or checkerboard(*grid)
    n, merged = prefix + split.num_tokens, prefix + split.b.numel()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    return Problem(
        x=normal(batch, n, dim),
        key=normal(batch, heads, n, channels) if heads else normal(batch, n, channels),
        split=split,
        grid_size=grid_size,
        num_prefix_tokens=prefix,
        size=torch.randint(1, 6, (batch, n, 1), generator=g).to(device, dtype) if size else None,
        w_down=normal(hidden, channels) / channels**0.5 if hidden else None,
        w_up=normal(channels, hidden) / hidden**0.5 if hidden else None,
        dropout_mask=(torch.rand(batch, n, hidden, generator=g) > 0.2).to(device, dtype) / 0.8 if hidden and mask else None,
        key_delta=normal(batch, n, channels) / 2 if delta else None,
        grad_tokens=normal(batch, merged, dim),
        grad_size=normal(batch, merged, 1).to(size_dtype(dtype)),
        **options,
    )


def full_problem(**options: Any) -> Problem:
    """Every optional input given, every gradient possible."""
    return random_problem(**{**dict(hidden=6, heads=2, size=True, mask=True, delta=True, detach_key=False), **options})


def merge(problem: Problem, backend: str | None) -> Merged:
    p = problem
    refinement = None if p.w_down is None else KeyRefinement(p.w_down, p.w_up, p.scale, p.dropout_mask)
    where = {"split": p.split} if p.grid_size is None else {"grid_size": p.grid_size}
    return bdm_merge(
        p.x, p.key, **where, num_prefix_tokens=p.num_prefix_tokens, size=p.size, refinement=refinement, key_delta=p.key_delta,
        similarity=p.similarity, detach_key=p.detach_key, backend=backend,
    )  # fmt: skip


def _with_leaves(problem: Problem, wanted: tuple[str, ...]) -> tuple[Problem, list[Tensor]]:
    leaves = {n: getattr(problem, n).detach().requires_grad_() for n in wanted}
    return replace(problem, **leaves), list(leaves.values())


def _backward(
    problem: Problem, tokens: Tensor, size: Tensor, wanted: tuple[str, ...], leaves: list[Tensor]
) -> dict[str, Tensor]:
    pairs = [(tokens, problem.grad_tokens), (size, problem.grad_size)]
    pairs = [(out, grad) for out, grad in pairs if grad is not None and out.requires_grad]
    if not wanted or not pairs:
        return {}
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    zeros = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return {f"grad_{name}": grad for name, grad in zip(wanted, zeros, strict=True)}


def run(
    problem: Problem, backend: str | None, wanted: tuple[str, ...] | None = None, around_forward: Any = nullcontext
) -> dict[str, Tensor]:
    """Forward and backward through the public function: tokens, size, match and a grad_NAME for every wanted input."""
    wanted = problem.leaves if wanted is None else wanted
    problem, leaves = _with_leaves(problem, wanted)
    with around_forward():
        tokens, size, match = merge(problem, backend)
    grads = _backward(problem, tokens, size, wanted, leaves)
    return {"tokens": tokens.detach(), "size": size.detach(), "match": match, **grads}


def op_args(problem: Problem) -> tuple[Any, ...]:
    """The arguments of torch.ops.fpet.bdm_forward, split lists instead of the grid where no grid is given."""
    p = problem
    a, b = (None, None) if p.grid_size else p.split.on(p.x.device)
    return (
        *(getattr(p, n) for n in INPUTS),
        a,
        b,
        *(p.grid_size or (0, 0)),
        p.num_prefix_tokens,
        p.scale,
        p.similarity == "cosine",
    )


def backward_op_args(problem: Problem, forward: tuple[Tensor, ...], needs: tuple[bool, ...] = (True,) * 5) -> tuple[Any, ...]:
    """The arguments of torch.ops.fpet.bdm_backward; needs: x, size, weights, refined, key."""
    args = op_args(problem)
    return (problem.grad_tokens, problem.grad_size, *args[:7], *forward, *args[7:], *needs)


def reference_op(problem: Problem) -> tuple[Tensor, ...]:
    """tokens, size, match, second, mid of the reference on this very problem."""
    p = problem
    return bdm_merge_reference(
        p.x, p.key, split=p.split, num_prefix_tokens=p.num_prefix_tokens, size=p.size, w_down=p.w_down, w_up=p.w_up,
        scale=p.scale, dropout_mask=p.dropout_mask, key_delta=p.key_delta, similarity=p.similarity, detach_key=p.detach_key,
    )  # fmt: skip


def decisions(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(B, N_A) best and second best destination, as ``backend`` ranks them."""
    with torch.no_grad():
        outputs = reference_op(problem) if backend == "reference" else backends.forward_op(backend)(*op_args(problem))
    return outputs[2], outputs[3]


# --- the exact solution ----------------------------------------------------------------------------------------------


def refined_key(problem: Problem) -> Tensor:
    p = problem
    key = p.key.mean(1) if p.key.dim() == 4 else p.key
    refined = key
    if p.w_down is not None:
        hidden = torch.einsum("bnc,hc->bnh", key, p.w_down).clamp_min(0)
        hidden = hidden if p.dropout_mask is None else hidden * p.dropout_mask
        refined = refined + p.scale * torch.einsum("bnh,ch->bnc", hidden, p.w_up)
    return refined if p.key_delta is None else refined + p.key_delta


def scores(problem: Problem) -> Tensor:
    """(B, N_A, N_B) exact similarities, in the problem's precision."""
    k = refined_key(problem)
    if problem.similarity == "cosine":
        k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    a, b = (index + problem.num_prefix_tokens for index in problem.split.on(k.device))
    return torch.einsum("bic,bjc->bij", k[:, a], k[:, b])


def soft_match(problem: Problem, best: Tensor, second: Tensor) -> Tensor:
    """(B, N_A, N_B) σ(s − m) with the two largest scores taken from the given places."""
    s = scores(problem)
    first, runner_up = ((i - problem.num_prefix_tokens)[..., None] for i in (best, second))
    return torch.sigmoid(s - (s.gather(-1, first) + s.gather(-1, runner_up)) / 2)


def surrogate(problem: Problem, best: Tensor, second: Tensor, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tokens and size of equations 10 to 14 with the decisions given; differentiable, straight-through.

    With ``soft``, the soft match of the point at which the derivative is taken, it is an ordinary smooth function whose
    derivative at that point is the straight-through gradient; without, autograd's stop-gradient plays that part.
    """
    p, prefix = problem, problem.num_prefix_tokens
    now = soft_match(p, best, second)
    hard = F.one_hot(best - prefix, p.split.b.numel()).to(now.dtype)
    matching = hard + now - (now.detach() if soft is None else soft)
    a, b = (index + prefix for index in p.split.on(p.x.device))
    kept = torch.cat((torch.arange(prefix, device=b.device), b))
    size = torch.ones_like(p.x[..., :1]) if p.size is None else p.size

    def gather(t: Tensor) -> Tensor:
        return t[:, kept] + F.pad(torch.einsum("bij,bic->bjc", matching, t[:, a]), (0, 0, prefix, 0))

    merged_size = gather(size)
    return gather(size * p.x) / merged_size, merged_size


def exact(problem: Problem, best: Tensor, second: Tensor, wanted: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """tokens, size and gradients in float64 with the decisions given."""
    wanted = problem.leaves if wanted is None else wanted
    problem, leaves = _with_leaves(problem.double(), wanted)
    if problem.detach_key:
        problem = replace(problem, key=problem.key.detach())
    tokens, size = surrogate(problem, best, second)
    return {"tokens": tokens.detach(), "size": size.detach(), **_backward(problem, tokens, size, wanted, leaves)}


@torch.no_grad()
def rounding(problem: Problem, best: Tensor, second: Tensor) -> dict[str, Tensor]:
    """First-order bound of the error of every output, in units of the compute precision's epsilon.

    The formulas of the hand-written backward (docs/mathematics.md) with every term replaced by its magnitude, so that no
    cancellation hides what rounding may leave behind. "scores" bounds the similarities themselves.
    """
    p, prefix = problem.double(), problem.num_prefix_tokens
    a, b = (index + prefix for index in p.split.on(p.x.device))
    heads = p.key.shape[1] if p.key.dim() == 4 else 1
    key = p.key.abs().mean(1) if p.key.dim() == 4 else p.key.abs()
    size = torch.ones_like(p.x[..., :1]) if p.size is None else p.size.abs()

    # k', its norm and its unit vector
    k = key if p.key_delta is None else key + p.key_delta.abs()
    hidden = open_units = None
    if p.w_down is not None and p.w_up is not None:
        mean_key = p.key.mean(1) if p.key.dim() == 4 else p.key
        open_units = (mean_key @ p.w_down.mT > 0).double()
        open_units = open_units if p.dropout_mask is None else open_units * p.dropout_mask.abs()
        hidden = (key @ p.w_down.abs().mT) * open_units
        k = k + abs(p.scale) * hidden @ p.w_up.abs().mT
    exact_k = refined_key(p)
    norm = exact_k.norm(dim=-1, keepdim=True).clamp_min(1e-12) if p.similarity == "cosine" else torch.ones_like(k[..., :1])
    amplified = k.norm(dim=-1, keepdim=True) / norm if p.similarity == "cosine" else torch.zeros_like(norm)
    unit = exact_k.abs() / norm
    unit_error = k / norm + unit * amplified

    # scores, soft match, and the gradient down to k'
    score_error = unit_error[:, a] @ unit[:, b].mT + unit[:, a] @ unit_error[:, b].mT + unit[:, a] @ unit[:, b].mT
    first, runner_up = ((i - prefix)[..., None] for i in (best, second))
    row_error = score_error + (score_error.gather(-1, first) + score_error.gather(-1, runner_up)) / 2
    tokens, merged_size = surrogate(p, best, second)
    sums = surrogate(replace(p, x=p.x.abs(), size=size), best, second)[0]
    soft = soft_match(p, best, second)
    g = torch.zeros_like(tokens) if p.grad_tokens is None else p.grad_tokens.abs() / merged_size.abs()
    # The backward reads y as the forward stored it, rounded to x's dtype.
    stored = 1 + torch.finfo(problem.x.dtype).eps / (2 * sum_epsilon(problem))
    gamma = (0 if p.grad_size is None else p.grad_size.abs()) + stored * (g * sums).sum(-1, keepdim=True)
    d_matching = (size * p.x.abs())[:, a] @ g[:, prefix:].mT + size[:, a] @ gamma[:, prefix:].mT
    underflow = torch.finfo(size_dtype(problem.x.dtype)).tiny / sum_epsilon(problem)
    ds = d_matching * (soft * ((1 - soft) * (1 + row_error) + 1) + underflow)  # 1 − p has lost the digits that p rounded off
    half = ds.sum(-1, keepdim=True) / 2
    ds = ds.scatter_add(-1, first, half).scatter_add(-1, runner_up, half)
    d_unit = torch.zeros_like(k)
    d_unit[:, a] = ds @ (unit + unit_error)[:, b]
    d_unit[:, b] = ds.mT @ (unit + unit_error)[:, a]
    dk = d_unit
    if p.similarity == "cosine":
        dk = (d_unit + unit * (unit * d_unit).sum(-1, keepdim=True)) / norm * (1 + amplified)

    origin = torch.empty(best.shape[0], p.x.shape[1], dtype=torch.int64, device=best.device)
    origin[:, :prefix] = torch.arange(prefix, device=best.device)
    origin[:, b] = torch.arange(prefix, prefix + b.numel(), device=best.device)
    origin[:, a] = best
    g_in = g.gather(1, origin[..., None].expand_as(p.x))
    bound = {
        "scores": score_error,
        "tokens": sums,
        "size": merged_size.abs(),
        "grad_x": size * g_in,
        "grad_size": gamma.gather(1, origin[..., None]) + (p.x.abs() * g_in).sum(-1, keepdim=True),
        "grad_key_delta": dk,
    }
    d_key = dk
    if hidden is not None:
        d_hidden = abs(p.scale) * dk @ p.w_up.abs() * open_units
        bound["grad_w_up"] = abs(p.scale) * torch.einsum("bnc,bnh->ch", dk, hidden)
        bound["grad_w_down"] = torch.einsum("bnh,bnc->hc", d_hidden, key)
        d_key = dk + d_hidden @ p.w_down.abs()
    bound["grad_key"] = (d_key / heads)[:, None].expand_as(p.key) if p.key.dim() == 4 else d_key
    return bound


# --- the rules -------------------------------------------------------------------------------------------------------


def score_epsilon(problem: Problem) -> float:
    p = problem
    return torch.finfo(compute_dtype(p.x, p.key, p.size, p.w_down, p.w_up, p.key_delta)).eps


def sum_epsilon(problem: Problem) -> float:
    """Tokens are summed in float64 only if they are float64 themselves; a float64 key obliges the scores alone."""
    return torch.finfo(size_dtype(problem.x.dtype)).eps


def assert_near_ties_only(problem: Problem, best: Tensor, second: Tensor) -> None:
    """Every decision is the exact one, or differs from it by a score that rounding can't tell apart."""
    p = problem.double()
    assert best.shape == second.shape == (p.x.shape[0], p.split.a.numel())
    first, runner_up = ((i - p.num_prefix_tokens)[..., None] for i in (best, second))
    for name, index in (("match", first), ("second", runner_up)):
        assert ((index >= 0) & (index < p.split.b.numel())).all(), f"{name}: out of range in {problem}"
    assert (first != runner_up).all(), f"second best is the best itself in {problem}"
    s = scores(p)
    slack = ROUNDINGS["scores"] * score_epsilon(problem) * rounding(problem, best, second)["scores"].amax(-1)
    for name, index, rivals in (("match", first, s), ("second", runner_up, s.scatter(-1, first, float("-inf")))):
        lost = rivals.amax(-1) - rivals.gather(-1, index)[..., 0]
        assert (lost <= slack).all(), f"{name}: a score smaller by {(lost - slack).max():.3g} was taken in {problem}"


def assert_close(
    problem: Problem, got: dict[str, Tensor], want: dict[str, Tensor], plain: dict[str, float], bound: dict[str, Tensor]
) -> None:
    """Errors of ``got`` against ``want`` (float64), judged by the second rule of this file."""
    eps = sum_epsilon(problem)
    for name, truth in want.items():
        out = got[name]
        assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(truth.shape)} in {problem}"
        info = torch.finfo(out.dtype)
        allowed = 2 * plain[name] + info.eps / 2 * truth.abs() + info.tiny * info.eps / 2 + ROUNDINGS[name] * eps * bound[name]
        overflows = truth.abs() + allowed >= info.max
        error = (out.double() - truth).abs()
        wrong = ~((error <= allowed) | (overflows & (out.double().abs() >= info.max)))
        if wrong.any():
            worst = torch.where(wrong, error, 0).argmax()
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong; got {out.flatten()[worst]:.9g}, expected "
                f"{truth.flatten()[worst]:.9g} at {[int(i) for i in torch.unravel_index(worst, truth.shape)]}, "
                f"allowed error {allowed.flatten()[worst]:.3g} in {problem}"
            )


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of each output; an output that overflowed on both sides counts as exact."""
    found = {}
    for name, truth in want.items():
        error = (got[name].double() - truth).abs()
        error = error[error.isfinite()]
        found[name] = float(error.max()) if error.numel() else 0.0
    return found


def yardstick(problem: Problem, backend: str) -> dict[str, float]:
    """Plain PyTorch's error of every output. The reference itself gets no allowance: the rounding bound alone judges it."""
    found = errors(run(problem, "reference"), exact(problem, *decisions(problem, "reference")))
    return dict.fromkeys(found, 0.0) if backend == "reference" else found


def expected_dtypes(problem: Problem) -> dict[str, torch.dtype]:
    p = problem
    grads = {f"grad_{n}": getattr(p, n).dtype for n in LEAVES if getattr(p, n) is not None}
    return {"tokens": p.x.dtype, "size": size_dtype(p.x.dtype), "match": torch.int64, **grads}


def check(problem: Problem, backend: str) -> None:
    """Runs forward and backward on ``backend`` and judges decisions, values, gradients, shapes and dtypes."""
    got = run(problem, backend)
    best, second = decisions(problem, backend)
    assert torch.equal(got["match"], best), f"bdm_merge and its operator disagree on match in {problem}"
    for name, dtype in expected_dtypes(problem).items():
        assert name not in got or got[name].dtype == dtype, f"{name}: {got[name].dtype}, expected {dtype} in {problem}"
    assert_near_ties_only(problem, best, second)
    want = exact(problem, best, second)
    assert_close(problem, got, want, yardstick(problem, backend), rounding(problem, best, second))


# --- the CUDA kernels, emulated on the CPU --------------------------------------------------------------------------------


def emulate_cuda(library: str) -> None:
    """Lets backend "cuda" take CPU tensors, on kernels compiled for the host: ``library`` is CMake's fpet_cuda_emulated_ops.

    For the rest of the process, and with forward and backward only: unmerging stays what it is on the CPU.
    """
    emulated = torch.library.Library("fpet_emulated", "DEF")
    for name, schema in ops.SCHEMAS.items():
        emulated.define(name + schema)
    torch.ops.load_library(library)
    honest = backends.refuses
    _EMULATED.append(emulated)
    backends._OPS["cuda"] = (torch.ops.fpet_emulated.bdm_forward.default, torch.ops.fpet_emulated.bdm_backward.default)
    backends.refuses = lambda name, x: None if name == "cuda" and x.device.type == "cpu" else honest(name, x)


_EMULATED: list[torch.library.Library] = []  # what is dropped is unregistered
