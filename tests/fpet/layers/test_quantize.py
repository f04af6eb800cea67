"""Quantised weights: levels, gradients, storage."""

import copy
import itertools
import math
import pickle
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpet.layers.quantize import BITS, QuantizedLinear, latent_weight, levels, pack, packed_size, quantize_weight, unpack


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(0.02).add(3e-3).to(dtype)


def exact(w, bits):
    """The definition, element by element."""
    w = w.double()
    z = (w - w.mean()) / (w.std() + 1e-5)
    table = torch.tensor(levels(bits), dtype=torch.float64)
    nearest = table[(z[..., None] - table).abs().argmin(-1)]
    return nearest * w.std() + w.mean()


def test_published_levels():
    assert levels(1) == pytest.approx((-0.67449, 0.67449), abs=1e-5)
    assert levels(2) == pytest.approx((-1.2657, -0.3778, 0.3778, 1.2657), abs=5e-5)


@pytest.mark.parametrize("bits", BITS)
def test_every_level_is_the_median_of_its_cell(bits):
    normal, table = NormalDist(), levels(bits)
    assert len(table) == 2**bits
    assert list(table) == sorted(table)
    assert table == tuple(-v for v in reversed(table))
    bounds = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(table)), math.inf]
    for low, level, high in zip(bounds[:-1], table, bounds[1:], strict=True):
        if level <= 0:  # the other half has no digits left near probability 1
            cdf = [0.0 if b == -math.inf else normal.cdf(b) for b in (low, high)]
            assert normal.inv_cdf(sum(cdf) / 2) == pytest.approx(level, abs=1e-6)


def test_levels_don_t_depend_on_the_default_device():
    levels.cache_clear()
    with torch.device("meta"):
        assert levels(4) == pytest.approx([-v for v in reversed(levels(4))])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(7, 3), (64, 16)])
def test_quantised_weight(bits, shape):
    w = weight(*shape)
    torch.testing.assert_close(quantize_weight(w, bits).double(), exact(w, bits), rtol=1e-5, atol=1e-7)
    assert quantize_weight(w, bits).unique().numel() <= 2**bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    w = weight(64, 16, dtype=dtype)
    out = quantize_weight(w, 1)
    assert out.dtype == dtype
    assert torch.equal(out, quantize_weight(w.float(), 1).to(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_gradient_goes_through_mean_and_std_and_straight_through_the_rounding(bits):
    w = weight(5, 4, dtype=torch.float64).requires_grad_()
    upstream = weight(5, 4, seed=1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(quantize_weight(w, bits), w, upstream)
    with torch.no_grad():
        z = (w - w.mean()) / (w.std() + 1e-5)
        offset = (exact(w, bits) - w.mean()) / w.std() - z

        def surrogate(w):  # the rounding error held fixed
            return (((w - w.mean()) / (w.std() + 1e-5) + offset) * w.std() + w.mean()).mul(upstream).sum()

        for i in range(w.numel()):
            step = torch.zeros(w.numel(), dtype=w.dtype)
            step[i] = 1e-7
            slope = (surrogate(w + step.view(5, 4)) - surrogate(w - step.view(5, 4))) / 2e-7
            assert grad.flatten()[i] == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_constant_weight_gives_finite_values_and_gradients():
    w = torch.full((4, 4), 0.5, requires_grad=True)
    out = quantize_weight(w, 1)
    out.sum().backward()
    assert torch.equal(out, w)
    assert torch.isfinite(w.grad).all()


def test_linear():
    layer, x = QuantizedLinear(6, 5, bits=2), weight(3, 6)
    torch.testing.assert_close(layer(x), x @ quantize_weight(layer.weight, 2).T)
    assert layer.state_dict().keys() == {"weight"}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_linear_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        layer = QuantizedLinear(6, 5, bits=4)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer.quantized_weight().double(), exact(layer.weight, 4).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arguments", [(6, 5, 3), (6, 5, 32), (1, 1, 1)])
def test_linear_refuses(arguments):
    with pytest.raises(ValueError, match=r"bits: expected|in_features, out_features: expected"):
        QuantizedLinear(*arguments)


# --- storage ---------------------------------------------------------------------------------------------------------


def test_bytes_are_as_published():
    # Codes 1 0 1 1 0 0 1 0 | 1 1, least significant bit first, then mean 0.5 and std as float32.
    w = torch.tensor([3.0, -2.0, 3.0, 3.0, -2.0, -2.0, 3.0, -2.0, 3.0, 3.0]) / 2
    data = pack(w, 1)
    assert data[:2].tolist() == [0b01001101, 0b00000011]
    assert data[2:].numpy().view("<f4") == pytest.approx([w.mean().item(), w.std().item()])
    two = pack(torch.tensor([-3.0, -0.2, 0.3, 2.0, 0.1]), 2)
    assert two[:2].tolist() == [0b11100100, 0b10]


@given(
    rows=st.integers(1, 9), columns=st.integers(2, 9), bits=st.sampled_from(BITS), seed=st.integers(0, 99),
    std=st.floats(1e-4, 10), heavy=st.booleans(),
)  # fmt: skip
def test_pack_and_unpack(rows, columns, bits, seed, std, heavy):
    w = weight(rows, columns, seed=seed) / 0.02
    w = (w.pow(3) if heavy else w) * std
    data = pack(w, bits)
    assert data.shape == (packed_size(w.numel(), bits),) == ((w.numel() * bits + 7) // 8 + 8,)
    codes, mean, deviation = unpack(data, w.shape, bits)
    rebuilt = torch.tensor(levels(bits))[codes] * deviation + mean
    torch.testing.assert_close(rebuilt, quantize_weight(w, bits), rtol=1e-5, atol=1e-5 * std)


@given(rows=st.integers(1, 40), columns=st.integers(8, 40), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_latent_weight_quantises_to_what_was_stored(rows, columns, bits, seed):
    w = weight(rows, columns, seed=seed)
    codes, mean, std = unpack(pack(w, bits), w.shape, bits)
    latent = latent_weight(codes, mean, std, bits)
    again, mean2, std2 = unpack(pack(latent, bits), w.shape, bits)
    assert torch.equal(again, codes)
    assert (mean2, std2) == (pytest.approx(mean, abs=1e-6 * std), pytest.approx(std, rel=1e-6))


def test_latent_weight_of_a_constant():
    assert torch.equal(latent_weight(torch.zeros(2, 3, dtype=torch.int64), 0.25, 0.0, 1), torch.full((2, 3), 0.25))


@pytest.mark.parametrize("bits", BITS)
def test_latent_weight_refuses_what_no_weight_gives(bits):
    with pytest.raises(ValueError, match="codes: "):
        latent_weight(torch.zeros(4, 4, dtype=torch.int64), 0.0, 1.0, bits)


def test_unpack_refuses():
    data = pack(weight(4, 4), 1)
    with pytest.raises(ValueError, match=r"data: expected \(11,\) uint8 for a 1-bit weight of shape \(4, 5\), got \(10,\)"):
        unpack(data, (4, 5), 1)
    data[-4:] = 255  # a std that is no number
    with pytest.raises(ValueError, match="finite"):
        unpack(data, (4, 4), 1)
