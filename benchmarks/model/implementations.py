"""The models that are compared, what is timed of each, and the gate that they must pass first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpet
from fpet.measure.flops import flop_counter
from fpet.vit.block import FPETBlock
from fpet_kernels import Merged
from harness.options import DTYPES
from harness.run import compile_whole

from .tome import ToMeBlock, ToMeStep


@dataclass(frozen=True)
class Model:
    """timm's name, pixels along each side, and the block that merges: the middle one, as in the paper."""

    timm_name: str
    image_size: int
    layer: int


MODELS = {
    "vits16": Model("vit_small_patch16_224", 224, 6),
    "vitb16": Model("vit_base_patch16_224", 224, 6),
    "vitl16": Model("vit_large_patch16_224", 224, 12),
    "deitb_distilled": Model("deit_base_distilled_patch16_224", 224, 6),
    "dinov2_vitb14_reg": Model("vit_base_patch14_reg4_dinov2", 518, 6),
    "tiny": Model("test_vit", 160, 3),  # for the tests of this benchmark
}
MODES = ("inference", "training")
TIMM, FPET, TOME = IMPLEMENTATIONS = ("timm", "fpet", "tome")
CLASSES, HIDDEN = 100, 8
GATE_IMAGES = 2


@dataclass(frozen=True)
class Setting:
    """One group of rows."""

    model: str
    batch: int
    dtype: str
    mode: str

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}, {self.mode}"


def seeded(spec: Model, setting: Setting, device: torch.device) -> nn.Module:
    """The model that all implementations start from; for training with AdaptFormer in it, and the rest frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(spec.timm_name, pretrained=False, img_size=spec.image_size, num_classes=CLASSES)
        if setting.training:
            fpet.add_adapters(model, "adaptformer", hidden_dim=HIDDEN)
            fpet.freeze(model)
        else:
            model.requires_grad_(False)
    dtype = torch.float32 if setting.training else DTYPES[setting.dtype]
    return model.to(device, dtype).train(setting.training)


def implementation(name: str, base: nn.Module, layer: int) -> nn.Module:
    """``base`` with what ``name`` changes; all share the weights.

    Raises:
        RuntimeError: some attention does not go through scaled_dot_product_attention.
    """
    model: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if name != TIMM:
        fpet.apply(model, layer=layer, refinement=name == FPET)
        if not model.training:
            model.requires_grad_(False)
    if name == TOME:
        block = model.blocks[layer]
        if type(block) is not FPETBlock:
            raise TypeError(f"tome: expected a {FPETBlock.__name__}, got {type(block).__name__}")
        block.__class__ = ToMeBlock
    unfused = [path for path, module in model.named_modules() if getattr(module, "fused_attn", True) is False]
    if unfused:
        raise RuntimeError(f"expected scaled_dot_product_attention everywhere, not in {unfused[0]}: unset TIMM_FUSED_ATTN")
    return model


def step(model: nn.Module, run: Callable[..., Any], images: Tensor, labels: Tensor, setting: Setting) -> Callable[[], object]:
    """What is timed of ``model``, called as ``run``: a forward, or a step of training."""
    if not setting.training:

        def forward() -> object:
            with torch.no_grad():
                return run(images)

        return forward
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)

    def train() -> None:
        with autocast(images.device, setting):
            out = run(images)
        loss_of(out, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def loss_of(out: Any, labels: Tensor) -> Tensor:
    """Cross entropy; the mean over both heads of a distilled model."""
    heads = out if isinstance(out, tuple) else (out,)
    return torch.stack([F.cross_entropy(logits.float(), labels) for logits in heads]).mean()


def autocast(device: torch.device, setting: Setting) -> Any:
    reduced = setting.training and setting.dtype != "float32"
    return torch.autocast(device.type, DTYPES[setting.dtype]) if reduced else nullcontext()


# --- merging by itself -------------------------------------------------------------------------------------------------


def captured(model: Any, layer: int, images: Tensor, setting: Setting) -> tuple[Any, Tensor, Tensor]:
    """What merging gets in one forward: the step, x (B, N, D) and the key (B, heads, N, C), in place in the qkv buffer."""
    seen: dict[str, Any] = {}

    @dataclass
    class Spy:
        step: Any

        def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
            seen.update(step=self.step, x=x.detach(), key=key.detach())
            return self.step.merge(x, key, refinement)

    block = model.blocks[layer]
    tome = isinstance(block, ToMeBlock)

    def hook(_block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "merge": Spy(ToMeStep(*kwargs["merge"]) if tome else kwargs["merge"])}

    block.__class__ = FPETBlock  # the spy hands ToMe's step over itself
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), autocast(images.device, setting):
            model(images)
    finally:
        handle.remove()
        block.__class__ = ToMeBlock if tome else FPETBlock
    return seen["step"], seen["x"], seen["key"]


def merging_call(
    model: Any, layer: int, images: Tensor, setting: Setting, compiled: bool
) -> tuple[Callable[[], object], tuple[int, int]]:
    """The merging of one block as it is called there, in training with its backward; and the tokens before and after."""
    merge_step, x, key = captured(model, layer, images, setting)
    refinement = getattr(model.blocks[layer], "refinement", None)

    def merge(x: Tensor, key: Tensor) -> Merged:
        return merge_step.merge(x, key, refinement)

    run = compile_whole(merge) if compiled else merge
    with torch.no_grad():
        tokens, size, _ = merge(x, key)
    left = tokens.shape[1]
    if not setting.training:

        def forward() -> object:
            with torch.no_grad():
                return run(x, key)

        return forward, (x.shape[1], left)
    x.requires_grad_()
    weights = [] if refinement is None else [p for p in refinement.parameters() if p.requires_grad]
    upstream = torch.randn_like(tokens), torch.randn_like(size)

    def both() -> object:
        with autocast(images.device, setting):
            tokens, size, _ = run(x, key)
        pairs = [(out, grad) for out, grad in zip((tokens, size), upstream, strict=True) if out.requires_grad]
        return torch.autograd.grad([out for out, _ in pairs], [x, *weights], [grad for _, grad in pairs])

    return both, (x.shape[1], left)


# --- gate --------------------------------------------------------------------------------------------------------------


def complaint(name: str, model: Any, base: nn.Module, layer: int, images: Tensor, setting: Setting) -> str | None:
    """Why ``model`` must not be timed; None if it is right. Leaves it as it was."""
    if name == TIMM:
        return None
    images = images[:GATE_IMAGES]
    try:
        with torch.no_grad(), autocast(images.device, setting):
            model.eval()
            base.eval()
            expected, found = base(images), fpet.merged_features(model, images)
            n = found.source.shape[1]
            if not torch.equal(found.size.sum(1).round(), torch.full_like(found.size[:, 0], n)):
                return f"sizes sum to {found.size.sum(1).flatten().tolist()}, not to {n} tokens"
            with fpet.merged(model, layer=None):
                plain = model(images)
            if name == FPET:
                with fpet.merged(model, layer=layer, backend="reference"):
                    source = fpet.merged_features(model, images).source
                differing = (source != found.source).float().mean().item()
                if differing > 0.02:  # near ties may fall either way
                    return f"{100 * differing:.1f} % of the tokens are merged elsewhere than the reference merges them"
    finally:
        model.train(setting.training)
        base.train(setting.training)
    error = (plain.float() - expected.float()).abs().max() / expected.float().abs().max()
    allowed = 8 * torch.finfo(DTYPES[setting.dtype]).eps ** (0.5 if setting.dtype == "float32" else 1.0)
    return None if error <= allowed else f"with merging off its logits differ from timm's by {error:.2g} of the largest"


def flops(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting) -> int:
    """Of one image: the forward, in training also the backward."""
    with flop_counter() as counter, autocast(images.device, setting), torch.set_grad_enabled(setting.training):
        out = model(images[:1])
        if setting.training:
            loss_of(out, labels[:1]).backward()
    model.zero_grad()
    return int(counter.get_total_flops())
