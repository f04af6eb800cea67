"""torch.func and friends: reverse mode is exact in every form, forward mode and second derivatives are errors, nothing is a silent zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from fpet_kernels import KeyRefinement, Split, bdm_merge, bdm_unmerge, checkerboard
from support import LEAVES, Problem, full_problem, merge, run

ALL = tuple(range(len(LEAVES)))
REFUSED = (NotImplementedError, RuntimeError)


def small(device: str, **options) -> Problem:
    sizes = dict(grid=(2, 3), batch=3, dim=4, channels=3, heads=2, hidden=2, dtype=torch.float64, device=device, scale=0.7)
    return full_problem(**{**sizes, **options})


def values(problem: Problem) -> list[Tensor]:
    return [getattr(problem, n) for n in LEAVES]


def objective(problem: Problem, backend: str | None) -> Callable[..., Tensor]:
    """The loss as a function of everything that a gradient can reach."""

    def loss(*leaves: Tensor) -> Tensor:
        tokens, size, match = merge(replace(problem, **dict(zip(LEAVES, leaves, strict=True))), backend)
        where = {"split": problem.split} if problem.grid_size is None else {"grid_size": problem.grid_size}
        dense = bdm_unmerge(tokens, match, **where, backend="reference" if backend == "reference" else None)
        return (tokens * problem.grad_tokens).sum() + (size * problem.grad_size).sum() + dense.square().sum()

    return loss


def plain(f: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(f(*leaves), leaves))


def close(got, want) -> None:
    for name, g, w in zip(LEAVES, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def compiled(f: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True)


# Per sample: each image by itself, in a batch of one, with weights of its own gradient.
WEIGHTS = ("w_down", "w_up")
PER_IMAGE = tuple(None if n in WEIGHTS else 0 for n in LEAVES)


def of_one_image(problem: Problem, backend: str | None) -> Callable[..., Tensor]:
    def loss(grad_tokens: Tensor, grad_size: Tensor, mask: Tensor, *leaves: Tensor) -> Tensor:
        one = replace(problem, grad_tokens=grad_tokens[None], grad_size=grad_size[None], dropout_mask=mask[None])
        return objective(one, backend)(*(v if n in WEIGHTS else v[None] for n, v in zip(LEAVES, leaves, strict=True)))

    return loss


def constants(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.grad_tokens, problem.grad_size, problem.dropout_mask


def each(problem: Problem, backend: str | None) -> list[Tensor]:
    """Gradients of every image by itself, by a loop."""
    f, rows = of_one_image(problem, backend), []
    for j in range(problem.x.shape[0]):
        leaves = [v if n in WEIGHTS else v[j] for n, v in zip(LEAVES, values(problem), strict=True)]
        rows.append(plain(lambda *v, j=j: f(*(c[j] for c in constants(problem)), *v), leaves))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("listed", [False, True], ids=["grid", "lists"])
def test_reverse_mode(listed, backend, device):
    """grad, grad_and_value, vjp and jacrev over every input at once."""
    problem = small(device)
    problem = replace(problem, grid_size=None, split=Split(6, problem.split.a, problem.split.b)) if listed else problem
    f, leaves = objective(problem, backend), values(problem)
    want = plain(f, leaves)
    close(grad(f, argnums=ALL)(*leaves), want)
    close(grad_and_value(f, argnums=ALL)(*leaves)[0], want)
    out, pull = vjp(f, *leaves)
    close(pull(torch.ones_like(out)), want)
    close(jacrev(f, argnums=ALL)(*leaves), want)


def test_jacobian_of_the_tokens(backend, device):
    """jacrev maps the backward over a basis: every row is the gradient of one element."""
    problem = small(device, batch=1)
    f = lambda *leaves: merge(replace(problem, **dict(zip(LEAVES, leaves, strict=True))), backend).tokens[0, 2:4, :2].flatten()  # noqa: E731
    rows = [plain(lambda *v, k=k: f(*v)[k], values(problem)) for k in range(4)]
    close(jacrev(f, argnums=ALL)(*values(problem)), [torch.stack(column) for column in zip(*rows, strict=True)])


def test_per_sample_gradients(backend, device):
    problem = small(device)
    per_sample = vmap(grad(of_one_image(problem, backend), argnums=tuple(a + 3 for a in ALL)), in_dims=(0, 0, 0, *PER_IMAGE))
    close(per_sample(*constants(problem), *values(problem)), each(problem, backend))


def test_gradient_through_vmap(backend, device):
    """grad outside, vmap inside; and the same with ordinary autograd outside: weights sum over the images."""
    problem = small(device)
    mapped = vmap(of_one_image(problem, backend), in_dims=(0, 0, 0, *PER_IMAGE))
    total = lambda *leaves: mapped(*constants(problem), *leaves).sum()  # noqa: E731
    want = [g.sum(0) if n in WEIGHTS else g for n, g in zip(LEAVES, each(problem, backend), strict=True)]
    close(grad(total, argnums=ALL)(*values(problem)), want)
    close(plain(total, values(problem)), want)


def test_ensemble(backend, device):
    """Weights of their own for each element, tokens shared: as torch.func.stack_module_state makes them."""
    problem = small(device)
    stack = [torch.stack((getattr(problem, n), 2 * getattr(problem, n))) for n in WEIGHTS]

    def loss(w_down: Tensor, w_up: Tensor) -> Tensor:
        return objective(problem, backend)(*values(replace(problem, w_down=w_down, w_up=w_up)))

    got = vmap(grad(loss, argnums=(0, 1)))(*stack)
    for j in range(2):
        for g, w in zip(got, plain(loss, [s[j] for s in stack]), strict=True):
            torch.testing.assert_close(g[j], w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("out", ["tokens", "size", "match"])
@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, -1)])
def test_vmap(dims, out, backend, device):
    """Without a gradient: any mapped dimension of x and key is folded into the batch."""
    x, key = torch.randn(2, 3, 7, 4, device=device), torch.randn(2, 3, 7, 5, device=device)  # (images, maps, N, channels)
    call = lambda x, key: getattr(bdm_merge(x, key, grid_size=(2, 3), backend=backend), out)  # noqa: E731
    inputs = [
        t[0] if d is None else t.movedim(1, d) if d >= 0 else t.movedim(1, -1) for t, d in zip((x, key), dims, strict=True)
    ]
    inputs = [t[:2] if d is None else t for t, d in zip(inputs, dims, strict=True)]
    got = vmap(call, in_dims=dims)(*inputs)
    for j in range(3):
        one = [t if d is None else t.select(d, j) for t, d in zip(inputs, dims, strict=True)]
        assert torch.equal(got[j], call(*one))


def test_compiled_transforms(backend, device, max_tokens):
    """torch.compile of grad and of vmap(grad), in one graph."""
    if max_tokens < 100:
        pytest.skip("an interpreted kernel can't be compiled")
    problem = small(device)
    f, leaves = objective(problem, backend), values(problem)
    close(compiled(lambda *v: grad(f, argnums=ALL)(*v))(*leaves), plain(f, leaves))
    per_sample = vmap(grad(of_one_image(problem, backend), argnums=tuple(a + 3 for a in ALL)), in_dims=(0, 0, 0, *PER_IMAGE))
    close(compiled(lambda *v: per_sample(*v))(*constants(problem), *leaves), each(problem, backend))


def test_a_detached_key_stays_detached(backend, device):
    """Under transforms too: zero, as for any function that does not depend on it."""
    problem = small(device, detach_key=True)
    f, leaves = objective(problem, backend), values(problem)
    got = grad(f, argnums=ALL)(*leaves)
    assert not got[LEAVES.index("key")].any()
    want = run(problem, "reference", ("w_down",))["grad_w_down"]
    without = grad(lambda w: f(*(w if n == "w_down" else v for n, v in zip(LEAVES, leaves, strict=True))))(problem.w_down)
    assert without.shape == want.shape and bool(without.any())
    torch.testing.assert_close(without, got[LEAVES.index("w_down")], rtol=1e-12, atol=1e-13)


SECOND = {
    "hessian": lambda f, x: hessian(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "linearize": lambda f, x: linearize(f, x),
    "grad of grad": lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(f))(x),
    "jvp of grad": lambda f, x: jvp(grad(f), (x,), (x,)),
    "grad of vmap of grad": lambda f, x: grad(lambda x: vmap(grad(f))(torch.stack((x, x))).square().sum())(x),
}


@pytest.mark.parametrize("name", ["x", "size", "w_up", "key_delta", "key"])
@pytest.mark.parametrize("form", SECOND)
def test_what_is_not_supported_says_so(form, name, fused, device):
    """Forward mode and second derivatives, with respect to every input."""
    problem = small(device, batch=1)
    f = lambda v: (merge(replace(problem, **{name: v}), fused).tokens * problem.grad_tokens).square().sum()  # noqa: E731
    with pytest.raises(REFUSED, match=r"bdm_merge: (forward-mode differentiation|double backward) is not supported"):
        SECOND[form](f, getattr(problem, name))


@pytest.mark.parametrize("form", SECOND)
def test_unmerge_says_so_too(form, fused, device):
    problem = small(device, batch=1)
    match = merge(problem, None).match
    f = lambda t: bdm_unmerge(t, match, grid_size=(2, 3)).pow(3).sum()  # noqa: E731
    with pytest.raises(REFUSED, match=r"bdm_unmerge: (forward-mode differentiation|double backward) is not supported"):
        SECOND[form](f, problem.grad_tokens)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", ["x", "size", "w_down", "w_up", "dropout_mask", "key_delta", "key"])
def test_dual_tensors(name, grad_mode, fused, device):
    """A tangent in any input is refused, on a no-grad call too; a detached key's is dropped."""
    problem = small(device)
    value = getattr(problem, name)
    with fwd.dual_level(), torch.set_grad_enabled(grad_mode):
        dual = replace(problem, **{name: fwd.make_dual(value, torch.ones_like(value))})
        with pytest.raises(REFUSED, match="bdm_merge: forward-mode differentiation is not supported"):
            merge(dual, fused)
        tokens, _, match = merge(problem, fused)  # no tangent: as ever
        assert torch.equal(tokens, merge(problem, fused).tokens)
        if name == "key":
            out = merge(replace(dual, detach_key=True), fused).tokens
            assert torch.equal(out, tokens) and fwd.unpack_dual(out).tangent is None
        with pytest.raises(REFUSED, match="bdm_unmerge: forward-mode differentiation is not supported"):
            bdm_unmerge(fwd.make_dual(tokens.detach(), tokens.detach()), match, grid_size=(2, 3))


def test_the_reference_has_forward_mode(device):
    """<v, J u> of jvp and of vjp agree, and the hessian of a function of the tokens is symmetric."""
    problem = small(device, batch=1)
    f = lambda *leaves: merge(replace(problem, **dict(zip(LEAVES, leaves, strict=True))), "reference").tokens  # noqa: E731
    leaves = tuple(values(problem))
    tangents = tuple(torch.randn_like(v) for v in leaves)
    out, forward = jvp(f, leaves, tangents)
    v = torch.randn_like(out)
    backward = sum((g * t).sum() for g, t in zip(vjp(f, *leaves)[1](v), tangents, strict=True))
    torch.testing.assert_close((v * forward).sum(), backward, rtol=1e-11, atol=1e-12)


def test_outputs_require_grad_where_a_differentiated_input_does(backend, device, max_tokens):
    """A detached key does not count, nor do inputs under no_grad; every other input does, alone."""
    for detach_key in (True, False):
        problem = small(device, detach_key=detach_key)
        for name in LEAVES:
            leaf = getattr(problem, name).clone().requires_grad_()
            given = replace(problem, **{name: leaf})
            wanted = name != "key" or not detach_key
            tokens, size, match = merge(given, backend)
            assert tokens.requires_grad == wanted and not match.requires_grad, name
            assert wanted or not size.requires_grad, name
            dense = bdm_unmerge(tokens, match, grid_size=(2, 3))
            assert dense.requires_grad == wanted
            if name in ("x", "key") and max_tokens > 100:
                assert compiled(lambda given=given: merge(given, backend).tokens)().requires_grad == wanted, f"{name}, compiled"
            with torch.no_grad():
                assert not merge(given, backend).tokens.requires_grad


@pytest.mark.parametrize("form", ["requires_grad", "grad", "vmap of grad", "grad of vmap"])
def test_a_mask_with_a_gradient_is_refused(form, backend, device):
    """No backend computes one, so none pretends to."""
    problem = small(device)
    loss = lambda mask: merge(replace(problem, dropout_mask=mask), backend).tokens.sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"refinement.dropout_mask: expected a mask that requires no gradient"):
        if form == "requires_grad":
            loss(problem.dropout_mask.requires_grad_())
        elif form == "grad":
            grad(loss)(problem.dropout_mask)
        elif form == "vmap of grad":
            vmap(grad(loss))(torch.stack((problem.dropout_mask,) * 2))
        else:
            grad(lambda masks: vmap(loss)(masks).sum())(torch.stack((problem.dropout_mask,) * 2))
    with torch.no_grad():
        assert loss(problem.dropout_mask.detach()).isfinite()


def test_one_tensor_in_several_places(backend, device, max_tokens):
    """x as key, the key as its own correction, one matrix as both weights: gradients add up, compiled or not."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 5, dtype=torch.float64, device=device)
    w = torch.randn(3, 5, dtype=torch.float64, device=device)
    calls = {
        "key": lambda x, w: bdm_merge(x, x, grid_size=(2, 3), backend=backend),
        "attached key": lambda x, w: bdm_merge(x, x, grid_size=(2, 3), detach_key=False, backend=backend),
        "key_delta": lambda x, w: bdm_merge(x, x, key_delta=x, grid_size=(2, 3), detach_key=False, backend=backend),
        "weights": lambda x, w: bdm_merge(x, x, refinement=KeyRefinement(w, w.mT), grid_size=(2, 3), backend=backend),
        "views": lambda x, w: bdm_merge(x[:, :, :3], x[:, :, 1:4], key_delta=x[:, :, 2:], grid_size=(2, 3), backend=backend),
        "size": lambda x, w: bdm_merge(x, x, size=x[..., :1].exp(), grid_size=(2, 3), detach_key=False, backend=backend),
    }
    for name, call in calls.items():
        loss = lambda x, w, call=call: call(x, w).tokens.sin().sum() + call(x, w).size.log().square().sum() + 0 * w.sum()  # noqa: E731
        want = plain(lambda x, w, loss=loss: loss(x.clone(), w.clone()), [x, w])
        forms = {"eager": loss} if max_tokens < 100 else {"eager": loss, "compiled": compiled(loss)}
        for form, f in forms.items():
            for got, expected in zip(plain(f, [x, w]), want, strict=True):
                torch.testing.assert_close(
                    got, expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name, f=form: f"{n}, {f}: {m}"
                )


def test_a_split_made_for_a_transform(device):
    assert vmap(lambda x: bdm_merge(x, x, split=checkerboard(2, 3)).size.sum())(
        torch.randn(2, 3, 7, 4, device=device)
    ).tolist() == [21.0, 21.0]
