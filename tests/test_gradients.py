"""The hand-written backward against autograd, against finite differences, and for every set of wanted gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fpet_kernels import backends
from fpet_kernels.autograd import BDMMerge
from support import (
    INPUTS,
    LEAVES,
    Problem,
    backward_op_args,
    check,
    decisions,
    errors,
    exact,
    full_problem,
    merge,
    op_args,
    random_problem,
    run,
    soft_match,
    surrogate,
)

SIMILARITY = pytest.mark.parametrize("similarity", ["cosine", "dot"])
WANTED = [names for r in range(1, 7) for names in itertools.combinations(LEAVES, r)]


@SIMILARITY
def test_every_combination_of_wanted_gradients(similarity, backend, device, max_tokens):
    """In float64, against autograd of the reference; what is not wanted gets no gradient at all."""
    problem = full_problem(grid=(4, 5), dtype=torch.float64, similarity=similarity, scale=0.7, device=device)
    want = run(problem, "reference")
    for wanted in WANTED if max_tokens > 100 else WANTED[::9]:
        got = run(problem, backend, wanted)
        assert set(got) == {"tokens", "size", "match", *(f"grad_{n}" for n in wanted)}
        for name, error in errors(got, {n: want[n] for n in got}).items():
            assert error < 1e-12, f"{name} with gradients for {wanted}: {error:.3g}"


def test_unwanted_gradients_stay_none(backend, device):
    for wanted in WANTED[::5]:
        problem = full_problem(device=device)
        leaves = {n: getattr(problem, n).detach().requires_grad_(n in wanted) for n in LEAVES}
        tokens, size, _ = merge(replace(problem, **leaves), backend)
        (tokens.sum() + size.square().sum()).backward()
        assert {n for n in LEAVES if leaves[n].grad is not None} == set(wanted)


def test_only_what_is_wanted_is_computed(fused, device, monkeypatch):
    """The flags that reach the operator are those of the inputs that need a gradient."""
    real, seen = backends.backward_op(fused), []
    monkeypatch.setattr(backends, "backward_op", lambda name: lambda *args: (seen.append(args[-5:]), real(*args))[1])
    for wanted in WANTED:
        run(full_problem(grid=(2, 3), device=device), fused, wanted)
        weights = "w_down" in wanted or "w_up" in wanted
        assert seen.pop() == ("x" in wanted, "size" in wanted, weights, "key_delta" in wanted, "key" in wanted)
    detached = full_problem(grid=(2, 3), detach_key=True, device=device)
    run(detached, fused, LEAVES)
    assert seen.pop() == (True, True, True, True, False)


def test_no_graph_where_none_is_wanted(backend, device):
    problem = full_problem(device=device)
    assert not merge(problem, backend).tokens.requires_grad
    problem.x.requires_grad_()
    merged = merge(problem, backend)
    assert merged.tokens.requires_grad and not merged.match.requires_grad
    with torch.no_grad():
        assert not merge(problem, backend).tokens.requires_grad


def test_a_detached_key_gets_no_gradient(backend, device):
    problem = replace(full_problem(device=device), detach_key=True)
    problem.key.requires_grad_()
    problem.x.requires_grad_()
    merge(problem, backend).tokens.sum().backward()
    assert problem.key.grad is None and problem.x.grad is not None


@pytest.mark.parametrize("output", ["tokens", "size"])
def test_loss_of_one_output(output, backend, device):
    """Only tokens, or only size, in the loss: the other's upstream gradient is absent."""
    problem = full_problem(dtype=torch.float64, device=device)
    problem = replace(problem, **{"grad_size" if output == "tokens" else "grad_tokens": None})
    got, want = run(problem, backend), exact(problem, *decisions(problem, backend))
    for name, error in errors(got, want).items():
        assert error < 1e-12, f"{name}: {error:.3g}"


@SIMILARITY
@pytest.mark.parametrize("heads", [0, 1, 5])
@pytest.mark.parametrize("mask", [False, True])
def test_float64_against_the_exact_solution(similarity, heads, mask, backend, device):
    for seed, scale in enumerate((1.0, -0.3, 0.0)):
        problem = full_problem(
            grid=(5, 6),
            dtype=torch.float64,
            similarity=similarity,
            heads=heads,
            mask=mask,
            scale=scale,
            seed=seed,
            device=device,
        )
        check(problem, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_keys(dtype, backend, device):
    """Where k' is zero its norm is clamped to 1e-12, and so is the gradient's denominator."""
    problem = random_problem((4, 5), dtype=dtype, delta=True, device=device)
    problem.key[:, 3] = 0
    problem.key_delta[:, 3] = 0
    got, want = run(problem, backend), exact(problem, *decisions(problem, backend))
    scale = want["grad_key_delta"].abs().amax(-1, keepdim=True)
    assert float(scale.max()) > 1e9, "the clamp was not met"
    error = (got["grad_key_delta"].double() - want["grad_key_delta"]).abs()
    assert (error <= 1e3 * torch.finfo(dtype).eps * scale).all()


class Surrogate(torch.autograd.Function):
    """The smooth function whose derivative is the straight-through gradient: hard held fixed, soft free to move.

    Its forward is the surrogate and its backward the operator's, so that gradcheck compares the operator's gradients with
    finite differences of equations 9 to 13.
    """

    @staticmethod
    def forward(
        ctx, problem: Problem, backend: str, names: tuple[str, ...], best: Tensor, second: Tensor, soft: Tensor, *leaves: Tensor
    ):
        ctx.save_for_backward(*leaves)
        ctx.problem, ctx.backend, ctx.names = problem, backend, names
        return surrogate(replace(problem, **dict(zip(names, leaves, strict=True))), best, second, soft)

    @staticmethod
    def backward(ctx, grad_tokens: Tensor, grad_size: Tensor):
        values = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        problem = replace(ctx.problem, **values, grad_tokens=grad_tokens, grad_size=grad_size)
        with torch.enable_grad():
            found = run(problem, ctx.backend, ctx.names)
        return (*(None,) * 6, *(found[f"grad_{n}"] for n in ctx.names))


@SIMILARITY
def test_gradcheck_of_the_surrogate(similarity, backend, device, max_tokens):
    problem = full_problem(
        grid=(2, 3), batch=1, dim=2, channels=3, hidden=2, dtype=torch.float64, similarity=similarity, scale=0.6, device=device
    )
    best, second = decisions(problem, backend)
    soft = soft_match(problem, best, second)
    leaves = [getattr(problem, n).detach().requires_grad_() for n in LEAVES]
    fast = {"fast_mode": True} if max_tokens < 100 else {}
    assert torch.autograd.gradcheck(
        lambda *t: Surrogate.apply(problem, backend, LEAVES, best, second, soft, *t),
        leaves,
        eps=1e-6,
        atol=1e-7,
        rtol=1e-6,
        **fast,
    )


@pytest.mark.parametrize("wanted", [("x",), ("w_down",), ("size",), ("key_delta",), ("key",)])
def test_double_backward_raises(wanted, fused, device):
    """Whether the upstream gradient carries a graph or is a constant: never a second derivative that is silently zero."""
    for nonlinear in (True, False):
        problem = full_problem(device=device)
        leaf = getattr(problem, wanted[0]).requires_grad_()
        tokens, size, _ = merge(problem, fused)
        loss = tokens.square().sum() + size.square().sum() if nonlinear else tokens.sum() + size.sum()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"twice|[Dd]ouble backward"):
            (grad.square().sum() + leaf.sum()).backward()


def test_gradient_accumulates_into_an_attached_key_with_heads(backend, device):
    """The gradient of a head-averaged key is the same for every head, and a real tensor to add to."""
    problem = full_problem(dtype=torch.float64, device=device)
    problem.key.requires_grad_()
    for _ in range(2):
        (merge(problem, backend).tokens * problem.grad_tokens).sum().backward()
    once = run(replace(problem, key=problem.key.detach(), grad_size=None), backend, ("key",))["grad_key"]
    torch.testing.assert_close(problem.key.grad, 2 * once, rtol=1e-12, atol=1e-14)
    problem.key.grad.zero_()[:, 0] += 1
    assert problem.key.grad.sum() == problem.key[:, 0].numel()


def test_operator_leaves_out_what_is_not_needed(fused, device):
    """torch.ops.fpet.bdm_backward: an unneeded gradient is an empty tensor, a needed one does not depend on the others."""
    problem = full_problem(dtype=torch.float64, device=device)
    forward = backends.forward_op(fused)(*op_args(problem))
    everything = backends.backward_op(fused)(*backward_op_args(problem, forward))
    for needs in itertools.product((False, True), repeat=5):
        got = backends.backward_op(fused)(*backward_op_args(problem, forward, needs))
        wanted = (needs[0], needs[1], needs[2], needs[2], needs[3], needs[4])
        for name, found, full, want in zip(
            ("x", "size", "w_down", "w_up", "refined", "key"), got, everything, wanted, strict=True
        ):
            assert found.shape == (full.shape if want else (0,)), name
            assert found.dtype == full.dtype, name
            assert not want or torch.equal(found, full), name


def test_gradient_reaches_one_weight_alone(fused, device):
    """A frozen W_down beside a trained W_up, and the other way round."""
    problem = full_problem(dtype=torch.float64, device=device)
    both = run(problem, fused)
    for name in ("w_down", "w_up"):
        assert torch.equal(run(problem, fused, (name,))[f"grad_{name}"], both[f"grad_{name}"])


# For each gradient, what its formula reads of the inputs and of the merged tokens (docs/mathematics.md).
EVERYTHING = {*INPUTS, "tokens"}
READS = {"x": {"size"}, "size": {"x", "size", "tokens"}} | dict.fromkeys(("w_down", "w_up", "key_delta", "key"), EVERYTHING)


def forward_to_edit(
    problem: Problem, wanted: tuple[str, ...], backend: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs and outputs that are no leaves, so that they may be edited in place; the leaves; the loss of both outputs."""
    leaves = {n: getattr(problem, n).detach().requires_grad_() for n in wanted}
    given = {n: leaves[n].clone() if n in leaves else getattr(problem, n).clone() for n in INPUTS}
    tokens, size, _ = merge(replace(problem, **given), backend)
    loss = (tokens.clone() * problem.grad_tokens).sum() + (size.clone() * problem.grad_size).sum()
    return {**given, "tokens": tokens}, leaves, loss


@pytest.mark.parametrize("heads", [0, 2])
def test_only_what_the_backward_reads_is_kept(heads, fused, device, max_tokens):
    """For every set of wanted gradients: the bytes kept, and in-place edits of what is not read pass and change nothing."""
    for wanted in WANTED if max_tokens > 100 else WANTED[::9]:
        problem = full_problem(grid=(4, 5), dtype=torch.float64, heads=heads, device=device)
        want = run(problem, fused, wanted)
        read = set().union(*(READS[n] for n in wanted))
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.__setitem__(t.untyped_storage().data_ptr(), t.shape), t)[1], lambda t: t
        ):
            values, leaves, loss = forward_to_edit(problem, wanted, fused)
        for name, value in values.items():
            if name not in read:
                assert value.untyped_storage().data_ptr() not in kept, f"{name} is kept for the gradients of {wanted}"
                value.detach().fill_(float("nan"))  # not seen by autograd's check: a value that is read would be poison
                value.mul_(2)
        for leaf, grad in zip(wanted, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            assert torch.equal(grad, want[f"grad_{leaf}"]), f"{leaf} among {wanted}"


@pytest.mark.parametrize("edited", ["x", "size", "key", "w_up", "dropout_mask", "tokens"])
def test_what_the_backward_reads_may_not_be_changed(edited, fused, device):
    """It is caught, not computed with."""
    values, leaves, loss = forward_to_edit(full_problem(device=device, heads=0), ("size", "key"), fused)
    values[edited].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, list(leaves.values()))


def test_indices_and_scores_are_not_differentiable(fused, device):
    problem = full_problem(device=device)
    outputs = BDMMerge.apply(None, *op_args(replace(problem, x=problem.x.requires_grad_())), fused)
    assert [o.requires_grad for o in outputs] == [True, True, False, False, False]
