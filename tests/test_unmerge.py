"""bdm_unmerge: every original position gets the token it was merged into, with gradient."""

from __future__ import annotations

import pytest
import torch

from fpet_kernels import alternating, bdm_merge, bdm_unmerge, checkerboard_3d, second_checkerboard
from support import DTYPES, random_problem

SPLITS = {
    "grid": {"grid_size": (5, 7)},
    "alternating": {"split": alternating(35)},
    "second": {"split": second_checkerboard(10, 7)},
    "3d": {"split": checkerboard_3d(5, 7, 1)},
}
BACKENDS = pytest.mark.parametrize("route", [None, "reference"])


def merged(where: dict, prefix: int, dim: int, dtype: torch.dtype, device: str):
    x = torch.randn(3, prefix + 35, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return x, bdm_merge(x, x, **where, num_prefix_tokens=prefix)


@BACKENDS
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", SPLITS)
def test_positions(name, dtype, prefix, route, device):
    where = SPLITS[name]
    x, (tokens, _, match) = merged(where, prefix, 9, dtype, device)
    out = bdm_unmerge(tokens, match, **where, num_prefix_tokens=prefix, backend=route)
    assert out.shape == x.shape and out.dtype == dtype
    split = where.get("split") or random_problem((5, 7)).split
    a, b = split.on(x.device)
    assert torch.equal(out[:, :prefix], tokens[:, :prefix])
    assert torch.equal(out[:, b + prefix], tokens[:, prefix:])
    for image in range(3):
        assert torch.equal(out[image, a + prefix], tokens[image, match[image]])


@BACKENDS
@pytest.mark.parametrize("dim", [1, 16, 33])
@pytest.mark.parametrize("name", SPLITS)
def test_gradient(name, dim, route, device):
    """The adjoint: <unmerge(t), g> = <t, unmerge*(g)>; and gradcheck."""
    where = SPLITS[name]
    _, (tokens, _, match) = merged(where, 2, dim, torch.float64, device)
    tokens.requires_grad_()

    def unmerge(t: torch.Tensor) -> torch.Tensor:
        return bdm_unmerge(t, match, **where, num_prefix_tokens=2, backend=route)

    out = unmerge(tokens)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype).to(device)
    (grad,) = torch.autograd.grad(out, tokens, g)
    torch.testing.assert_close((out * g).sum(), (tokens * grad).sum(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(unmerge, tokens, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradient_of_many_to_one(dtype, device):
    """Everything in one token: its gradient is a sum of 36 terms, no worse than plain PyTorch's in this dtype."""
    match = torch.full((2, 35), 36, device=device)
    tokens = torch.randn(2, 1 + 35, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    g = torch.randn(2, 71, 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    where = {"grid_size": (7, 10)}
    match -= 1
    grads = [torch.autograd.grad(bdm_unmerge(tokens, match, **where, backend=b), tokens, g)[0] for b in (None, "reference")]
    (exact,) = torch.autograd.grad(
        bdm_unmerge(wide := tokens.detach().double().requires_grad_(), match, **where), wide, g.double()
    )
    error, plain = ((grad.double() - exact).abs().max() for grad in grads)
    assert error <= 2 * plain + torch.finfo(dtype).eps / 2 * exact.abs().max()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(layout, device):
    _, (tokens, _, match) = merged(SPLITS["grid"], 1, 6, torch.float32, device)
    want = bdm_unmerge(tokens, match, grid_size=(5, 7))
    if layout == "transposed":
        strided, index = tokens.mT.contiguous().mT, match.mT.contiguous().mT
    elif layout == "sliced":
        strided, index = torch.cat((tokens, tokens), -1)[..., 6:], torch.stack((match, match * 0), -1)[..., 0]
    else:
        strided, index = tokens[:1].expand(3, -1, -1), match[:1].expand(3, -1)
        want = want[:1].expand(3, -1, -1)
    strided = strided.detach().requires_grad_()
    out = bdm_unmerge(strided, index, grid_size=(5, 7))
    assert torch.equal(out, want)
    (grad,) = torch.autograd.grad(out.sum(), strided)  # an upstream gradient of stride 0
    counts = torch.ones(3, 18, device=device).scatter_add(1, index, torch.ones(3, 18, device=device))
    assert torch.equal(grad, counts[..., None].expand_as(grad))


@pytest.mark.parametrize("bad", [-1, 18, 2**40])
def test_match_out_of_range(bad, device):
    if device == "cuda":
        pytest.skip("a bad index stops a CUDA context for good")
    tokens, match = torch.randn(1, 18, 4), torch.ones(1, 18, dtype=torch.int64)
    match[0, 5] = bad
    for route in (None, "reference"):
        with pytest.raises((IndexError, RuntimeError), match=r"match.*expected.*\[0, 18\)|out of (range|bounds)"):
            bdm_unmerge(tokens, match, grid_size=(5, 7), backend=route)


def test_deterministic_gradient(device, threads):
    _, (tokens, _, match) = merged(SPLITS["grid"], 1, 40, torch.float32, device)
    tokens.requires_grad_()
    g = torch.randn(3, 36, 40, device=device)
    threads(1)
    want = torch.autograd.grad(bdm_unmerge(tokens, match, grid_size=(5, 7)), tokens, g)[0]
    for count in (1, 2, 4):
        threads(count)
        assert torch.equal(torch.autograd.grad(bdm_unmerge(tokens, match, grid_size=(5, 7)), tokens, g)[0], want)


def test_double_backward_raises(device):
    _, (tokens, _, match) = merged(SPLITS["grid"], 1, 4, torch.float32, device)
    tokens.requires_grad_()
    out = bdm_unmerge(tokens, match, grid_size=(5, 7))
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|[Dd]ouble backward"):
        grad.sum().backward()


def test_round_trip_of_a_constant(backend, device):
    """Merging equal tokens and giving them back changes nothing."""
    x = torch.full((2, 1 + 35, 8), 0.75, device=device)
    tokens, _, match = bdm_merge(x, torch.randn(2, 36, 4, device=device), grid_size=(5, 7), backend=backend)
    assert torch.equal(bdm_unmerge(tokens, match, grid_size=(5, 7)), x)


def test_empty_batch(device):
    out = bdm_unmerge(
        torch.empty(0, 18, 4, device=device), torch.empty(0, 18, dtype=torch.int64, device=device), grid_size=(5, 7)
    )
    assert out.shape == (0, 36, 4)
