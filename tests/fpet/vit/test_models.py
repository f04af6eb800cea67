"""What merging does inside each family, against a loop written out with timm's own, unpatched blocks."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fpet
import fpet_kernels as fk
from fpet.measure.flops import flop_counter
from fpet.vit.merging import kept_positions, merge_splits

TINY = dict(img_size=(32, 48), patch_size=8, embed_dim=96, depth=5, num_heads=4, num_classes=5)  # 4×6 patches


def build(name: str, **arguments: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **(TINY | arguments)).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.15))
    return model


def images(batch: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def key_of(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(B, N, C): mean over heads of the normed, un-rotated key, from the weights."""
    attn, x = block.attn, block.norm1(x)
    if attn.qkv is not None:
        bias = getattr(attn, "q_bias", None)
        bias = attn.qkv.bias if bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        key = torch.nn.functional.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)[1]
    else:
        key = attn.k_proj(x)
    heads = getattr(attn, "num_kv_heads", attn.num_heads)
    return attn.k_norm(key.unflatten(-1, (heads, -1)).transpose(1, 2)).mean(1)


def by_hand(model: torch.nn.Module, image: torch.Tensor, layers: list[int], proportional: bool = True) -> tuple:
    """(tokens after the final norm, size): an unpatched ViT or Eva, merged between timm's own calls."""
    x = model.patch_embed(image)
    x = model._pos_embed(x)
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    p, (h, w) = model.num_prefix_tokens, model.patch_embed.grid_size
    left, size = torch.arange(h * w), None
    for i, block in enumerate(model.blocks):
        attention = {} if size is None or not proportional else {"attn_mask": size.log().mT[:, None]}
        if rope is not None:
            table = rope[i] if getattr(model, "rope_mixed", False) else rope
            attention["rope"] = table[..., left, :]
        if i not in layers:
            x = block(x, **attention)
            continue
        ls1, ls2 = (
            ((lambda t, g=g: t if g is None else g * t) for g in (block.gamma_1, block.gamma_2))
            if hasattr(block, "gamma_1")
            else (block.ls1, block.ls2)
        )
        key = key_of(block, x)
        x = x + ls1(block.attn(block.norm1(x), **attention))
        if len(left) == h * w:
            split = fk.checkerboard(h, w)
        elif len(left) == h * w // 2:
            split = fk.second_checkerboard(h, w)
        else:
            split = fk.checkerboard(h // 2, -(-w // 2))
        x, size, _ = fk.bdm_merge(x, key, split=split, num_prefix_tokens=p, size=size)
        left = left[split.b]
        x = x + ls2(block.mlp(block.norm2(x)))
    return model.norm(x), size


FAMILY = {
    "plain": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "registers, dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "no class token, map pooling": ("vit_base_patch16_siglip_224", {}),
    "average pooling": ("vit_base_patch16_siglip_gap_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_base_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "PE": ("vit_pe_core_base_patch16_224", {}),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {}),
    "grouped queries": ("vit_base_patch16_sapiens2", {"num_kv_heads": 2}),
}


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("layers", [[0], [1, 2, 4]])
@torch.no_grad()
def test_merging_matches_a_loop_over_timms_own_blocks(family: str, layers: list[int]) -> None:
    name, arguments = FAMILY[family]
    model = build(name, **arguments)
    plain, image = copy.deepcopy(model), images()
    tokens, size = by_hand(plain, image, layers)
    fpet.apply(model, layer=layers)
    merged = fpet.merged_features(model, image)
    torch.testing.assert_close(merged.size, size, rtol=0, atol=0)
    torch.testing.assert_close(merged.tokens, tokens)
    # every original position, in timm's shape, and timm's own head over those
    everywhere = tokens.gather(1, merged.source[..., None].expand(-1, -1, tokens.shape[-1]))
    torch.testing.assert_close(model.forward_features(image), everywhere)
    torch.testing.assert_close(model(image), plain.forward_head(everywhere))


@torch.no_grad()
def test_attention_without_proportion_and_every_form_of_it() -> None:
    model = build("vit_tiny_patch16_224")
    image, off = images(), by_hand(copy.deepcopy(model), images(), [1, 3], proportional=False)
    on = by_hand(copy.deepcopy(model), image, [1, 3])
    fpet.apply(model, layer=(1, 3), proportional_attention=False)
    torch.testing.assert_close(fpet.merged_features(model, image)[:2], off)
    for form in (True, "mask", "column"):
        fpet.apply(model, layer=(1, 3), proportional_attention=form)
        torch.testing.assert_close(fpet.merged_features(model, image)[:2], on)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(fpet.merged_features(model, image)[:2], on)


RELATIVE = {
    "beit": ("beit_base_patch16_224", {}),
    "beit, shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "mlp": ("vit_relpos_small_patch16_224", {}),
    "mlp, shared, class token": ("vit_relpos_small_patch16_rpn_224", {"shared_rel_pos": True, "class_token": True}),
    "table": ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias"}),
}


@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize("family", RELATIVE)
@torch.no_grad()
def test_relative_position_bias_keeps_rows_and_columns_of_what_is_left(family: str, sdpa: bool) -> None:
    """The patched attention on kept tokens is the unpatched one on all tokens, in which the others have no weight."""
    name, arguments = RELATIVE[family]
    model = build(name, **arguments, depth=1)
    attn = model.blocks[0].attn
    attn.fused_attn = sdpa
    p = model.num_prefix_tokens
    kept = kept_positions(4, 6, 2, p, torch.device("cpu"))
    shared = getattr(model, "rel_pos_bias", None) or getattr(model, "shared_rel_pos", None)
    bias = None if shared is None else shared() if family.startswith("beit") else shared.get_bias()
    x = torch.randn(2, 24 + p, 96, dtype=torch.float64)
    # A key of minus infinity in all but its kept tokens: take them out through the bias, which reaches every score.
    gone = torch.zeros(24 + p, 24 + p, dtype=torch.float64)
    gone[:, [i for i in range(24 + p) if i not in kept.tolist()]] = float("-inf")
    keyword = "shared_rel_pos_bias" if family.startswith("beit") else "shared_rel_pos"
    if bias is None:  # each block has its own: hide the others through it
        owner = attn if family.startswith("beit") else attn.rel_pos
        method = "_get_rel_pos_bias" if family.startswith("beit") else "get_bias"
        own = getattr(owner, method)
        setattr(owner, method, lambda: own() + gone)
        expected = attn(x)[:, kept]
        delattr(owner, method)
    else:
        expected = attn(x, **{keyword: bias + gone})[:, kept]
    fpet.apply(model)
    torch.testing.assert_close(attn(x[:, kept], **{keyword: bias}, kept=kept), expected)


SECOND_TIER = (
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_rpn_224",
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_small_patch16_36x1_224",
    "vit_small_patch16_18x2_224",
)


@pytest.mark.parametrize("name", SECOND_TIER)
@torch.no_grad()
def test_second_tier_merges_where_it_should(name: str) -> None:
    """Blocks before the merge see nothing of it, and equal tokens merge into themselves."""
    model = build(name)
    image = images()
    before = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    fpet.apply(model, layer=2)
    torch.testing.assert_close(model.forward_intermediates(image, indices=[0, 1], intermediates_only=True), before)
    # An image of one colour, no positions: all patches are equal, so merging changes nothing at all.
    for module in model.modules():
        for attribute in ("pos_embed", "relative_position_bias_table"):
            if isinstance(p := getattr(module, attribute, None), torch.nn.Parameter):
                p.zero_()
        if hasattr(module, "rel_coords_log"):
            module.rel_coords_log.zero_()
    flat = torch.ones_like(image)
    merged = model(flat)
    fpet.apply(model, layer=())
    torch.testing.assert_close(merged, model(flat))


@torch.no_grad()
def test_parallel_scaling_merges_after_the_block() -> None:
    from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock

    for block_fn in (ParallelScalingBlock, DiffParallelScalingBlock):
        model = build("vit_tiny_patch16_224", block_fn=block_fn)
        image = images()
        after = model.forward_intermediates(image, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
        fpet.apply(model, layer=2)
        merged = model.forward_intermediates(image, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
        b = merge_splits(4, 6, 1)[0].b
        groups = fpet.merged_features(model, image).source[:, 1:]
        for image_tokens, source, out in zip(after, groups, merged, strict=True):
            for position in b.tolist():
                members = source == source[position]
                torch.testing.assert_close(out[position], image_tokens[members].mean(0))


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", "map", "prr", ""])
@torch.no_grad()
def test_every_pooling_counts_a_merged_token_as_what_it_stands_for(pool: str) -> None:
    for include_prefix in (False, True):
        model = build("vit_tiny_patch16_224", global_pool=pool, pool_include_prefix=include_prefix, reg_tokens=1)
        plain, image = copy.deepcopy(model), images()
        fpet.apply(model, layer=[1, 4])
        torch.testing.assert_close(model(image), plain.forward_head(model.forward_features(image)))
        assert model(image).shape == plain(image).shape


@torch.no_grad()
def test_dynamic_image_sizes_take_the_grid_of_the_image() -> None:
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"):
        model = build(name, dynamic_img_size=True)
        fpet.apply(model, layer=[1, 2])
        for height, width in ((32, 48), (40, 24), (56, 56), (32, 48)):
            h, w, p = height // 8, width // 8, model.num_prefix_tokens
            merged = fpet.merged_features(model, images(2, height, width))
            assert merged.tokens.shape[1] == p + (h // 2) * -(-w // 2)
            assert merged.source.shape == (2, p + h * w)
            maps = model.forward_intermediates(images(2, height, width), intermediates_only=True)
            assert all(y.shape == (2, 96, h, w) for y in maps)
    padded = build("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)
    fpet.apply(padded, layer=1)
    assert fpet.merged_features(padded, images(1, 35, 41)).source.shape == (1, 1 + 5 * 6)


@torch.no_grad()
def test_set_input_size_takes_effect_at_once() -> None:
    for name in ("vit_tiny_patch16_224", "eva02_base_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"):
        model = build(name)
        fpet.apply(model, layer=[1, 2])
        model(images())
        model.set_input_size(img_size=(48, 40))
        resized = copy.deepcopy(model)
        fpet.remove(resized)
        fpet.apply(resized, layer=[1, 2])
        assert fpet.merged_features(model, images(2, 48, 40)).source.shape[1] == model.num_prefix_tokens + 30
        assert torch.equal(model(images(2, 48, 40)), resized(images(2, 48, 40)))


@torch.no_grad()
def test_attention_mask_of_the_caller() -> None:
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3"):
        model = build(name)
        p = model.num_prefix_tokens
        n = p + 24
        fpet.apply(model, layer=[1, 3])
        image, nothing = images(), torch.zeros(n, n, dtype=torch.float64)
        for mask in (nothing, nothing.bool().logical_not(), nothing.expand(2, 1, n, n), nothing[:1]):
            torch.testing.assert_close(model(image, attn_mask=mask), model(image))
        # Prefix tokens that see only one another never learn of the image.
        blind = torch.ones(n, n, dtype=torch.bool)
        blind[:p, p:] = False
        other = images().flip(-1)
        seen = model.forward_features(image, attn_mask=blind)[:, :p]
        torch.testing.assert_close(seen, model.forward_features(other, attn_mask=blind)[:, :p])
        assert not torch.allclose(model.forward_features(image)[:, :p], model.forward_features(other)[:, :p])
        causal = model.forward_features(image, is_causal=True)
        explicit = model.forward_features(image, attn_mask=torch.ones(n, n, dtype=torch.bool).tril())
        torch.testing.assert_close(causal, explicit)
        assert not torch.allclose(causal, model.forward_features(image))
        maps = model.forward_intermediates(image, indices=[4], intermediates_only=True, norm=True, attn_mask=blind)
        whole = model.forward_features(image, attn_mask=blind)[:, p:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
        torch.testing.assert_close(maps[0], whole)


@torch.no_grad()
def test_intermediates_have_timms_shapes_and_the_merged_values() -> None:
    model = build("vit_small_patch14_reg4_dinov2")
    plain, image = copy.deepcopy(model), images()
    fpet.apply(model, layer=2)
    source = fpet.merged_features(model, image).source
    for arguments in (
        {}, {"indices": 2}, {"indices": [0, 3], "return_prefix_tokens": True}, {"output_fmt": "NLC", "norm": True},
        {"indices": [1], "stop_early": True}, {"output_dict": True, "return_prefix_tokens": True},
        {"intermediates_only": True, "indices": [4]},
    ):  # fmt: skip
        got, timms = model.forward_intermediates(image, **arguments), plain.forward_intermediates(image, **arguments)
        shapes = [torch.utils._pytree.tree_map(lambda t: t.shape, found) for found in (got, timms)]
        assert shapes[0] == shapes[1], arguments
    got = model.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
    timms = plain.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(got[:2], timms[:2])
    for features in got[2:]:
        whole = torch.cat((features.new_zeros(2, 5, 96), features), dim=1)
        for b in range(2):  # the positions of one group hold one value
            first = torch.tensor([(source[b] == g).nonzero()[0, 0] for g in source[b]])
            assert torch.equal(whole[b, 5:], whole[b, first][5:])
    old = model.get_intermediate_layers(image, n=[1, 4], reshape=True, norm=True)
    assert [tuple(y.shape) for y in old] == [(2, 96, 4, 6)] * 2
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(image, output_fmt="NHWC")


@torch.no_grad()
def test_features_only_models_are_patched_through_their_wrapper() -> None:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 2, 4), **(TINY | {"depth": 6})).eval()
    image = images().float()
    before = net(image)
    fpet.apply(net, layer=2)
    after = net(image)
    assert [y.shape for y in after] == [y.shape for y in before]
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])
    assert fpet.merged_features(net, image).tokens.shape[1] == 1 + 12
    fpet.remove(net)
    assert all(torch.equal(a, b) for a, b in zip(net(image), before, strict=True))


@pytest.mark.parametrize(
    ("name", "layer", "paper"),
    [
        ("vit_base_patch16_224", 6, 13.5),
        ("vit_base_patch16_224", 4, 12.0),
        ("vit_base_patch16_224", 2, 10.5),
        ("vit_large_patch16_224", 12, 46.7),
    ],
)
def test_flops_are_those_of_the_paper(name: str, layer: int, paper: float) -> None:
    """Multiply-accumulates in G, within 1 % of Table 1 and of the ViT-L table of the paper."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
    fpet.apply(model, layer=layer)
    with FakeTensorMode(allow_non_fake_inputs=True), flop_counter() as counter, torch.no_grad():
        model.to_empty(device="cpu")(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(paper, rel=0.01)
