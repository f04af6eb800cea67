"""What others do to a model that merges: hooks, forwards of their own, wrappers, tracers, loops over blocks, other tokens."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fpet
from fpet import comparators
from fpet.vit.merging import MergeStep, kept_positions, merge_splits

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
FAMILIES = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "vit_relpos_small_patch16_224")


def build(name: str = "vit_tiny_patch16_224", **arguments: object) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **(TINY | arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.2))
    return model


def images(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_hooks_see_and_change_the_tokens_of_every_block(name: str) -> None:
    model = fpet.apply(build(name), layer=(1, 2))
    seen: list[tuple[type, int]] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: seen.append((type(out), out.shape[1]))) for b in model.blocks]
    before = model(images())
    prefix = model.num_prefix_tokens
    assert seen == [(torch.Tensor, prefix + n) for n in (16, 8, 4, 4)]
    for handle in handles:
        handle.remove()
    model.blocks[1].register_forward_hook(lambda _m, _a, out: out + torch.linspace(0, 1, out.shape[-1]))
    assert not torch.equal(model(images()), before)


@torch.no_grad()
def test_hooks_on_a_comparators_block_see_tokens() -> None:
    model = comparators.apply_reduction(build(), "tome", r=3)
    seen: list[type] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _a, out: seen.append(type(out)))
    model(images())
    assert seen == [torch.Tensor] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_hook_on_the_merging_block(reentrant: bool) -> None:
    """The gradient at the sizes, which only later attention makes, reaches the refinement through a recomputed block."""
    from timm.layers import set_reentrant_ckpt

    model = fpet.apply(build(), layer=1, refinement={"dropout": 0.0})
    model.blocks[1].register_forward_hook(lambda _m, _a, out: out.mul(1.5))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(images()).square().sum().backward()
        return [p.grad.clone() for p in model.blocks[1].refinement.parameters()]

    plain = gradients()
    assert all(g.abs().max() > 0 for g in plain)
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        torch.testing.assert_close(gradients(), plain)
    finally:
        set_reentrant_ckpt(False)


# --- loops by hand ----------------------------------------------------------------------------------------------------


def loop(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        x = block(x)
    return model.forward_head(model.norm(x))


@torch.no_grad()
def test_a_loop_over_blocks_is_timms_or_says_that_it_would_not_merge() -> None:
    model = build()
    before = loop(model, images())
    assert torch.equal(loop(fpet.apply(model), images()), before)
    assert torch.equal(loop(fpet.add_adapters(copy.deepcopy(model), "adaptformer"), images()), before)
    fpet.apply(model, layer=1)
    with pytest.raises(RuntimeError, match=r"blocks\.1: it merges tokens, and was called outside of its model"):
        loop(model, images())
    with fpet.merged(model, None):
        assert torch.equal(loop(model, images()), before)
    with pytest.raises(RuntimeError, match=r"blocks\.1"):
        loop(model, images())
    merged = model.blocks[1](torch.randn(2, 17, 32), merge=MergeStep(merge_splits(4, 4, 1)[0], None))
    assert merged.tokens.shape == (2, 9, 32) and merged.match.shape == (2, 8)
    assert torch.equal(loop(fpet.remove(model), images()), before)
    comparators.apply_reduction(model, "tome", r=3)
    with pytest.raises(RuntimeError, match=r"blocks\.0"):
        loop(model, images())
    comparators.remove_reduction(model)
    assert torch.equal(loop(model, images()), before)


# --- forwards of one's own --------------------------------------------------------------------------------------------


def attention_map_recipe(attention: Any) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = attention.qkv(x).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attention.map = (q @ k.mT * attention.scale).softmax(-1)
        return attention.proj((attention.map @ v).transpose(1, 2).reshape(b, n, c))

    return forward


@pytest.mark.parametrize("first", [True, False], ids=["before apply", "after apply"])
@torch.no_grad()
def test_a_replaced_forward_works_where_nothing_new_is_asked_of_it(first: bool) -> None:
    def patched(layer: int | None, replaced: int, **settings: Any) -> Any:
        model = build()
        if not first:
            fpet.apply(model, layer, **settings)
        model.blocks[replaced].attn.forward = attention_map_recipe(model.blocks[replaced].attn)
        return fpet.apply(model, layer, **settings) if first else model

    for layer, replaced in ((None, 3), (2, 0), (2, 1)):
        torch.testing.assert_close(patched(layer, replaced)(images()), fpet.apply(build(), layer)(images()))
        assert patched(layer, replaced)(images()) is not None
    torch.testing.assert_close(
        patched(1, 3, proportional_attention=False)(images()), fpet.apply(build(), 1, proportional_attention=False)(images())
    )
    with pytest.raises(RuntimeError, match=r"FPETAttention of blocks\.3: .* without the argument 'sizes'"):
        patched(1, 3)(images())
    with pytest.raises(RuntimeError, match=r"FPETAttention of blocks\.1: .* without the argument 'with_key'"):
        patched(1, 1)(images())
    model = fpet.apply(build(), 1)
    model.blocks[1].forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"blocks\.1: .* without the argument 'merge'"):
        model(images())


@torch.no_grad()
def test_a_replaced_forward_that_knows_the_sizes_is_called_with_them() -> None:
    model = fpet.apply(build(), 1)
    expected, own = model(images()), model.blocks[3].attn.forward
    seen = []

    def forward(x: torch.Tensor, *, sizes: Any = None, **arguments: Any) -> torch.Tensor:
        seen.append(sizes.log_size.exp().sum().item())
        return own(x, sizes=sizes, **arguments)

    model.blocks[3].attn.forward = forward
    assert torch.equal(model(images()), expected) and seen == [pytest.approx(34)]


@pytest.mark.parametrize("first", [True, False], ids=["hooked before apply", "hooked after apply"])
@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_accelerates_hooks(first: bool, offload: bool) -> None:
    accelerate = pytest.importorskip("accelerate")

    def hooked(model: Any) -> Any:
        if offload:
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
        return model

    refinement = {"bits": 32, "dropout": 0.0}
    expected = fpet.apply(build(), 1, refinement=refinement)
    weights = expected.blocks[1].refinement.state_dict()
    model = build()
    if first:
        hooked(model)
    fpet.apply(model, 1, refinement=refinement)
    model.blocks[1].refinement.load_state_dict(weights)
    if not first:
        hooked(model)
    torch.testing.assert_close(model(images()), expected(images()))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    if not offload:
        torch.testing.assert_close(fpet.remove(model)(images()), build()(images()))


# --- wrappers ---------------------------------------------------------------------------------------------------------


class Engine(nn.Module):
    """As frameworks have it: the wrapped model is not outermost."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_new_parameters_are_refused_wherever_a_wrapper_is(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def sharded_blocks() -> nn.Module:
            model = build()
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            return model

        def wrapped_blocks() -> nn.Module:
            model = build()
            model.blocks[2] = FullyShardedDataParallel(model.blocks[2], device_id=torch.device("cpu"))
            return model

        def inside() -> nn.Module:
            alive.append(DistributedDataParallel(Engine(build())))
            return alive[-1].module.net

        alive: list[Any] = []
        for make in (
            lambda: DistributedDataParallel(build()), lambda: Engine(DistributedDataParallel(build())),
            lambda: Engine(DataParallel(build())), lambda: nn.Sequential(Engine(DataParallel(build()))),
            lambda: fully_shard(build(), mesh=mesh), sharded_blocks, lambda: Engine(sharded_blocks()), wrapped_blocks, inside,
        ):  # fmt: skip
            model = make()
            state = {name: p.shape for name, p in model.named_parameters()}
            for change in (
                lambda m: fpet.apply(m, layer=1, refinement=True),
                lambda m: fpet.add_adapters(m, "lora"),
            ):
                with pytest.raises(TypeError, match="before"):
                    change(model)
                assert {name: p.shape for name, p in model.named_parameters()} == state
    finally:
        dist.destroy_process_group()


# --- tracers ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_jit_trace_serves_other_batch_sizes(name: str) -> None:
    model = fpet.apply(build(name), layer=(1, 2), refinement=True)
    traced = torch.jit.trace(model, images(1))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        torch.testing.assert_close(program(images(3)), model(images(3)))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fx_feature_extraction_works_as_unpatched_or_says_what_does(name: str) -> None:
    features = pytest.importorskip("torchvision.models.feature_extraction")
    from timm.models._features_fx import create_feature_extractor

    for extractor in (features.create_feature_extractor, create_feature_extractor):
        model = build(name)
        expected = extractor(model, {"blocks.2": "a"})(images())["a"]
        assert torch.equal(extractor(fpet.apply(model), {"blocks.2": "a"})(images())["a"], expected)
        with pytest.raises(TypeError, match=r"torch\.fx can't follow a model that merges"):
            extractor(fpet.apply(model, layer=1), {"blocks.2": "a"})


@pytest.mark.parametrize("arguments", [{}, {"global_pool": "avg"}, {"name": "vit_small_patch14_reg4_dinov2"}], ids=str)
@torch.no_grad()
def test_export_with_symbolic_height_and_width(arguments: dict[str, Any]) -> None:
    model = fpet.apply(build(**arguments, dynamic_img_size=True), layer=1)
    batch, height, width = (torch.export.Dim(n, min=1, max=9) for n in ("batch", "height", "width"))
    shapes = ({0: batch, 2: 8 * height, 3: 8 * width},)
    program = torch.export.export(model, (images(2, 48, 64),), dynamic_shapes=shapes)
    for size in ((1, 48, 64), (3, 32, 40), (2, 56, 24), (2, 40, 40)):
        torch.testing.assert_close(program.module()(images(*size)), model(images(*size)))
    with pytest.raises(ValueError, match="expected one layer where height and width of the images are symbolic, got 2"):
        torch.export.export(fpet.apply(model, layer=(1, 2)), (images(2, 48, 64),), dynamic_shapes=shapes)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (4, 6), (5, 4), (7, 7)])
def test_positions_of_a_symbolic_grid_are_those_of_the_table(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = kept_positions(height, width, 1, 3, torch.device("cpu"))
    monkeypatch.setattr("fpet.vit.merging._symbolic", lambda *sides: True)
    assert torch.equal(kept_positions(height, width, 1, 3, torch.device("cpu")), table)


@torch.no_grad()
def test_without_merging_timms_own_code_runs() -> None:
    """Also what only timm's has: hooks on the blocks as a whole, and whatever a later timm does."""
    for name in FAMILIES:
        model = build(name)
        before = model(images()), model.forward_features(images()), model.forward_intermediates(images())
        model = fpet.apply(model)
        seen: list[str] = []
        model.blocks.register_forward_hook(lambda *_, seen=seen: seen.append("all"))
        after = model(images()), model.forward_features(images()), model.forward_intermediates(images())
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True))
        assert len(seen) == (0 if name.startswith(("beit", "vit_relpos", "vit_small_patch16_dinov3")) else 2)


@torch.no_grad()
def test_threads_share_a_hooked_model() -> None:
    model = fpet.apply(build(), layer=(0, 2))
    model.blocks[0].register_forward_hook(lambda _m, _a, out: out * 2)
    expected = [model(images(b)) for b in (1, 2, 3)]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(10) if not torch.equal(model(images(i + 1)), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- tokens that are not the grid -------------------------------------------------------------------------------------


def overlapping_patches(model: Any) -> None:
    model.patch_embed.proj.stride = (4, 4)  # 7 × 7, where grid_size still says 4 × 4
    model.pos_embed = nn.Parameter(torch.randn(1, 50, 32))


def prompts_behind(model: Any) -> None:
    model.norm_pre.register_forward_hook(lambda _m, _a, out: torch.cat((out, out.new_ones(len(out), 3, 32)), dim=1))


def prompts_at_the_merge(model: Any) -> None:
    model.blocks[1].register_forward_pre_hook(lambda _m, a: (torch.cat((a[0], a[0].new_ones(len(a[0]), 3, 32)), dim=1),))


def patches_dropped(model: Any) -> None:
    model.norm_pre.register_forward_hook(lambda _m, _a, out: out[:, :-4])


@pytest.mark.parametrize(
    ("change", "count"), [(overlapping_patches, 50), (prompts_behind, 20), (prompts_at_the_merge, 20), (patches_dropped, 13)]
)
@torch.no_grad()
def test_tokens_off_the_grid_are_refused_with_both_numbers(change: Callable[[Any], None], count: int) -> None:
    model = build()
    change(model)
    assert fpet.apply(model)(images()) is not None
    fpet.apply(model, layer=1)
    for call in (model, model.forward_features, lambda x: fpet.merged_features(model, x)):
        with pytest.raises(ValueError, match=rf"17.*got .*{count}"):
            call(images())
    if change is not prompts_at_the_merge:
        with pytest.raises(ValueError, match=rf"17.*got .*{count}"):
            comparators.apply_reduction(model, "bsm", layer=1)(images())


@torch.no_grad()
def test_prompts_in_front_that_the_model_counts_are_prefix() -> None:
    model = fpet.add_adapters(build(), "vpt-deep", hidden_dim=3).eval()
    fpet.apply(model, layer=1)
    assert fpet.merged_features(model, images()).tokens.shape[1] == 4 + 8
    own = build()
    own.norm_pre.register_forward_hook(lambda _m, _a, out: torch.cat((out[:, :1], out.new_ones(2, 3, 32), out[:, 1:]), 1))
    own.num_prefix_tokens += 3
    assert fpet.merged_features(fpet.apply(own, layer=1), images()).tokens.shape[1] == 4 + 8


# --- devices without float64 ------------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """As on Apple's and some other devices."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(f"no float64 here: {function}")
        return out


@torch.no_grad()
def test_no_float64_is_needed() -> None:
    model = fpet.apply(build(), layer=(1, 2), backend="reference")
    expected = fpet.merged_features(model, images()), fpet.visualize(model, images()[0]).source_map
    with NoFloat64():
        features, shown = fpet.merged_features(model, images()), fpet.visualize(model, images()[0])
    assert torch.equal(features.source, expected[0].source) and torch.equal(shown.source_map, expected[1])


# --- transformers' models ---------------------------------------------------------------------------------------------


def test_what_is_for_transformers_is_said() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    for call in (lambda: fpet.apply(model, 1), lambda: fpet.merged_features(model, images())):
        with pytest.raises(TypeError, match=r"fpet\.huggingface\."):
            call()
    from fpet import huggingface as hf

    with torch.no_grad():
        before, classes = model(images()).logits, [type(m) for m in model.modules()]
        hf.apply(model, 0, refinement=True)
        assert not torch.equal(model(images()).logits, before)
        assert fpet.remove(model) is model
        assert [type(m) for m in model.modules()] == classes and torch.equal(model(images()).logits, before)
