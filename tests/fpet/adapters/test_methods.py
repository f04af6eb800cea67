"""The tuning methods: what they compute, what they leave alone, what they train, and folding."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fpet
from fpet.adapters import METHODS, PETModule

FOLDABLE = ("lora", "bi-lora", "repadapter", "ssf", "fact-tt")
IDENTITY = ("none", "linear", "full", "bitfit", "adaptformer", "lora", "repadapter", "fact-tt")  # at first
INSTALLING = [method for method in METHODS if method not in ("linear", "full", "bitfit")]  # those add nothing, as "none"
SMALL = {"vpt-shallow": 3, "vpt-deep": 3, "fact-tt": 4}


def vit(**options):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**arguments, **options}).eval()


def eva(**options):
    """Rotary positions, separate projections, SwiGLU, register tokens."""
    torch.manual_seed(0)
    arguments = {
        "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5, "qkv_fused": False,
        "swiglu_mlp": True, "use_rot_pos_emb": True, "num_reg_tokens": 2, "global_pool": "token",
    }  # fmt: skip
    return Eva(**{**arguments, **options}).eval()


def images(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def add(model, method, **options):
    fpet.add_adapters(model, method, **{**({"hidden_dim": SMALL[method]} if method in SMALL else {}), **options})
    return model.eval()


def shake(model):
    """Gives everything tuned a value of its own, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PETModule):
                for p in module.parameters(recurse=True):
                    p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * 0.1)
    return model


def adapters_of(model):
    return [m for m in model.modules() if isinstance(m, PETModule)]


# --- what is added ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_backbone_keeps_names_values_and_dtype(method):
    model = vit().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add(model, method)
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64, name
    assert model.adapter_config.method == method


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("method", IDENTITY)
def test_changes_nothing_at_first(method, merge):
    plain, model = vit().double(), vit().double()
    add(model, method)
    if merge:
        fpet.apply(plain, 1)
        fpet.apply(model, 1)
    torch.testing.assert_close(model(images(dtype=torch.float64)), plain(images(dtype=torch.float64)))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_adding_and_merging_does_not_matter(method):
    first, second = vit(), vit()
    torch.manual_seed(3)
    fpet.apply(shake(add(first, method)), [0, 2])
    fpet.apply(second, [0, 2])
    torch.manual_seed(3)
    shake(add(second, method))
    assert torch.equal(first(images()), second(images()))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_adaptformer(bits):
    model = shake(add(vit(), "adaptformer", hidden_dim=6, scale=0.5, bits=bits))
    block, x = model.blocks[1], torch.randn(2, 17, 24)
    y = x + block.attn(block.norm1(x))
    down, up = block.adapter_mlp.down_weight(), block.adapter_mlp.up_weight()
    assert (down.shape, up.shape) == ((6, 24), (24, 6))
    if bits != 32:
        assert down.unique().numel() <= 2**bits
    expected = y + block.mlp(block.norm2(y)) + 0.5 * torch.relu(y @ down.T) @ up.T
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("build", [vit, eva])
@pytest.mark.parametrize("method", ["lora", "bi-lora"])
def test_lora(build, method):
    # Compared with the plain model whose q and v were given the low-rank update by hand.
    model, plain = (shake(add(build().double(), method, scale=0.5)), build().double())
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, plain.blocks, strict=True):
            q, v = (0.5 * a.up_weight() @ a.down_weight() for a in (ours.attn.lora_q, ours.attn.lora_v))
            if theirs.attn.qkv is None:
                theirs.attn.q_proj.weight += q
                theirs.attn.v_proj.weight += v
            else:
                theirs.attn.qkv.weight[:24] += q
                theirs.attn.qkv.weight[48:] += v
    torch.testing.assert_close(model(images(dtype=torch.float64)), plain(images(dtype=torch.float64)))


def test_grouped_queries_give_lora_on_v_the_keys_width():
    model = eva(num_kv_heads=1, attn_type="rope")
    add(model, "lora")
    assert model.blocks[0].attn.lora_q.adapter_up.weight.shape[0] == 24
    assert model.blocks[0].attn.lora_v.adapter_up.weight.shape[0] == 12
    assert model(images()).shape == (2, 5)


def test_repadapter():
    model = shake(add(vit(), "repadapter", hidden_dim=6, scale=0.5))
    adapter, x = model.blocks[0].mlp.rep_adapter, torch.randn(2, 17, 24)
    a, b = adapter.down, torch.zeros(24, 6)
    b[:12, :3], b[12:, 3:] = adapter.up_weight[:12].detach(), adapter.up_weight[12:].detach()
    expected = x + 0.5 * ((x @ a.weight.T + a.bias) @ b.T + adapter.up_bias)
    torch.testing.assert_close(adapter(x), expected)
    mlp = model.blocks[0].mlp
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.act(mlp.fc1(expected))))


def test_ssf_is_after_embedding_norms_and_linear_layers():
    model = add(vit(), "ssf")
    places = [name.removesuffix(".ssf") for name, m in model.named_modules() if name.endswith(".ssf")]
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert sorted(places) == sorted(["patch_embed.proj", "norm"] + [f"blocks.{i}.{name}" for i in range(3) for name in block])
    layer, x = model.blocks[0].mlp.fc1, torch.randn(2, 17, 24)
    torch.testing.assert_close(layer(x), (x @ layer.weight.T + layer.bias) * layer.ssf.scale + layer.ssf.shift)
    scales = torch.cat([m.scale for m in adapters_of(model)])
    assert scales.mean().item() == pytest.approx(1, abs=0.01)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_prompts(method):
    model, plain = shake(add(vit(), method)), vit()
    assert model.num_prefix_tokens == 4
    x = plain._pos_embed(plain.patch_embed(images()))
    for i, block in enumerate(plain.blocks):
        if i == 0:
            x = torch.cat([x[:, :1], model.norm_pre.prompts.tokens.expand(2, -1, -1), x[:, 1:]], dim=1)
        elif method == "vpt-deep":
            x = torch.cat([x[:, :1], model.blocks[i].prompts.tokens.expand(2, -1, -1), x[:, 4:]], dim=1)
        x = block(x)
    torch.testing.assert_close(model.forward_features(images()), plain.norm(x))
    torch.testing.assert_close(model(images()), plain.forward_head(plain.norm(x)))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_prompts_are_prefix_tokens_to_merging_and_pooling(method, pool):
    model = fpet.apply(shake(add(vit(global_pool=pool), method)), [0, 1])
    features = fpet.merged_features(model, images())
    assert features.tokens.shape == (2, 4 + 4, 24)
    assert torch.equal(features.size[:, :4], torch.ones(2, 4, 1))
    assert features.size.sum(1).flatten().tolist() == [20, 20]
    assert [tuple(m.shape) for m in model.forward_intermediates(images(), intermediates_only=True)] == [(2, 24, 4, 4)] * 3
    if pool == "avg":
        patches, size = features.tokens[:, 4:], features.size[:, 4:]
        expected = model.head(model.fc_norm((patches * size).sum(1) / 16))
        torch.testing.assert_close(model(images()), expected)


def test_prompts_with_rotary_positions():
    model = shake(add(eva(), "vpt-deep"))
    assert model.num_prefix_tokens == 6
    assert [block.attn.num_prefix_tokens for block in model.blocks] == [6] * 3
    assert fpet.merged_features(fpet.apply(model, 1), images()).tokens.shape == (2, 6 + 8, 24)
    fpet.remove_adapters(model)
    assert model.num_prefix_tokens == model.blocks[0].attn.num_prefix_tokens == 3


def test_prompts_need_a_fixed_grid():
    with pytest.raises(TypeError, match="dynamic_img_size"):
        add(vit(dynamic_img_size=True), "vpt-shallow")
    model = add(vit(), "vpt-shallow")
    with pytest.raises(RuntimeError, match="set_input_size"):
        model.set_input_size((64, 64))
    fpet.remove_adapters(model).set_input_size((64, 64))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_fact_is_one_low_rank_update_of_every_matrix():
    model, plain = shake(add(vit(), "fact-tt", scale=0.5)), vit()
    u, v = model.fact_factors.u, model.fact_factors.v
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, plain.blocks, strict=True):
            for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                core, layer = ours.get_submodule(name).fact.core, theirs.get_submodule(name)
                for i in range(layer.out_features // 24):
                    for j in range(layer.in_features // 24):
                        piece = core[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                        layer.weight[24 * i : 24 * i + 24, 24 * j : 24 * j + 24] += 0.5 * v @ piece @ u
    torch.testing.assert_close(model(images()), plain(images()))
    assert sum(name.endswith((".u", ".v")) for name in model.state_dict()) == 2


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loora", {}), "method: expected one of none, linear"),
        (("lora", {"hidden_dim": 0}), "hidden_dim: expected an integer of at least 1, got 0"),
        (("lora", {"bits": 3}), "bits: expected one of"),
        (("lora", {"scale": float("nan")}), "scale: expected a finite number"),
        (("lora", {"dropout": 1.0}), "dropout: expected a probability"),
        (("repadapter", {"bits": 1}), "bits: the method 'repadapter' has none"),
        (("repadapter", {"hidden_dim": 3}), "hidden_dim: expected a multiple of 2 groups"),
        (("ssf", {"hidden_dim": 8}), "hidden_dim: the method 'ssf' has none"),
        (("vpt-deep", {"scale": 2.0}), "scale: the method 'vpt-deep' has none"),
    ],
)
def test_refuses_arguments_and_leaves_the_model_alone(arguments, message):
    model = vit()
    before = pickle.dumps(model)
    with pytest.raises(ValueError, match=message):
        fpet.add_adapters(model, arguments[0], **arguments[1])
    assert pickle.dumps(model) == before


def test_refuses_a_second_method():
    model = add(vit(), "lora")
    with pytest.raises(ValueError, match="has 'lora' adapters already"):
        fpet.add_adapters(model, "ssf")


def test_refuses_models_without_a_place_for_it():
    with pytest.raises(TypeError, match="expected a timm vision transformer with blocks, got ResNet"):
        fpet.add_adapters(timm.create_model("resnet10t"), "lora")
    model = vit()
    model.blocks[2].mlp = nn.Identity()  # found out only after the first two blocks were changed
    before = model.state_dict().keys()
    with pytest.raises(TypeError, match="expected an MLP with fc1"):
        fpet.add_adapters(model, "repadapter")
    assert (model.state_dict().keys(), adapters_of(model)) == (before, [])
    separate = eva(qkv_fused=True)  # timm adds q_bias to the layer's weight without calling the layer
    for method in ("ssf", "fact-tt"):
        with pytest.raises(TypeError, match="q_bias"):
            add(separate, method)


# --- taking out, copying ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_remove(method, merge):
    model, plain = vit(), vit()
    if merge:
        fpet.apply(model, 1, refinement=True)
        plain = copy.deepcopy(model)
    fpet.remove_adapters(shake(add(model, method)))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "adapter_config")
    if not merge:
        assert torch.equal(model(images()), plain(images()))
        fpet.add_adapters(model, "lora")  # and again


@pytest.mark.parametrize("method", INSTALLING)
def test_copies_are_independent_and_equal(method):
    model = fpet.apply(shake(add(vit(), method)), 1, refinement=True).eval()
    expected = model(images())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert torch.equal(twin(images()), expected)
        fpet.remove_adapters(twin)
        assert torch.equal(model(images()), expected)
        assert adapters_of(twin) == [twin.blocks[1].refinement]


@pytest.mark.parametrize("method", INSTALLING)
def test_compiles_whole(method):
    model = fpet.apply(shake(add(vit(), method)), 1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    torch.compiler.reset()


@pytest.mark.parametrize("method", INSTALLING)
def test_gradient_checkpointing_changes_nothing(method):
    model = fpet.freeze(fpet.apply(shake(add(vit(), method)), 1, refinement=True)).eval()
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(images()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", INSTALLING)
def test_sharded_model_computes_the_same(method, one_process):
    plain = fpet.freeze(fpet.apply(shake(add(vit(), method)), 1, refinement=True)).eval()
    sharded = copy.deepcopy(plain)
    for module in (*sharded.blocks, sharded):
        fully_shard(module, mesh=one_process)
    for model in (plain, sharded):
        model(images()).square().sum().backward()
    for (name, p), ours in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert (ours.grad is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(ours.grad.full_tensor(), p.grad)


# --- training --------------------------------------------------------------------------------------------------------

TRAINED = {
    "none": (),
    "linear": (),
    "adaptformer": ("adapter_mlp",),
    "bi-adaptformer": ("adapter_mlp",),
    "lora": ("lora_",),
    "bi-lora": ("lora_",),
    "repadapter": ("rep_adapter",),
    "ssf": ("ssf",),
    "vpt-shallow": ("prompts",),
    "vpt-deep": ("prompts",),
    "fact-tt": ("fact",),
    "bitfit": ("bias",),
    "full": ("",),
}


@pytest.mark.parametrize("method", METHODS)
def test_freeze_trains_the_method_the_refinement_and_the_head(method):
    model = fpet.freeze(fpet.apply(shake(add(vit(), method)), 1, refinement=True))
    for name, p in model.named_parameters():
        wanted = any(part in name for part in ("refinement", "head.", *TRAINED[method]))
        assert p.requires_grad == wanted, name
    model.train()(images()).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == p.requires_grad, name


@pytest.mark.parametrize("method", INSTALLING)
def test_trains_under_autocast(method):
    model = fpet.freeze(fpet.apply(shake(add(vit(), method)), 1, refinement=True)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or bool(torch.isfinite(p.grad).all()), name


def test_freeze_knows_two_heads_and_none():
    distilled = fpet.freeze(timm.create_model("deit_tiny_distilled_patch16_224", depth=1))
    assert {n for n, p in distilled.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    }
    assert not any(p.requires_grad for p in fpet.freeze(vit(num_classes=0)).parameters())


def test_dropout_and_bits_reach_the_modules():
    model = fpet.add_adapters(vit(), "adaptformer", dropout=0.5, bits=2)
    assert {(a.dropout, a.bits, a.training) for a in adapters_of(model)} == {(0.5, 2, False)}
    model.train()
    assert not torch.equal(shake(model)(images()), model(images()))


@pytest.mark.parametrize(
    ("method", "numel", "stored"),
    [  # ViT-B/16: twelve blocks of width 768
        ("adaptformer", 12 * 2 * 768 * 8, 4 * 12 * 2 * 768 * 8),
        ("bi-adaptformer", 12 * 2 * 768 * 32, 12 * 2 * (768 * 32 // 8 + 8)),
        ("lora", 12 * 4 * 768 * 8, 4 * 12 * 4 * 768 * 8),
        ("bi-lora", 12 * 4 * 768 * 32, 12 * 4 * (768 * 32 // 8 + 8)),
        ("vpt-deep", 12 * 50 * 768, 4 * 12 * 50 * 768),
        ("full", 85_798_656, 4 * 85_798_656),
    ],
)
def test_counts(method, numel, stored):
    with torch.device("meta"):
        model = fpet.add_adapters(timm.create_model("vit_base_patch16_224", num_classes=10), method)
        fpet.freeze(fpet.apply(model, 6, refinement=True))
    count = fpet.count_parameters(model)
    assert (count.adapters, count.refinement, count.head) == (numel, 2 * 64 * 32, 7690)
    assert count.trainable == numel + 2 * 64 * 32 + 7690
    assert count.total == 85_798_656 + 7690 + 2 * 64 * 32 + (0 if method == "full" else numel)
    assert count.adapter_bytes == stored + 2 * (64 * 32 // 8 + 8)


# --- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False}, {"qk_norm": True, "init_values": 0.1, "norm_layer": nn.LayerNorm}]
)
@pytest.mark.parametrize("method", FOLDABLE)
def test_fold(method, options):
    model = fpet.apply(shake(add(vit(**options).double(), method)), 1)
    expected = model(images(dtype=torch.float64))
    assert fpet.fold(model) is model
    assert adapters_of(model) == []
    torch.testing.assert_close(model(images(dtype=torch.float64)), expected, rtol=1e-9, atol=1e-10)
    fpet.remove(model)
    assert type(model.blocks[0]) is type(vit().blocks[0])


@pytest.mark.parametrize("method", ["lora", "repadapter", "ssf"])
@pytest.mark.parametrize("attn_type", ["eva", "rope"])
def test_fold_into_separate_projections(method, attn_type):
    model = shake(add(eva(attn_type=attn_type).double(), method))
    expected = model(images(dtype=torch.float64))
    torch.testing.assert_close(fpet.fold(model)(images(dtype=torch.float64)), expected, rtol=1e-9, atol=1e-10)


def test_fold_into_the_gate_too():
    model = vit()
    for block in model.blocks:
        block.attn.gate = nn.Linear(24, 24)
    shake(add(model.double(), "repadapter"))
    expected = model(images(dtype=torch.float64))
    torch.testing.assert_close(fpet.fold(model)(images(dtype=torch.float64)), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FOLDABLE)))
def test_fold_refuses_what_is_not_linear(method):
    with pytest.raises(ValueError, match=f"linear, got '{method}'"):
        fpet.fold(add(vit(), method))


def test_fold_refuses_a_bare_model():
    with pytest.raises(ValueError, match="got no adapters"):
        fpet.fold(vit())


def test_fold_leaves_the_model_alone_where_a_layer_can_t_take_it_up():
    model = add(vit(norm_layer="rmsnorm"), "ssf")  # no bias to put the shift in
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"expected nn.Linear, nn.Conv2d or nn.LayerNorm to fold into, got RmsNorm"):
        fpet.fold(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(adapters_of(model)) == 20


# --- the peft library ------------------------------------------------------------------------------------------------


def test_a_model_tuned_with_peft_can_be_merged():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(vit(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=generator)
    wrapped.eval()
    folded = copy.deepcopy(wrapped).merge_and_unload()
    assert not torch.allclose(folded(images()), vit()(images()), atol=1e-3)
    fpet.apply(wrapped, 1, refinement=True)
    fpet.apply(folded, 1, refinement=copy.deepcopy(wrapped.base_model.model.blocks[1].refinement))
    torch.testing.assert_close(wrapped(images()), folded.eval()(images()))
    features = fpet.merged_features(wrapped, images())
    assert features.tokens.shape == (2, 9, 24)

    wrapped.train()(images()).square().sum().backward()
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            assert p.grad.abs().max() > 0, name
