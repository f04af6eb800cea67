"""The modules that parameter-efficient tuning adds to a frozen transformer. Each adds nothing, or all but nothing, at first."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .quantize import BITS, QuantizedLinear

__all__ = ["BottleneckAdapter", "FacT", "FacTFactors", "PETModule", "Prompts", "RepAdapter", "ScaleShift"]


class PETModule(nn.Module):
    """What tuning adds: :func:`fpet.freeze` trains it, :func:`fpet.save` writes it, :func:`fpet.remove_adapters` removes it.

    Attributes:
        acts: how it acts on its parent, see :func:`fpet.adapters.attach`; None where the parent's forward calls it. handle: the
            hook by which it does. prefix_tokens: how many tokens it puts in front of the patches.
    """

    acts: str | None = None
    handle: RemovableHandle | None = None
    prefix_tokens: int = 0


class BottleneckAdapter(PETModule):
    """``scale · up(dropout(activation(down(x))))`` without biases: AdaptFormer with ReLU, LoRA with the identity.

    Full-precision weights start at zero (``up``), quantised ones as published: trunc_normal(std 0.001, ±0.002).

    Args:
        in_dim, out_dim: widths. hidden_dim: of the bottleneck. activation: "relu" or "identity".
        bits: 1, 2, 4 or 8 for quantised weights, 32 for plain ones. dropout: probability on the hidden units.
        scale: a number, multiplies the output.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int,
        *,
        activation: str,
        bits: int = 32,
        dropout: float = 0.1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim: expected at least 1, got {hidden_dim}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        if bits != 32 and bits not in BITS:
            raise ValueError(f"bits: expected one of {(*BITS, 32)}, got {bits!r}")
        if activation not in ("relu", "identity"):
            raise ValueError(f"activation: expected 'relu' or 'identity', got {activation!r}")
        self.hidden_dim, self.bits, self.dropout, self.scale = hidden_dim, bits, float(dropout), float(scale)
        self.activation = activation
        self.adapter_down: nn.Linear | QuantizedLinear
        self.adapter_up: nn.Linear | QuantizedLinear
        if bits == 32:
            self.adapter_down = nn.Linear(in_dim, hidden_dim, bias=False)
            self.adapter_up = nn.Linear(hidden_dim, out_dim, bias=False)
            nn.init.zeros_(self.adapter_up.weight)
        else:
            self.adapter_down = QuantizedLinear(in_dim, hidden_dim, bits)
            self.adapter_up = QuantizedLinear(hidden_dim, out_dim, bits)
            nn.init.trunc_normal_(self.adapter_up.weight, std=0.001, a=-0.002, b=0.002)

    def down_weight(self) -> Tensor:
        """(hidden_dim, in_dim), quantised where the layer is."""
        return _weight(self.adapter_down)

    def up_weight(self) -> Tensor:
        """(out_dim, hidden_dim), quantised where the layer is."""
        return _weight(self.adapter_up)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_dim) → (…, out_dim)."""
        hidden = self.adapter_down(x)
        if self.activation == "relu":
            hidden = F.relu(hidden)
        # The hidden units are scaled, not the output: many times fewer of them.
        return self.adapter_up(F.dropout(hidden, self.dropout, self.training) * self.scale)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}, scale={self.scale}"


def _weight(layer: nn.Linear | QuantizedLinear) -> Tensor:
    """What the layer computes with."""
    hook = getattr(layer, "_hf_hook", None)  # accelerate's: it fetches an offloaded weight for a forward, which this is not
    if hook is not None:
        hook.pre_forward(layer)
    try:
        return layer.quantized_weight() if isinstance(layer, QuantizedLinear) else layer.weight
    finally:
        if hook is not None:
            hook.post_forward(layer, None)


class RepAdapter(PETModule):
    """``x + scale · B(dropout(A x))``: linear, so that it folds into the layers that read x (RepAdapter, Luo et al. 2023).

    A (hidden_dim, dim) is dense with a bias, Xavier-uniform; B (dim, hidden_dim) is block-diagonal in ``groups`` blocks
    with a bias, zero. ``up_weight`` is (dim, hidden_dim / groups): row i reads the units of its own group.

    Raises:
        ValueError: groups does not divide dim and hidden_dim.
    """

    def __init__(self, dim: int, hidden_dim: int = 8, *, groups: int = 2, dropout: float = 0.1, scale: float = 1.0) -> None:
        super().__init__()
        if hidden_dim < 1 or hidden_dim % groups or dim % groups:
            raise ValueError(f"hidden_dim: expected a multiple of {groups} groups, as the width {dim}, got {hidden_dim}")
        self.groups, self.dropout, self.scale = groups, float(dropout), float(scale)
        self.down = nn.Linear(dim, hidden_dim)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up_weight = nn.Parameter(torch.zeros(dim, hidden_dim // groups))
        self.up_bias = nn.Parameter(torch.zeros(dim))

    def dense_up(self) -> Tensor:
        """(dim, hidden_dim): B with its zeros."""
        return torch.block_diag(*self.up_weight.chunk(self.groups))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        hidden = F.dropout(self.down(x), self.dropout, self.training) * self.scale
        return x + F.linear(hidden, self.dense_up(), self.up_bias * self.scale)


class ScaleShift(PETModule):
    """``x · scale + shift`` per channel (SSF, Lian et al. 2022); scale starts as N(1, 0.02), shift as N(0, 0.02).

    ``channel_dim`` is −1 for tokens and 1 for the map (B, C, H, W) of a convolution.
    """

    def __init__(self, dim: int, channel_dim: int = -1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.scale = nn.Parameter(torch.empty(dim))
        self.shift = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.scale, mean=1.0, std=0.02)
        nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels at ``channel_dim``; x's dtype."""
        scale, shift = (
            (self.scale, self.shift) if self.channel_dim == -1 else (self.scale[:, None, None], self.shift[:, None, None])
        )
        return torch.addcmul(shift, x, scale).to(x.dtype)


class Prompts(PETModule):
    """Learned tokens behind the model's own prefix tokens (VPT, Jia et al. 2022): put in, or in place of those there.

    Args:
        num_tokens: P. dim: D. position: the number of prefix tokens before the prompts. insert: put in (the first layer),
            otherwise replace. bound: uniform initialisation in ±bound.
    """

    def __init__(self, num_tokens: int, dim: int, position: int, *, insert: bool, bound: float, dropout: float = 0.1) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"hidden_dim: expected at least 1 prompt, got {num_tokens}")
        self.position, self.insert, self.dropout = position, insert, float(dropout)
        self.prefix_tokens = num_tokens if insert else 0
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N + P, D) where they are put in, otherwise (B, N, D)."""
        prompts = F.dropout(self.tokens.expand(x.shape[0], -1, -1), self.dropout, self.training).to(x.dtype)
        after = self.position if self.insert else self.position + self.tokens.shape[1]
        return torch.cat([x[:, : self.position], prompts, x[:, after:]], dim=1)


class FacTFactors(PETModule):
    """The two factors that all of FacT-TT's updates share: U (r, D) reads, V (D, r) writes; V starts at zero."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"hidden_dim: expected a rank of at least 1, got {rank}")
        self.u = nn.Parameter(torch.empty(rank, dim))
        self.v = nn.Parameter(torch.zeros(dim, rank))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))


class FacT(PETModule):
    """One matrix's update in FacT-TT (Jie and Deng, 2023): ``scale · V Σ Uᵀ``, only Σ its own.

    A matrix of (p·D, q·D) is p × q matrices of (D, D): ``core`` is (p·r, q·r), U and V act on each piece of width D.

    Args:
        factors: shared; held by reference, the model owns it. in_pieces: q. out_pieces: p.
    """

    def __init__(self, factors: FacTFactors, in_pieces: int, out_pieces: int, *, dropout: float, scale: float) -> None:
        super().__init__()
        self.shared = (factors,)  # a tuple, so that state_dict lists the factors once, under the model
        self.in_pieces, self.out_pieces, self.dropout, self.scale = in_pieces, out_pieces, float(dropout), float(scale)
        rank = factors.u.shape[0]
        self.core = nn.Parameter(torch.empty(out_pieces * rank, in_pieces * rank))
        # Σ of fused matrices is one linear layer from the same r units per piece, each initialised as a layer of its own.
        nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(…, q·D) → (…, p·D)."""
        (factors,) = self.shared
        hidden = F.linear(x.unflatten(-1, (self.in_pieces, -1)), factors.u).flatten(-2)
        hidden = F.dropout(F.linear(hidden, self.core), self.dropout, self.training)
        return F.linear(hidden.unflatten(-1, (self.out_pieces, -1)), factors.v).flatten(-2) * self.scale

    def delta(self) -> Tensor:
        """(p·D, q·D): what it adds to the matrix."""
        (factors,) = self.shared
        rank, dim = factors.u.shape
        core = self.core.view(self.out_pieces, rank, self.in_pieces, rank)
        delta = torch.einsum("dr,prqs,se->pdqe", factors.v, core, factors.u)
        return delta.reshape(self.out_pieces * dim, self.in_pieces * dim) * self.scale
