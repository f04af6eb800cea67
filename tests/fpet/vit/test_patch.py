"""apply, remove, merged: what they change, what they leave alone, and that a patched model is a model like any other."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

import fpet
from fpet.vit.block import convert, key_channels, restore

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5)


def build(name: str = "vit_tiny_patch16_224", **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **(TINY | arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.2))
    return model


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@torch.no_grad()
def test_three_lines() -> None:
    model = build()
    fpet.add_adapters(model, "adaptformer", hidden_dim=8)
    assert fpet.apply(model, layer=2) is model
    assert model(images()).shape == (2, 5)


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), (0, 1, 2)])
@torch.no_grad()
def test_any_layer_and_several(layers: tuple[int, ...]) -> None:
    model = build()
    plain = model(images())
    fpet.apply(model, layer=layers if len(layers) > 1 else layers[0])
    left = {1: 8, 2: 4, 3: 2}[len(layers)]
    found = fpet.merged_features(model, images())
    assert found.tokens.shape == (2, 1 + left, 32)
    assert torch.equal(found.size.sum(1), torch.full((2, 1), 17.0))
    assert torch.equal(found.size[:, 0], torch.ones(2, 1)), "prefix tokens are never a destination"
    # sizes and sources say the same
    counted = torch.stack([torch.bincount(s, minlength=1 + left) for s in found.source])
    assert torch.equal(counted.float(), found.size.squeeze(-1))
    if layers == (3,):
        assert torch.equal(model.forward_features(images())[:, 0], model.forward_features(images())[:, 0])
    assert not torch.equal(model(images()), plain) or layers == (3,)  # after the last attention the class token is done


@torch.no_grad()
def test_applying_twice_is_applying_once_and_remove_undoes_it() -> None:
    model = build()
    before, original, weights = model(images()), classes(model), {k: v.clone() for k, v in model.state_dict().items()}
    fpet.remove(model)  # nothing to remove
    fpet.apply(model, layer=1)
    once, patched = model(images()), classes(model)
    fpet.apply(model, layer=1)
    assert torch.equal(model(images()), once) and classes(model) == patched
    fpet.apply(model, layer=2)
    assert not torch.equal(model(images()), once)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    fpet.remove(model)
    assert torch.equal(model(images()), before) and classes(model) == original
    assert not any(key.startswith("fpet") for m in model.modules() for key in vars(m))


@torch.no_grad()
def test_context_manager_leaves_the_model_as_it_was() -> None:
    model = build()
    before, original = model(images()), classes(model)
    with fpet.merged(model, layer=1, refinement=True) as inside:
        assert inside is model and not torch.equal(model(images()), before)
    assert torch.equal(model(images()), before) and classes(model) == original
    with pytest.raises(KeyError), fpet.merged(model, layer=1):
        raise KeyError
    assert classes(model) == original

    fpet.apply(model, layer=2, refinement=True)
    refined, module, config = model(images()), model.blocks[2].refinement, model.fpet_config
    with fpet.merged(model, layer=(0, 2), refinement=False, similarity="dot"):
        assert [hasattr(b, "refinement") for b in model.blocks] == [False] * 4
    assert model.fpet_config == config and model.blocks[2].refinement is module
    assert torch.equal(model(images()), refined)
    with pytest.raises(ValueError, match="layer"), fpet.merged(model, layer=4):
        pass
    assert model.fpet_config == config


def test_refinement_arguments() -> None:
    model = build()
    fpet.apply(model, layer=(1, 2), refinement=True)
    first = model.blocks[1].refinement
    names = {k for k in model.state_dict() if "refinement" in k}
    assert names == {f"blocks.{i}.refinement.adapter_{d}.weight" for i in (1, 2) for d in ("down", "up")}
    assert first.adapter_down.weight.shape == (32, key_channels(model.blocks[1])) == (32, 8)
    fpet.apply(model, layer=(1, 2), refinement=True)
    assert model.blocks[1].refinement is first
    fpet.apply(model, layer=1)
    assert model.blocks[1].refinement is first
    fpet.apply(model, layer=1, refinement={"hidden_dim": 4, "bits": 2})
    assert model.blocks[1].refinement.adapter_down.weight.shape == (4, 8)
    fpet.apply(model, layer=(1, 3), refinement={1: first, 3: copy.deepcopy(first)})
    assert model.blocks[1].refinement is first and model.blocks[3].refinement is not first
    fpet.apply(model, layer=3, refinement=first)
    assert model.blocks[3].refinement is first
    fpet.apply(model, layer=3, refinement=False)
    assert not any(hasattr(b, "refinement") for b in model.blocks)
    double = fpet.apply(build().double(), layer=0, refinement=True)
    assert double.blocks[0].refinement.adapter_up.weight.dtype == torch.float64
    for bad, error in ((first, "one module"), ({1: first}, "each of the layers")):
        with pytest.raises(ValueError, match=error):
            fpet.apply(model, layer=(1, 2), refinement=bad)
    with pytest.raises(TypeError, match="refinement"):
        fpet.apply(model, layer=1, refinement="yes")


def test_refinement_learns_and_changes_the_matching() -> None:
    model = fpet.apply(build(), layer=1, refinement={"bits": 32})
    assert fpet.freeze(model) is model
    model(images()).square().sum().backward()
    refinement = model.blocks[1].refinement
    assert refinement.adapter_up.weight.grad.abs().max() > 0
    with torch.no_grad():
        before = fpet.merged_features(model, images()).source
        refinement.adapter_up.weight.normal_(generator=torch.Generator().manual_seed(3))
        assert not torch.equal(fpet.merged_features(model, images()).source, before)


def test_bad_arguments_change_nothing() -> None:
    model = build()
    original = classes(model)
    for arguments, error in (
        ({"layer": 4}, ValueError), ({"layer": -1}, ValueError), ({"layer": (1, 1)}, ValueError), ({"layer": True}, ValueError),
        ({"layer": "1"}, ValueError), ({"layer": 1.0}, TypeError), ({"layer": 1, "similarity": "euclid"}, ValueError),
        ({"layer": 1, "proportional_attention": "flash"}, ValueError), ({"layer": (0, 1, 2, 3)}, ValueError),
        ({"layer": 1, "refinement": 3}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            fpet.apply(model, **arguments)
        assert classes(model) == original
    with pytest.raises(TypeError, match="no knowledge"):
        fpet.apply(nn.Linear(2, 2), layer=0)
    with pytest.raises(TypeError, match="2 vision transformers"):
        fpet.apply(nn.ModuleList([build(), build()]), layer=0)
    with pytest.raises(TypeError, match="before wrapping"):
        fpet.apply(nn.DataParallel(build()), layer=0)
    with pytest.raises(TypeError, match="patched by"):
        fpet.merged_features(model, images())


@torch.no_grad()
def test_a_model_inside_another_is_found() -> None:
    wrapper = nn.Sequential(build(), nn.Softmax(dim=-1))
    before = wrapper(images())
    fpet.apply(wrapper, layer=1)
    assert not torch.equal(wrapper(images()), before)
    fpet.remove(wrapper)
    assert torch.equal(wrapper(images()), before)


@torch.no_grad()
def test_pickle_deepcopy_save_and_ema() -> None:
    from timm.utils import ModelEmaV3

    model = fpet.add_adapters(build(), "lora", hidden_dim=2)
    fpet.apply(model, layer=(0, 2), refinement=True, similarity="dot")
    model(images())
    expected = model(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(images()), expected) and twin.fpet_config == model.fpet_config
        assert torch.equal(fpet.remove(twin).patch_embed.proj.weight, model.patch_embed.proj.weight)
    ema = ModelEmaV3(model, decay=0.5)
    model.head.weight.add_(1)
    ema.update(model)
    torch.testing.assert_close(ema.module.head.weight, model.head.weight - 0.5)
    assert ema.module(images()).shape == (2, 5)


def test_backward_after_a_forward_that_was_copied() -> None:
    """No graph is kept on the model: deepcopy works between forward and backward."""
    model = fpet.apply(build(), layer=1, refinement=True)
    loss = model(images()).sum()
    copy.deepcopy(model)
    loss.backward()


def gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    model(images()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    from timm.layers import set_reentrant_ckpt

    # In training, with dropout in the refinement and stochastic depth: what is recomputed must be what was computed.
    model = build(name, drop_path_rate=0.3).train()
    fpet.apply(model, layer=(1, 2), refinement={"dropout": 0.3})
    plain = gradients(model)
    assert any("refinement" in key for key in plain)
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        checkpointed = gradients(model)
    finally:
        set_reentrant_ckpt(False)
    torch.testing.assert_close(checkpointed, plain)


@torch.no_grad()
def test_calls_see_nothing_of_earlier_ones() -> None:
    model = fpet.apply(build(dynamic_img_size=True), layer=(1, 2))
    big = torch.randn(1, 3, 48, 40)
    fresh = {name: getattr(copy.deepcopy(model), name)(images()) for name in ("forward", "forward_features")}
    model(big)
    assert torch.equal(model.forward_features(images()), fresh["forward_features"])
    model.forward_intermediates(big)
    assert torch.equal(model(images()), fresh["forward"])
    assert not any(isinstance(v, torch.Tensor) for m in model.modules() for v in vars(m).values())


@torch.no_grad()
def test_threads_share_a_model() -> None:
    model = fpet.apply(build(dynamic_img_size=True), layer=(0, 2))
    inputs = [torch.randn(1 + i % 3, 3, 32 + 8 * (i % 2), 32) for i in range(8)]
    expected = [model(x) for x in inputs]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            if not all(torch.equal(model(inputs[i]), expected[i]) for _ in range(10)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_tables_made_in_any_mode_serve_all_others() -> None:
    """The first call may come under inference mode or a default device; the tables it caches are used in training later."""
    from fpet.vit.merging import _kept, _plan

    model = fpet.apply(build("vit_small_patch16_rope_224"), layer=(1, 2))
    _plan.cache_clear()
    _kept.cache_clear()
    with torch.inference_mode():
        model(images())
    model(images()).sum().backward()
    _plan.cache_clear()
    with torch.device("meta"):
        fpet.apply(build("vit_tiny_patch16_224", img_size=40), layer=1)
    image = torch.randn(1, 3, 40, 40)
    assert fpet.apply(build("vit_tiny_patch16_224", img_size=40), layer=1)(image).isfinite().all()


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
@torch.no_grad()
def test_inference_compiles_without_a_graph_break(name: str) -> None:
    model = fpet.apply(build(name, depth=3), layer=(0, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (2, 3):
        torch.testing.assert_close(compiled(images(batch)), model(images(batch)))


@torch.no_grad()
def test_dynamic_image_sizes_compile() -> None:
    model = fpet.apply(build(depth=2, dynamic_img_size=True), layer=0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for height, width in ((32, 32), (40, 56)):
        image = torch.randn(2, 3, height, width)
        torch.testing.assert_close(compiled(image), model(image))


def test_training_compiles_without_a_graph_break() -> None:
    model = fpet.add_adapters(build(depth=3), "adaptformer", hidden_dim=2)
    fpet.apply(model, layer=(0, 1), refinement=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    compiled(images()).square().sum().backward()
    torch.testing.assert_close({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, expected)
    # Another setting is another graph, not a wrong answer.
    fpet.apply(model, layer=1)
    torch.testing.assert_close(compiled(images()), model(images()))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_exports_with_a_dynamic_batch(name: str) -> None:
    model = fpet.apply(build(name), layer=(1, 2), refinement=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
    for n in (1, 2, 5):
        torch.testing.assert_close(program.module()(images(n)), model(images(n)))
    assert any("fpet" in str(node.target) for node in program.graph.nodes) or fpet_reference_only()


def fpet_reference_only() -> bool:
    from fpet_kernels import backends

    return backends.select(torch.empty(1, 1, 1), None) == "reference"


def test_autocast_keeps_every_token() -> None:
    model = fpet.apply(build(), layer=(0, 2), refinement=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fpet.merged_features(model, images()).size.sum(1), torch.full((2, 1), 17.0))
        model(images()).sum().backward()
    assert model.blocks[0].refinement.adapter_up.weight.grad.isfinite().all()
    with torch.no_grad():
        half = copy.deepcopy(model).bfloat16().eval()
        found = fpet.merged_features(half, images().bfloat16())
        assert found.tokens.dtype == torch.bfloat16 and torch.equal(found.size.sum(1), torch.full((2, 1), 17.0))
        assert half(images().bfloat16()).dtype == torch.bfloat16


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of one, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel() -> None:
    model = fpet.apply(build(), layer=(1, 2), refinement={"dropout": 0.0}).train()
    expected = gradients(copy.deepcopy(model))
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(model, static_graph=False)
        wrapped(images()).square().sum().backward()
        torch.testing.assert_close({k: p.grad for k, p in model.named_parameters()}, expected)
        with pytest.raises(TypeError, match="before wrapping"):
            fpet.apply(wrapped, layer=1)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fpet.apply(build(), layer=(1, 2), refinement={"dropout": 0.0}).train()
    expected, logits = gradients(copy.deepcopy(model)), model(images())
    with one_process():
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(model(images()), logits)
        model(images()).square().sum().backward()
        torch.testing.assert_close({k: p.grad.full_tensor() for k, p in model.named_parameters()}, expected)
        # Settings may change afterwards; classes may not.
        fpet.apply(model, layer=None)
        assert model(images()).shape == logits.shape
        with pytest.raises(TypeError, match="layer=None"):
            fpet.remove(model)
        with pytest.raises(TypeError, match="before fully_shard"):
            fpet.apply(model, layer=3, refinement=True)
        bare = build()
        fully_shard(bare, mesh=mesh)
        with pytest.raises(TypeError, match="before fully_shard"):
            fpet.apply(bare, layer=1)


@torch.no_grad()
def test_peft_lora_on_either_side_of_apply() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    plain, outputs = build(), []
    for first in (True, False):
        torch.manual_seed(5)
        model = copy.deepcopy(plain)
        if first:
            fpet.apply(model, layer=1)
        model = peft.get_peft_model(model, config)
        if not first:
            fpet.apply(model, layer=1)
        outputs.append(model(images()))
        with model.disable_adapter():
            torch.testing.assert_close(model(images()), fpet.apply(copy.deepcopy(plain), layer=1)(images()))
        torch.testing.assert_close(fpet.apply(model.merge_and_unload(), layer=1)(images()), outputs[-1])
    assert torch.equal(*outputs)


def test_convert_and_restore_follow_the_slots() -> None:
    block = Block(32, 4)
    assert convert(convert(block)) is block and type(block) is not Block and isinstance(block, Block)
    assert type(restore(block)) is Block and type(block.attn) is Attention
    for owner, slot in ((block, "adapter_mlp"), (block, "refinement"), (block.attn, "lora_q"), (block.attn, "lora_v")):
        convert(block)
        setattr(owner, slot, nn.Linear(32, 32))
        assert type(restore(block)) is not Block, "a filled slot needs the class"
        delattr(owner, slot)
        assert type(restore(block)) is Block
    with pytest.raises(TypeError, match="Linear"):
        convert(nn.Linear(2, 2))


@torch.no_grad()
def test_adapters_and_merging_come_and_go_independently() -> None:
    model = build()
    before, original = model(images()), classes(model)
    fpet.apply(model, layer=1)
    merged = model(images())
    fpet.add_adapters(model, "adaptformer", hidden_dim=2)
    torch.testing.assert_close(model(images()), merged)  # an adapter starts at zero
    model.blocks[2].adapter_mlp.adapter_up.weight.fill_(0.1)
    tuned = model(images())
    assert not torch.equal(tuned, merged)
    fpet.remove(model)
    x = model.blocks[:2](model._pos_embed(model.patch_embed(images())))
    block = model.blocks[2]
    x = x + block.attn(block.norm1(x))
    x = x + block.mlp(block.norm2(x)) + block.adapter_mlp(x)  # un-normed, after the attention's residual
    torch.testing.assert_close(model(images()), model.forward_head(model.norm(model.blocks[3](x))))
    fpet.apply(model, layer=1)
    assert torch.equal(model(images()), tuned)
    fpet.remove_adapters(model)
    assert torch.equal(model(images()), merged)
    fpet.remove(model)
    assert torch.equal(model(images()), before) and classes(model) == original


@torch.no_grad()
def test_hooks_and_buffers_survive() -> None:
    model = build()
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.blocks[1].register_forward_hook(lambda *_: seen.append("block"))
    model.blocks[1].attn.register_forward_pre_hook(lambda *_: seen.append("attention"))
    fpet.apply(model, layer=1)
    model(images())
    assert seen == ["attention", "block", "model"]


def test_vision_transformer_is_still_one() -> None:
    model = fpet.apply(build(), layer=1)
    assert isinstance(model, VisionTransformer) and isinstance(model.blocks[0], Block)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
