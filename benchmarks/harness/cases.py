"""The named problems of the kernel benchmark, on real input: tokens and keys of a timm ViT looking at a photograph.

Nothing is downloaded: the weights are timm's seeded random initialisation, the photograph is the one that scikit-learn's
package carries. Every image of a batch is another crop of it, flipped or not; large batches repeat their crops.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fpet_kernels import KeyRefinement, Split, checkerboard

__all__ = ["CASES", "Case", "Problem", "crops", "features", "key_of_qkv", "make_problem", "photograph", "require", "seeded_vit"]

HIDDEN = 32  # units of the key refinement, as in the paper's recipe
REPEATS_TO = 16  # at most this many different crops in a batch


@dataclass(frozen=True)
class Case:
    """One ViT at one resolution; merging sits at ``layer``, the middle of the network.

    Attributes:
        model: timm's name. layer: 0-based block. grid: (H, W). dim: D. heads · channels: the key's, C = channels.
        distinct: how many different crops are worth computing here (a ViT-L at 1024 pixels takes a minute of CPU each).
    """

    name: str
    model: str
    image_size: int
    layer: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    dim: int
    heads: int
    distinct: int = REPEATS_TO

    @property
    def channels(self) -> int:
        return self.dim // self.heads

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def split(self) -> Split:
        return checkerboard(*self.grid)

    @property
    def num_merged(self) -> int:
        return self.num_prefix_tokens + self.split.b.numel()


CASES = {
    case.name: case
    for case in (
        Case("vits16_224", "vit_small_patch16_224", 224, 6, (14, 14), 1, 384, 6),
        Case("vitb16_224", "vit_base_patch16_224", 224, 6, (14, 14), 1, 768, 12),
        Case("vitl16_224", "vit_large_patch16_224", 224, 12, (14, 14), 1, 1024, 16, distinct=8),
        Case("dinov2_vitb14_reg_518", "vit_base_patch14_reg4_dinov2", 518, 6, (37, 37), 5, 768, 12, distinct=4),
        Case("vitl16_1024", "vit_large_patch16_224", 1024, 12, (64, 64), 1, 1024, 16, distinct=1),
        Case("tiny", "test_vit", 160, 3, (10, 10), 1, 64, 2, distinct=2),  # for the tests of this benchmark
    )
}


def require(module: str, package: str | None = None) -> ModuleType:
    """Imports ``module``, or says which package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"the benchmark needs {package or module}: pip install {package or module}  ({error})") from error


def photograph_file() -> Path:
    """china.jpg: inside scikit-learn (found without importing it), or carried along in build/gpu (gpu_plan.py)."""
    carried = Path(__file__).parents[2] / "build" / "gpu" / "china.jpg"
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        if carried.exists():
            return carried
        raise SystemExit("the benchmark takes its photograph from scikit-learn: pip install scikit-learn")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "images" / "china.jpg"
    if not path.exists():
        raise SystemExit(f"this scikit-learn carries no {path.name}: pip install --force-reinstall scikit-learn")
    return path


def photograph() -> Tensor:
    """(3, 427, 640) float32 in [0, 1]."""
    image = require("PIL.Image", "pillow")
    numpy = require("numpy")
    with image.open(photograph_file()) as opened:
        return torch.from_numpy(numpy.asarray(opened.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def crops(image: Tensor, count: int, image_size: int, seed: int = 0) -> Tensor:
    """(count, 3, image_size, image_size) in [−1, 1]: seeded square crops of half to all of the height, half of them flipped."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image.shape[-2:]
    out = []
    for index in range(count):
        side = int(height * (0.5 + 0.5 * torch.rand((), generator=generator).item()))
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        patch = image[None, :, top : top + side, left : left + side]
        patch = torch.nn.functional.interpolate(patch, (image_size, image_size), mode="bicubic", antialias=True)
        out.append(patch.flip(-1) if index % 2 else patch)
    return (torch.cat(out).clamp(0, 1) - 0.5) / 0.5


def seeded_vit(case: Case, seed: int = 0) -> torch.nn.Module:
    """The timm model in evaluation mode, cut off behind the block that merges."""
    timm = require("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(case.model, pretrained=False, img_size=case.image_size, depth=case.layer + 1, num_classes=0)
    return model.eval().requires_grad_(False)


def features(model: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What merging gets to see in the last block of ``model``.

    Returns:
        (B, N, D) tokens behind the attention residual, and the (B, N, 3·D) output of the fused qkv layer.
    """
    seen: dict[str, Tensor] = {}
    block = model.blocks[-1]  # type: ignore[union-attr, index]
    hooks = (
        block.attn.qkv.register_forward_hook(lambda _module, _args, out: seen.update(qkv=out)),  # type: ignore[union-attr]
        block.norm2.register_forward_pre_hook(lambda _module, args: seen.update(x=args[0])),  # type: ignore[union-attr]
    )
    try:
        with torch.no_grad():
            model.forward_features(images)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return seen["x"], seen["qkv"]


def key_of_qkv(qkv: Tensor, heads: int) -> Tensor:
    """(B, heads, N, C): the keys, in place, as a strided view of the (B, N, 3·heads·C) qkv buffer."""
    batch, n, _ = qkv.shape
    return qkv.view(batch, n, 3, heads, -1).permute(2, 0, 3, 1, 4)[1]


@dataclass(frozen=True)
class Problem:
    """Everything that one call gets, the same for every implementation.

    Attributes:
        x: (B, N, D). key: (B, heads, N, C) in place in the qkv buffer, or (B, N, C). w_down: (h, C) and w_up: (C, h), or None.
        grad_tokens: (B, M, D) and grad_size: (B, M, 1): upstream gradients. distinct: image i equals image i − distinct.
    """

    case: Case
    x: Tensor
    key: Tensor
    w_down: Tensor | None
    w_up: Tensor | None
    grad_tokens: Tensor
    grad_size: Tensor
    distinct: int

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def refinement(self) -> KeyRefinement | None:
        return None if self.w_down is None or self.w_up is None else KeyRefinement(self.w_down, self.w_up)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the backward differentiates: x, and the refinement's weights where there are any."""
        return tuple(t for t in (self.x, self.w_down, self.w_up) if t is not None)

    def requires_grad_(self, wanted: bool) -> None:
        for leaf in self.leaves:
            leaf.requires_grad_(wanted)

    def bytes_moved(self, forward: bool, backward: bool) -> int:
        """Bytes that must be read or written, each once, for what is timed: the gradients of x and of the refinement's weights.

        The forward reads key and x and writes tokens, sizes, match, runner-up and the mean of the two best scores. The
        backward reads the gradient of the tokens, sizes and match, and writes dx; where there are weights it also reads the
        sources' rows of x, the destinations' of the tokens, what else the forward kept of the match, and the key: as it is
        given, or, behind a forward of its own, the mean over heads in float32, if that is less.
        """
        item, batch = self.x.element_size(), self.batch
        num_a, num_b = self.case.split.a.numel(), self.case.split.b.numel()
        x, tokens, key = self.x.numel() * item, self.grad_tokens.numel() * item, self.key.numel() * self.key.element_size()
        row, sizes = batch * self.case.dim * item, 4 * batch * self.case.num_merged
        match, mid = 8 * batch * num_a, 4 * batch * num_a
        mean = 4 * batch * self.case.num_tokens * self.key.shape[-1]
        moved = 0
        if forward:
            moved += key + x + tokens + sizes + 2 * match + mid
        if backward:
            moved += tokens + sizes + match + x
            if self.w_down is not None:
                moved += row * (num_a + num_b) + match + mid + (min(key, mean) if forward else key)
        return moved

    def result_bytes(self, backward: bool) -> int:
        """Bytes of what a call hands back: tokens, size and match, and with ``backward`` the gradients as well."""
        results = [self.grad_tokens, self.grad_size, *(self.leaves if backward else ())]
        return sum(t.numel() * t.element_size() for t in results) + 8 * self.batch * self.case.split.a.numel()


def _refinement(key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Seeded weights under which no hidden unit of these keys lies at the ReLU's kink, where rounding decides a gradient."""
    channels = key.shape[-1]
    averaged = key.double().mean(1) if key.dim() == 4 else key.double()
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        w_down = ((torch.rand(HIDDEN, channels, generator=generator) * 2 - 1) * (3 / channels) ** 0.5).to(dtype)
        w_up = ((torch.rand(channels, HIDDEN, generator=generator) * 2 - 1) * (3 / HIDDEN) ** 0.5).to(dtype)
        before = averaged @ w_down.double().mT
        if before.abs().min() > 1e-6 * before.square().mean().sqrt():
            return w_down, w_up
    raise RuntimeError("no refinement weights found that keep every hidden unit off the kink of the ReLU")


def make_problem(
    case: Case,
    base: tuple[Tensor, ...],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    refine: bool = True,
    averaged_key: bool = False,
) -> Problem:
    """``batch`` images out of the crops whose features are ``base`` = (x, qkv) in float32 on the CPU."""
    distinct = max(d for d in range(1, base[0].shape[0] + 1) if batch % d == 0 and d <= batch)
    copies = batch // distinct
    x, qkv = (t[:distinct].to(device, dtype).repeat(copies, 1, 1) for t in base)
    key = key_of_qkv(qkv, case.heads)
    if averaged_key:
        key = key.float().mean(1).to(dtype)
    w_down = w_up = None
    if refine:
        w_down, w_up = (w.to(device) for w in _refinement(key[:distinct].cpu(), dtype))
    generator = torch.Generator().manual_seed(1)
    grad_tokens = torch.randn(distinct, case.num_merged, case.dim, generator=generator)
    grad_size = torch.randn(distinct, case.num_merged, 1, generator=generator)
    size_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        case, x, key, w_down, w_up,
        grad_tokens.to(device, dtype).repeat(copies, 1, 1), grad_size.to(device, size_dtype).repeat(copies, 1, 1), distinct,
    )  # fmt: skip
