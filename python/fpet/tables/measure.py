"""What one combination of backbone, tuning method and token reduction costs, on this machine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from .. import comparators
from ..adapters import add_adapters, fold
from ..adapters.folding import folds
from ..adapters.freezing import freeze
from ..comparators.ltmp import PENALTY
from ..measure.flops import flop_counter
from ..measure.memory import reserved_memory, step_memory
from ..measure.timing import Call
from ..vit.models import merged_features

__all__ = [
    "MODELS", "Backbone", "Variant", "backbone", "build", "complaint", "forward_call", "gmac", "inputs", "reserved_bytes",
    "step_call", "training_bytes",
]  # fmt: skip

CLASSES = 100  # of CIFAR-100, the first of the VTAB tasks
DROP_PATH = 0.1  # of the paper's recipe; acts in training alone


class Backbone(NamedTuple):
    """Attributes: title; timm_name; image_size, pixels along each side; depth, blocks; tag of the weights that are tuned."""

    title: str
    timm_name: str
    image_size: int
    depth: int
    tag: str


MODELS = {
    "vits16": Backbone("ViT-S/16", "vit_small_patch16_224", 224, 12, "augreg_in21k"),
    "vitb16": Backbone("ViT-B/16", "vit_base_patch16_224", 224, 12, "augreg_in21k"),
    "vitl16": Backbone("ViT-L/16", "vit_large_patch16_224", 224, 24, "augreg_in21k"),
    "deits16": Backbone("DeiT-S/16", "deit_small_patch16_224", 224, 12, "fb_in1k"),
    "deitb16": Backbone("DeiT-B/16", "deit_base_patch16_224", 224, 12, "fb_in1k"),
    "tiny": Backbone("timm's test_vit", "test_vit", 160, 6, "r160_in1k"),
}


@dataclass(frozen=True)
class Variant:
    """A row of a table. Attributes: model, of MODELS; method; reduction; layer that reduces, None where none or all do;
    hidden_dim, None for the method's own."""

    model: str
    method: str
    reduction: str
    layer: int | None = None
    hidden_dim: int | None = None

    @property
    def key(self) -> tuple[str, str, str, int | None]:
        """All but hidden_dim."""
        return self.model, self.method, self.reduction, self.layer

    @property
    def plain(self) -> Variant:
        """The same method with every token kept: what ratios are taken to."""
        return Variant(self.model, self.method, "none", None, self.hidden_dim)

    def __str__(self) -> str:
        where = "" if self.layer is None else f" at {self.layer}"
        width = "" if self.hidden_dim is None else f" of width {self.hidden_dim}"
        return f"{MODELS[self.model].title}, {self.method}{width}, {self.reduction}{where}"


# --- models ------------------------------------------------------------------------------------------------------------


def backbone(name: str, device: torch.device, attention: str = "fused") -> nn.Module:
    """The model that all variants of one backbone start from: timm's architecture, seeded random weights.

    Args:
        attention: "fused" for scaled_dot_product_attention; "plain" for attention that keeps its N × N matrices, as the
            timm release did that the paper's code is written for.
    """
    spec = MODELS[name]
    unreal = device if device.type == "meta" else nullcontext()  # elsewhere weights are drawn on the CPU, the same for all
    with torch.random.fork_rng(devices=[]), unreal:
        torch.manual_seed(0)
        model: Any = timm.create_model(
            spec.timm_name, pretrained=False, img_size=spec.image_size, num_classes=CLASSES, drop_path_rate=DROP_PATH
        )
    for block in model.blocks:
        block.attn.fused_attn = attention == "fused"
    return model.to(device).eval()


def build(base: nn.Module, variant: Variant, *, training: bool, share: bool = True) -> nn.Module:
    """``base`` with the variant's adapters and reduction; for training, with what is not tuned frozen.

    For inference, methods that are linear are folded into the weights, as they would be served.

    Args:
        share: weights that are not trained stay in base's memory; otherwise all are copied.
    """
    folded = not training and folds(variant.method)
    memo: dict[int, Any] = {}
    for p in base.parameters():  # parameters of its own, as each variant trains others
        memo[id(p)] = nn.Parameter(p.data if share and not folded else p.data.clone())
    model = copy.deepcopy(base, memo)
    add_adapters(model, variant.method, hidden_dim=variant.hidden_dim)
    comparators.apply_reduction(model, variant.reduction, variant.layer)
    if not training:
        model.eval()
        if folded:
            fold(model)
            if share:  # a fold changes values, which no time depends on, and may add biases
                for name, p in base.named_parameters():
                    model.get_parameter(name).data = p.data
        return model.requires_grad_(False)
    freeze(model)
    if share:
        theirs = {p.data_ptr() for p in base.parameters()}
        for p in model.parameters():
            if p.requires_grad and p.data_ptr() in theirs:
                p.data = p.data.clone()
    return model.train()


@torch.no_grad()
def complaint(model: nn.Module, variant: Variant, image: Tensor) -> str | None:
    """Why an inference model must not be timed: logits that are no numbers, or tokens that got lost; None if it is right."""
    if not model(image).isfinite().all():
        return f"{variant}: its logits are not finite"
    if variant.reduction in ("none", "ltmp"):  # LTMP throws tokens away on purpose
        return None
    found = merged_features(model, image)
    counted, before = found.size.sum(1).flatten().tolist(), found.source.shape[1]
    if any(round(n) != before for n in counted):
        return f"{variant}: its sizes sum to {counted}, not to {before} tokens"
    return None


def forward_call(model: nn.Module, images: Tensor, amp: bool = False) -> Call:
    """A forward without gradients."""

    def call() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            model(images)

    return call


def step_call(model: nn.Module, images: Tensor, labels: Tensor, amp: bool = False) -> Call:
    """A step of tuning: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)
    target = comparators.flops_target(model)

    def call() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            out, spent = (model(images), None) if target is None else model(images, with_flops=True)
        loss = F.cross_entropy(out.float(), labels)
        if spent is not None:
            loss = loss + PENALTY * (spent - target) ** 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


# --- FLOPs and memory ----------------------------------------------------------------------------------------------------


@contextmanager
def _nothing_computed(model: nn.Module) -> Iterator[nn.Module]:
    """``model``, made on the device "meta", on a CPU that only keeps books: shapes, dtypes and storages, no data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to_empty(device="cpu")


@contextmanager
def _step_not_computed(variant: Variant, batch: int, attention: str) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Model, images and labels of a step of tuning, under :func:`_nothing_computed`."""
    side, base = MODELS[variant.model].image_size, backbone(variant.model, torch.device("meta"), attention)
    with _nothing_computed(build(base, variant, training=True)) as model:
        yield model, torch.empty(batch, 3, side, side), torch.empty(batch, dtype=torch.long)


def gmac(variant: Variant) -> float:
    """10⁹ multiply-adds of the forward of one image: half of the FLOPs that :func:`fpet.measure.flops.flop_counter` counts."""
    base, side = backbone(variant.model, torch.device("meta")), MODELS[variant.model].image_size
    counter = flop_counter()
    try:
        with _nothing_computed(build(base, variant, training=False)) as model, counter, torch.no_grad():
            model(torch.empty(1, 3, side, side))
    except DynamicOutputShapeException:  # how many tokens stay depends on the image
        counter = flop_counter()
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        real = build(backbone(variant.model, torch.device("cpu")), variant, training=False)
        with counter, torch.no_grad():
            real(image)
    return float(counter.get_total_flops()) / 2e9


def training_bytes(
    variant: Variant, batch: int, device: torch.device, attention: str = "fused", amp: bool = False
) -> tuple[int, str]:
    """The most memory that a step of tuning takes at ``batch`` images, weights and AdamW's state included, and how that was
    found: on CUDA by PyTorch's allocator; elsewhere counted by :mod:`fpet.measure.memory`, without computing.
    """
    side = MODELS[variant.model].image_size
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        model = build(backbone(variant.model, device, attention), variant, training=True)
        images, labels = inputs(side, batch, device)
        return step_memory(model, images, labels, amp=amp).peak - before, "peak of PyTorch's allocator"
    try:
        with _step_not_computed(variant, batch, attention) as step:
            return step_memory(*step, amp=amp).peak, "storages alive at once, counted"
    except DynamicOutputShapeException:
        # Indices are computed from values, so they have to be; bytes grow by as much with each further image.
        model = build(backbone(variant.model, device, attention), variant, training=True)
        two, four = (step_memory(model, *inputs(side, count, device), amp=amp).peak for count in (2, 4))
        return two + (batch - 2) * (four - two) // 2, "storages alive at once, counted at 2 and 4 images, extrapolated"


def reserved_bytes(
    variant: Variant, batch: int, device: torch.device, attention: str = "fused", amp: bool = False
) -> tuple[int, str]:
    """What PyTorch's caching allocator takes from a GPU for steps of tuning, and how that was found: on CUDA by asking it, of
    the whole process; elsewhere by simulation, without computing.
    """
    if device.type == "cuda":
        model = build(backbone(variant.model, device, attention), variant, training=True)
        images, labels = inputs(MODELS[variant.model].image_size, batch, device)
        return reserved_memory(model, images, labels, amp=amp), "PyTorch's allocator"
    with _step_not_computed(variant, batch, attention) as step:
        return reserved_memory(*step, amp=amp), "PyTorch's allocator, simulated"


def inputs(side: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeded noise (batch, 3, side, side), and labels."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, side, side, generator=g).to(device), torch.arange(batch, device=device) % CLASSES
