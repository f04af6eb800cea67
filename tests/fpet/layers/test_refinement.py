"""KeyRefinement: what it hands to the merging operator."""

import pytest
import torch

import fpet
import fpet_kernels
from fpet.layers.quantize import quantize_weight


def refined(**options):
    torch.manual_seed(0)
    module = fpet.KeyRefinement(16, **{"hidden_dim": 8, **options})
    torch.nn.init.normal_(module.adapter_up.weight, std=0.1)
    return module


def test_defaults_are_the_papers():
    module = fpet.KeyRefinement(64)
    assert (module.channels, module.hidden_dim, module.bits, module.dropout, module.scale) == (64, 32, 1, 0.1, 1.0)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"adapter_down.weight": (32, 64), "adapter_up.weight": (64, 32)}
    assert 0 < module.adapter_up.weight.abs().max() <= 0.002


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_weights_in_evaluation(bits):
    module = refined(bits=bits, scale=0.5).eval()
    w_down, w_up, scale, mask = module.weights(2, 5)
    for given, layer in ((w_down, module.adapter_down), (w_up, module.adapter_up)):
        assert torch.equal(given, layer.weight if bits == 32 else quantize_weight(layer.weight, bits))
    assert (scale, mask) == (0.5, None)
    key = torch.randn(2, 5, 16)
    torch.testing.assert_close(module(key), 0.5 * torch.relu(key @ w_down.T) @ w_up.T)


def test_mask_in_training():
    module = refined(dropout=0.25)
    mask = module.weights(3, 400).dropout_mask
    assert mask.shape == (3, 400, 8)
    assert mask.dtype == torch.float32
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(mask, module.weights(3, 400).dropout_mask)
    assert refined(dropout=0.0).weights(3, 4).dropout_mask is None
    assert refined().double().weights(3, 4).dropout_mask.dtype == torch.float64
    assert refined().bfloat16().weights(3, 4).dropout_mask.dtype == torch.float32


def test_trains_through_the_operator(backend, device):
    module = refined(bits=1).double().to(device)
    generator = torch.Generator().manual_seed(1)
    x, key = (torch.randn(2, 17, 16, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    x.requires_grad_()
    merged = fpet_kernels.bdm_merge(x, key, grid_size=(4, 4), refinement=module.weights(2, 17), backend=backend)
    merged.tokens.square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.abs().max() > 0
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits: expected one of"),
        ({"hidden_dim": 0}, "hidden_dim: expected at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        refined(**options)
