"""`bdm_merge` in a transformer of your own: half of the patches are merged once; later attention counts them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpet_kernels import KeyRefinement, bdm_merge

GRID, HEADS, DIM, HIDDEN = (8, 8), 4, 64, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def attention(self, x: Tensor, log_size: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention adds to x (B, N, D), and its keys (B, heads, N, D / heads)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        # A token that stands for s patches weighs as s of them.
        bias = None if log_size is None else log_size[:, None, None, :].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2)), k


class MergingTransformer(nn.Module):
    def __init__(self, depth: int = 4, merge_in: int = 1) -> None:
        super().__init__()
        self.blocks, self.merge_in = nn.ModuleList(Block() for _ in range(depth)), merge_in
        self.w_down = nn.Parameter(torch.randn(HIDDEN, DIM // HEADS) * (DIM // HEADS) ** -0.5)
        self.w_up = nn.Parameter(torch.zeros(DIM // HEADS, HIDDEN))  # matches by the raw keys at first

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + 64, D) → (B, D): a class token and an 8 × 8 grid."""
        log_size = None
        for i, block in enumerate(self.blocks):
            added, key = block.attention(x, log_size)
            x = x + added
            if i == self.merge_in:
                merged = bdm_merge(x, key, grid_size=GRID, refinement=KeyRefinement(self.w_down, self.w_up))
                x, log_size = merged.tokens, merged.size.squeeze(-1).log()  # (B, 1 + 32, D)
            x = x + block.mlp(block.norm2(x))
        return x[:, 0]


torch.manual_seed(0)
model = MergingTransformer()
x = torch.randn(2, 65, DIM)
model(x).square().mean().backward()
assert model.w_up.grad is not None and model.w_up.grad.abs().sum() > 0
print("output", tuple(model(x).shape), "gradient of w_up", float(model.w_up.grad.norm()))
