"""Memory of a training step: counts that can be done by hand, the caching allocator's rules, and the ratios of Table 1."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fpet
from fpet.measure import MIB, SavedTensors, StepMemory, reserved_memory, step_memory
from fpet_kernels import KeyRefinement, bdm_merge

FLOAT = 4


def test_saved_tensors_of_a_small_network_by_hand() -> None:
    batch, dim, hidden, classes = 3, 8, 16, 5
    model = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, classes))
    x, labels = torch.randn(batch, dim), torch.zeros(batch, dtype=torch.long)
    with SavedTensors(model, x, labels) as saved:
        loss = F.cross_entropy(model(x), labels)
    # GELU's input; its output, the second layer's input; log-probabilities; the loss's sum of weights. Not x, not weights.
    assert saved.bytes == FLOAT * (2 * batch * hidden + batch * classes + 1)
    assert saved.now == saved.bytes
    loss.backward()
    del loss
    assert saved.now == 0, "the graph is gone"
    model[0].requires_grad_(False)
    with SavedTensors(model, x, labels) as saved:
        F.cross_entropy(model(x), labels)
    assert saved.bytes == FLOAT * (batch * hidden + batch * classes + 1), "nothing before the first trained layer"


def test_views_count_once_and_the_maximum_stays() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    with SavedTensors(weight) as saved:
        for columns in (6, 2):
            q, k, v = (torch.ones(10, 4) @ weight)[:, :columns].exp().expand(3, -1, -1).unbind()
            loss = (q * k * v).sum()
            del q, k, v
            loss.backward()
            del loss
        # (10, 4) ones; (10, columns) exp, held by exp itself and by both products; (10, columns) of q·k, held by the second.
        assert saved.now == 0
    assert saved.bytes == FLOAT * (10 * 4 + 2 * 10 * 6)


def test_a_fused_merge_counts_what_its_context_holds(fused: str, device: str, max_tokens: int) -> None:
    side, batch, dim, channels = (8 if max_tokens < 100 else 40), 2, 12, 16
    n, a = 1 + side * side, side * side // 2
    x = torch.randn(batch, n, dim, device=device, requires_grad=True)
    key = torch.randn(batch, n, channels, device=device)
    weights = [torch.randn(shape, device=device, requires_grad=True) for shape in ((4, channels), (channels, 4))]
    with SavedTensors(x, key, *weights) as saved:
        merged = bdm_merge(x, key, grid_size=(side, side), refinement=KeyRefinement(*weights), backend=fused)
    context = merged.tokens.grad_fn.saved_tensors
    known = {t.untyped_storage().data_ptr() for t in (x, key, *weights)}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in context if t is not None}
    assert saved.bytes == sum(size for at, size in own.items() if at not in known)
    least = FLOAT * merged.tokens.numel() + 8 * merged.match.numel()
    assert least <= saved.bytes < least + FLOAT * batch * (n + 4 * a + 64)
    merged.tokens.sum().backward()


def tiny(layer: int | None = None, device: str = "cpu", **arguments: Any) -> nn.Module:
    with torch.device(device):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
        )
        fpet.add_adapters(model, "adaptformer", **arguments)
        fpet.apply(model, layer, refinement=None if layer is None else True)
    return fpet.freeze(model).train()


def measure(model: nn.Module, batch: int, size: int = 64, **arguments: Any) -> StepMemory:
    device = next(model.parameters()).device
    images = torch.zeros(batch, 3, size, size, device=device)
    return step_memory(model, images, torch.zeros(batch, dtype=torch.long, device=device), **arguments)


def test_a_step_counts_every_part() -> None:
    model = tiny(2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    found = measure(model, 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.parameters == FLOAT * sum(p.numel() for p in model.parameters())
    assert found.gradients == FLOAT * sum(p.numel() for p in trained)
    assert found.optimizer == 2 * found.gradients + FLOAT * len(trained), "two moments, and a count of steps each"
    assert found.inputs == FLOAT * 3 * 3 * 64 * 64 + 3 * 8
    fixed = found.parameters + found.buffers + found.optimizer + found.inputs
    assert fixed + found.saved < found.peak < 2 * found.held
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    assert measure(model, 3, optimizer=optimizer).optimizer == 0
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "an optimiser that is given takes its step"


def test_memory_is_counted_without_computing() -> None:
    """On the meta device the same as on the CPU, for attention that has no kernel of its own on either."""
    set_fused_attn(False)
    try:
        for layer in (None, 2):
            real, unreal = measure(tiny(layer), 4), measure(tiny(layer, "meta"), 4)
            assert unreal[:5] == real[:5]
            assert unreal.saved == pytest.approx(real.saved, rel=0.01)  # backends differ in what a merge keeps
            assert unreal.peak == pytest.approx(real.peak, rel=0.02)
    finally:
        set_fused_attn(True)


def test_saved_bytes_are_linear_in_the_batch() -> None:
    one, two, four = (measure(tiny(2), batch).saved for batch in (1, 2, 4))
    assert four - two == 2 * (two - one)


def test_checkpointing_lowers_the_peak() -> None:
    model = tiny()
    plain = measure(model, 8)
    model.set_grad_checkpointing(True)
    saving = measure(model, 8)
    assert saving.peak < plain.peak
    assert saving.saved < plain.saved


def test_the_peak_sees_what_is_freed_and_what_a_checkpoint_recomputes() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            def inner(x: Tensor) -> Tensor:
                return x.repeat(1, 1, 1, 64).sin().mean((2, 3))

            pooled = checkpoint(inner, images, use_reentrant=False)
            assert isinstance(pooled, Tensor)
            return self.layer(pooled)

    found = measure(Wide(), 2, size=8)
    image = FLOAT * 2 * 3 * 8 * 8
    assert found.saved < image
    assert found.peak > 2 * 64 * image, "the wide map and its sine are alive at once"


def test_nothing_is_left_behind() -> None:
    model = tiny(2)
    measure(model, 2)
    gc.collect()
    before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    measure(model, 2)
    gc.collect()
    assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) <= before


def test_nothing_to_train_is_refused() -> None:
    for measured in (measure, reserved):
        with pytest.raises(ValueError, match="model: expected parameters that require a gradient, got none"):
            measured(tiny().requires_grad_(False), 1)


# --- what the allocator takes ------------------------------------------------------------------------------------------


def reserved(model: nn.Module, batch: int, size: int = 64, **arguments: Any) -> int:
    device = next(model.parameters()).device
    images = torch.zeros(batch, 3, size, size, device=device)
    return reserved_memory(model, images, torch.zeros(batch, dtype=torch.long, device=device), **arguments)


def test_reserved_memory_holds_the_tensors_of_all_steps() -> None:
    for layer in (None, 2):
        peak, *taken = measure(tiny(layer, "meta"), 512).peak, *(reserved(tiny(layer, "meta"), 512, steps=k) for k in (1, 3, 5))
        assert peak < taken[0] <= taken[1] == taken[2] < 1.4 * peak, "it settles"


def test_reserved_memory_leaves_everything_as_it_was() -> None:
    model = tiny(2)
    before, state = {n: p.detach().clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    assert reserved(model, 2) > 0
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state) and gc.isenabled()


def test_reserved_memory_of_one_layer_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 512, 2048, bias=False))
    # 12 MiB each: the weight, its gradient, AdamW's two moments, and two that its step makes and frees.
    images, labels = torch.zeros(1, 3, 16, 32), torch.zeros(1, dtype=torch.long)
    assert reserved_memory(model, images, labels) == 6 * 12 * MIB + 2 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reserved_memory_is_what_the_allocator_says() -> None:
    for layer in (None, 6):
        simulated, real = (reserved(vit_base("adaptformer", layer, device), 16, 224) for device in ("meta", "cuda"))
        assert simulated == pytest.approx(real, rel=0.05)


# --- Table 1 -------------------------------------------------------------------------------------------------------------

# Training memory of ViT-B/16 at batch 64 in GB: plain, with FPET. As a public summary of the paper quotes Table 1.
PUBLISHED = {"adaptformer": (7.6, 6.2), "bi-adaptformer": (7.6, 6.2), "lora": (8.4, 7.1)}
PUBLISHED_FULL = 11.9
# MiB counted here: saved and at the peak, plain and with FPET.
COUNTED = {
    "adaptformer": ((5034, 3692), (5659, 4188)),
    "bi-adaptformer": ((5083, 3730), (5708, 4229)),
    "lora": ((5818, 4383), (6445, 4881)),
}


@pytest.fixture
def dense_attention() -> Iterator[None]:
    """Attention as the authors' environment (timm 0.4.12) has it: the attention matrix is kept."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("method", PUBLISHED)
def test_tensors_shrink_by_more_than_table_1_says(method: str, dense_attention: None) -> None:
    """By 9 to 10 %, and the authors' own code does, too: it keeps as much without merging, and 0.3 % more with it."""
    plain, merged = (measure(vit_base(method, layer), 64, 224) for layer in (None, 6))
    saved, peak = COUNTED[method]
    assert (plain.saved / MIB, merged.saved / MIB) == pytest.approx(saved, rel=1e-3)
    assert (plain.peak / MIB, merged.peak / MIB) == pytest.approx(peak, rel=1e-3)
    published_plain, published_merged = PUBLISHED[method]
    assert 0.89 < merged.peak / plain.peak / (published_merged / published_plain) < 0.92


@functools.cache
def room_for_a_context() -> float:
    """GB that Table 1's row of full tuning, which nothing else here uses, leaves beside the allocator's."""
    return PUBLISHED_FULL - reserved(vit_base("full", None), 64, 224) / 1e9


@pytest.mark.parametrize("method", PUBLISHED)
def test_table_1_is_what_the_allocator_takes_and_one_context(method: str, dense_attention: None) -> None:
    assert 1.0 < room_for_a_context() < 1.5
    plain, merged = (reserved(vit_base(method, layer), 64, 224) / 1e9 + room_for_a_context() for layer in (None, 6))
    published_plain, published_merged = PUBLISHED[method]
    assert (plain, merged) == pytest.approx(PUBLISHED[method], rel=0.05)
    assert merged / plain == pytest.approx(published_merged / published_plain, rel=0.05)


def vit_base(method: str, layer: int | None, device: str = "meta") -> nn.Module:
    with torch.device(device):
        model = timm.create_model("vit_base_patch16_224", num_classes=100, drop_path_rate=0.1)
        fpet.add_adapters(model, method)
        fpet.apply(model, layer, refinement=None if layer is None else True)
    return fpet.freeze(model).train()


@pytest.mark.parametrize(("method", "ratio"), [("adaptformer", 0.771), ("lora", 0.756)])
def test_ratio_of_saved_tensors_with_fused_attention(method: str, ratio: float) -> None:
    """Fused attention keeps no attention matrix. Real tensors, ViT-B/16 in full width, batch 1."""
    saved = []
    for layer in (None, 6):
        model = vit_base(method, layer).to_empty(device="cpu")
        with SavedTensors(model) as counted:
            model(torch.zeros(1, 3, 224, 224))
        saved.append(counted.bytes)
    assert saved[1] / saved[0] == pytest.approx(ratio, abs=0.01)
