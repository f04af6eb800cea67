"""ToMe's matching in plain PyTorch, in the place where the patch of a block calls its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpet.vit.block import FPETBlock
from fpet.vit.merging import MergeStep
from fpet_kernels import Merged


class ToMeStep(MergeStep):
    """Merges every even patch into the odd one with the most similar key (mean over heads, cosine)."""

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
        prefix = x.shape[1] - self.split.num_tokens
        metric = F.normalize(key.mean(dim=1), dim=-1)
        match = (metric[:, prefix::2] @ metric[:, prefix + 1 :: 2].mT).argmax(dim=-1, keepdim=True)  # (B, N_A, 1)
        size = x.new_ones(x.shape[0], x.shape[1], 1, dtype=torch.float32) if self.size is None else self.size
        weighted = x if self.size is None else x * size.to(x.dtype)
        to = match.expand(-1, -1, x.shape[2])
        total = weighted[:, prefix + 1 :: 2].scatter_add(1, to, weighted[:, prefix::2])
        counts = size[:, prefix + 1 :: 2].scatter_add(1, match, size[:, prefix::2])
        tokens = torch.cat((x[:, :prefix], total / counts.to(x.dtype)), dim=1)
        return Merged(tokens, torch.cat((size[:, :prefix], counts), dim=1), match.squeeze(-1) + prefix)


class ToMeBlock(FPETBlock):
    """A patched block that merges by :class:`ToMeStep`."""

    def _run(self, x: Tensor, merge: MergeStep | None, **attention: Any) -> Any:
        return super()._run(x, None if merge is None else ToMeStep(*merge), **attention)
