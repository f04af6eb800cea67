"""The tiny adapter on the keys that learns the matching (FPET, equation 10): :class:`KeyRefinement`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fpet_kernels

from .modules import BottleneckAdapter

__all__ = ["KeyRefinement"]


class KeyRefinement(BottleneckAdapter):
    """``scale · (ReLU(key W_downᵀ) ⊙ mask) W_upᵀ``, added to the detached key before matching (eq. 10).

    This is the module with the weights; :class:`fpet_kernels.KeyRefinement` is what one call of the operator takes. The
    merging kernel computes it: :meth:`weights` hands over what it needs. Parameters: ``adapter_down.weight`` (hidden_dim,
    channels) and ``adapter_up.weight`` (channels, hidden_dim).

    Args:
        channels: C, the width of one head. hidden_dim: h. bits: 1, 2, 4 or 8 to quantise the weights, 32 not to.
        dropout: probability on the hidden units, in training. scale: a number.
    """

    def __init__(self, channels: int, hidden_dim: int = 32, bits: int = 1, dropout: float = 0.1, scale: float = 1.0) -> None:
        super().__init__(channels, channels, hidden_dim, activation="relu", bits=bits, dropout=dropout, scale=scale)
        self.channels = channels

    def weights(self, batch: int, n: int) -> fpet_kernels.KeyRefinement:
        """What :func:`fpet_kernels.bdm_merge` takes as ``refinement`` for a key of shape (batch, n, channels).

        Returns:
            Quantised weights, with gradient to the latent ones; the scale; in training the dropout mask
            (batch, n, hidden_dim), a fresh one each call, kept units scaled by 1 / (1 − p), otherwise None.
        """
        w_down, w_up = self.down_weight(), self.up_weight()
        mask = None
        if self.training and self.dropout > 0:
            dtype = torch.float64 if w_down.dtype == torch.float64 else torch.float32  # 1 / 0.9 is inexact in less
            mask = F.dropout(torch.ones(batch, n, self.hidden_dim, dtype=dtype, device=w_down.device), self.dropout)
        return fpet_kernels.KeyRefinement(w_down, w_up, self.scale, mask)

    def forward(self, key: Tensor) -> Tensor:
        """(…, channels) → the same: the correction itself, for looking at it outside the kernel."""
        return super().forward(key)
