"""Per-head keys: averaged inside the kernels, and once for a backward that needs them again."""

from __future__ import annotations

import pytest
import torch

from fpet_kernels import KeyRefinement, bdm_merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layout", ["fused qkv", "heads last", "strided channels"])
def test_average_heads_is_the_mean(dtype: torch.dtype, wide: bool, layout: str) -> None:
    torch.manual_seed(0)
    key = {
        "fused qkv": lambda: torch.randn(3, 21, 3, 5, 37).permute(2, 0, 3, 1, 4)[1],
        "heads last": lambda: torch.randn(3, 21, 37, 5).permute(0, 3, 1, 2),
        "strided channels": lambda: torch.randn(3, 5, 21, 74)[..., ::2],
    }[layout]().to(dtype)
    got = torch.ops.fpet.average_heads(key, wide)
    want = key.double().mean(1)
    assert got.dtype == (torch.float64 if wide or dtype == torch.float64 else torch.float32)
    assert got.is_contiguous()
    tolerance = 1e-15 if got.dtype == torch.float64 else 1e-6
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("detach_key", [True, False])
def test_per_head_key_gives_the_gradients_of_its_mean(detach_key: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 26, 9, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 4, 26, 7, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7, 3))]
    wanted = [x, *weights] if detach_key else [x, *weights, key]
    results = []
    for given in (key, key.mean(1)):
        out = bdm_merge(x, given, grid_size=(5, 5), refinement=KeyRefinement(*weights), detach_key=detach_key)
        results.append(torch.autograd.grad(out.tokens.sin().sum() + out.size.square().sum(), wanted))
    for per_head, mean in zip(*results, strict=True):
        torch.testing.assert_close(per_head, mean, rtol=1e-12, atol=1e-13)


def test_backward_keeps_the_mean_and_not_a_copy_of_every_head() -> None:
    key = torch.randn(1, 12, 17, 8)
    weights = [torch.randn(s, requires_grad=True) for s in ((3, 8), (8, 3))]
    out = bdm_merge(torch.randn(1, 17, 4), key, grid_size=(4, 4), refinement=KeyRefinement(*weights), backend=None)
    node = out.tokens.grad_fn
    if type(node).__name__ == "BDMMergeBackward" and node.backend == "cpu":
        assert (1, 17, 8) in [tuple(t.shape) for t in node.saved_tensors if t is not None]
        assert tuple(key.shape) not in [tuple(t.shape) for t in node.saved_tensors if t is not None]
    else:
        pytest.skip("this backend reads the per-head key again")
