"""Linear layers whose weights take 2 to 256 values: Bi-LoRA, Bi-AdaptFormer (Jie et al., ICCV 2023), FPET's refinement."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BITS", "QuantizedLinear", "latent_weight", "levels", "pack", "packed_size", "quantize_weight", "unpack"]

BITS = (1, 2, 4, 8)
_EPS = 1e-5  # added to the standard deviation, as the published checkpoints were trained


@functools.cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2**bits values a standardised weight is rounded to, ascending, each a float32 number.

    They minimise the mean absolute error of a rounded standard normal variable: every level is the median of its cell
    and the cells meet half way between levels (Lloyd's conditions for the absolute error), Φ(v_i) = (Φ(m_i−1) + Φ(m_i)) / 2
    with m_i = (v_i + v_i+1) / 2. One bit gives the median of the half normal, ±0.67449; two give ±0.37775 and ±1.26572.

    Raises:
        ValueError: bits is not 1, 2, 4 or 8.
    """
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
    half = 2 ** (bits - 1)  # the negative half alone: there Φ keeps its relative precision
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    ranks = (torch.arange(half, dtype=torch.float64, device="cpu") + 0.5) / (2 * half)
    v = math.sqrt(2.0) * torch.special.ndtri(ranks)  # exact for infinitely many levels: their density is ∝ √φ
    for _ in range(20):  # Newton's method on v = Φ⁻¹((Φ(m_i−1) + Φ(m_i)) / 2); 5 steps do
        middle = torch.cat([(v[1:] + v[:-1]) / 2, zero])
        cdf = torch.special.ndtr(middle)
        median = torch.special.ndtri((cdf + torch.cat([zero, cdf[:-1]])) / 2)
        slope = torch.cat([_density(middle[:-1]) / 4, zero])
        below = torch.cat([zero, slope[:-1]])
        moved = torch.diag(slope + below) + torch.diag(slope[:-1], 1) + torch.diag(slope[:-1], -1)
        jacobian = torch.eye(half, dtype=torch.float64, device="cpu") - moved / _density(median)[:, None]
        step = torch.linalg.solve(jacobian, v - median)
        v = v - step
        if step.abs().max() < 1e-10:
            break
    v = v.float().double()
    return tuple(v.tolist()) + tuple((-v.flip(0)).tolist())


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


_ONE_BIT = levels(1)[1]


def quantize_weight(weight: Tensor, bits: int, table: Tensor | None = None) -> Tensor:
    """``level((w − mean) / (std + 1e-5)) · std + mean``, with the unbiased std over the whole matrix.

    The gradient goes straight through the rounding, and also through mean and std.

    Args:
        weight: any shape, at least two elements. Half precisions are computed in float32.
        bits: 1, 2, 4 or 8. table: :func:`levels` as a tensor on weight's device; not needed for one bit.

    Returns:
        weight's shape and dtype.
    """
    w = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    mean, std = w.mean(), w.std()
    z = (w - mean) / (std + _EPS)
    rounded = _nearest(z.detach(), bits, table) + (z - z.detach())
    return (rounded * std + mean).to(weight.dtype)


def _nearest(z: Tensor, bits: int, table: Tensor | None) -> Tensor:
    if bits == 1:
        level = z.new_full((), _ONE_BIT)
        return torch.where(z > 0, level, -level)
    if table is None:
        table = torch.tensor(levels(bits), device=z.device)
    table = table.to(z.dtype)
    return table[torch.bucketize(z, (table[1:] + table[:-1]) / 2)]


class QuantizedLinear(nn.Module):
    """A bias-free linear layer that computes with its weight rounded to ``2**bits`` levels, and trains the unrounded one.

    Attributes:
        weight: (out_features, in_features), the latent full-precision weight.

    Raises:
        ValueError: bits is not 1, 2, 4 or 8, or there are fewer than two weights, which have no standard deviation.
    """

    table: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int = 1) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
        if in_features * out_features < 2:
            raise ValueError(f"in_features, out_features: expected at least 2 weights, got {in_features} × {out_features}")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("table", torch.empty(2**bits), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of nn.Linear."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self._fill_table()

    @torch.no_grad()
    def _fill_table(self) -> None:
        self.table.copy_(torch.tensor(levels(self.bits)))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        self._fill_table()  # to_empty leaves anything in it
        return self

    def quantized_weight(self) -> Tensor:
        """(out_features, in_features): what the layer computes with."""
        table = (
            self.table if self.table.device == self.weight.device else None
        )  # load_state_dict(assign=True) moves the weight alone
        return quantize_weight(self.weight, self.bits, table)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        return F.linear(x, self.quantized_weight())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


# --- storage ---------------------------------------------------------------------------------------------------------


def packed_size(numel: int, bits: int) -> int:
    """Bytes that :func:`pack` makes of ``numel`` weights: the codes, a partial last byte included, and two float32."""
    return (numel * bits + 7) // 8 + 8


@torch.no_grad()
def pack(weight: Tensor, bits: int) -> Tensor:
    """The stored form of a quantised weight: codes, the least significant bits of a byte first, then float32 mean and std.

    Args:
        weight: the latent weight, any shape. bits: 1, 2, 4 or 8.

    Returns:
        (packed_size(numel, bits),) uint8, on the CPU. Little-endian; the last byte is filled with zero bits.
    """
    w = weight.detach().cpu()
    w = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
    mean, std = w.mean(), w.std()
    codes = _codes((w - mean) / (std + _EPS), bits).flatten()
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)
    packed = (codes << (torch.arange(per_byte) * bits)).sum(1).to(torch.uint8)
    return torch.cat([packed, _float_bytes(mean, std)])


def unpack(data: Tensor, shape: Sequence[int], bits: int) -> tuple[Tensor, float, float]:
    """What :func:`pack` stored.

    Args:
        data: (packed_size(numel, bits),) uint8. shape: the weight's. bits: 1, 2, 4 or 8.

    Returns:
        codes, of ``shape``, int64, indices into :func:`levels`; mean; std. The weight is ``levels[codes] · std + mean``.

    Raises:
        ValueError: the length does not fit the shape, or mean or std is not a finite number, or std is negative.
    """
    numel = math.prod(shape)
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != packed_size(numel, bits):
        expected = f"({packed_size(numel, bits)},) uint8 for a {bits}-bit weight of shape {tuple(shape)}"
        raise ValueError(f"data: expected {expected}, got {tuple(data.shape)} {data.dtype}")
    if sys.byteorder != "little":
        mean, std = data[-8:].view(2, 4).flip(1).contiguous().flatten().view(torch.float32).tolist()
    else:
        mean, std = data[-8:].clone().view(torch.float32).tolist()
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise ValueError(f"data: expected a finite mean and a finite std of at least 0, got {mean} and {std}")
    per_byte = 8 // bits
    codes = (data[:-8, None].long() >> (torch.arange(per_byte) * bits)) & (2**bits - 1)
    return codes.flatten()[:numel].view(tuple(shape)), mean, std


def _codes(z: Tensor, bits: int) -> Tensor:
    table = torch.tensor(levels(bits), dtype=z.dtype)
    return torch.bucketize(z, (table[1:] + table[:-1]) / 2)


def _float_bytes(*values: Tensor) -> Tensor:
    data = torch.stack([v.float() for v in values]).view(torch.uint8)
    return data.view(-1, 4).flip(1).flatten() if sys.byteorder != "little" else data


@torch.no_grad()
def latent_weight(codes: Tensor, mean: float, std: float, bits: int) -> Tensor:
    """A weight that quantises to the given codes, mean and std, so that training can go on from a stored one.

    The rounded weights themselves don't do: their mean and std are others. One bit has two unknown values and two
    conditions, hence a closed form. More bits move the weights off their levels to the mean and std wanted, those in wide
    cells more than others; those that would leave their cell stop at its edge, and the others go on.

    Args:
        codes: int64, any shape. mean, std: of the weight wanted, unbiased std. bits: 1, 2, 4 or 8.

    Returns:
        float32, codes' shape.

    Raises:
        ValueError: no such weight was found: the codes were not made from a weight of this mean and std.
    """
    n = codes.numel()
    if std == 0:
        return torch.full(codes.shape, mean)
    scale = std + _EPS
    square = (n - 1) * (std / scale) ** 2  # of the standardised weight: its sum is 0, its sum of squares this
    if bits == 1:
        high = int(codes.sum())
        if high in (0, n):
            raise ValueError(f"codes: expected both values among the codes of a weight with std {std}, got one value alone")
        up, down = math.sqrt(square * (n - high) / (n * high)), -math.sqrt(square * high / (n * (n - high)))
        return (torch.where(codes > 0, up, down).double() * scale + mean).float()

    table = torch.tensor(levels(bits), dtype=torch.float64)
    middle = (table[1:] + table[:-1]) / 2
    reach = 2 * (table[-1:] - middle[-1:])
    bounds = torch.cat([middle[:1] - reach, middle, middle[-1:] + reach])
    width = (bounds[1:] - bounds[:-1])[codes].flatten()
    bounds[0], bounds[-1] = -math.inf, math.inf  # the outer cells count as 2 × reach wide, but have no end
    low, high_ = bounds[codes].flatten() + 1e-3 * width, bounds[codes + 1].flatten() - 1e-3 * width
    z, mobility = table[codes].flatten(), width**2  # the wider a cell, the more its weights move
    for _ in range(200):  # a step of Newton's method along the two gradients, 1 and 2 z
        wanted = torch.stack([-z.sum(), square - z.square().sum()])
        if bool(wanted.abs().max() < 1e-9 * n):
            return (z * scale + mean).float().view(codes.shape)
        gradients = torch.stack([torch.ones_like(z), 2 * z])
        steps = gradients * mobility
        z = z + torch.linalg.pinv(gradients @ steps.T, hermitian=True) @ wanted @ steps
        outside = (z < low) | (z > high_)
        z = z.clamp(low, high_)
        mobility = mobility * ~outside
    raise ValueError(f"codes: found no {bits}-bit weight with these codes, mean {mean} and std {std}")
