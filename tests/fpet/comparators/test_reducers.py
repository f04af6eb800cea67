"""Comparators: what each does to the tokens, against plain loops; that they train, unmerge, and leave the model as it was."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fpet
from fpet import comparators
from fpet.comparators.ltmp import PENALTY, Thresholds
from fpet.comparators.reducers import AveragePooling, MaximumPooling, SoftMatching, ToMe
from fpet.comparators.registry import REDUCTIONS, Tokens

COMPARATORS = [name for name in REDUCTIONS if name != "fpet"]
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5)
LEFT = {
    "none": 16,
    "bsm": 8,
    "bsm-checkerboard": 8,
    "fpet-no-stop": 8,
    "avg-pool": 8,
    "max-pool": 8,
    "tome": 16 - 4 * 2,
    "ltmp": 16,
}


def build(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **(TINY | arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.2))
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def reduced(reducer: comparators.Reducer, n: int, prefix: int = 1, sized: bool = True) -> tuple[Tensor, Tensor, Tensor, Any]:
    g = torch.Generator().manual_seed(n)
    x, key = torch.randn(2, n, 6, generator=g), torch.randn(2, 2, n, 4, generator=g)
    size = torch.randint(1, 4, (2, n, 1), generator=g).float() if sized else torch.ones(2, n, 1)
    return x, key, size, reducer(Tokens(x, size, prefix, None), key, None)


@pytest.mark.parametrize("name", COMPARATORS)
@torch.no_grad()
def test_every_comparator_runs_and_restores(name: str) -> None:
    model = build()
    plain, weights, classes = model(images()), dict(model.state_dict()), [type(m) for m in model.modules()]
    comparators.apply_reduction(model, name, layer=1, r=2)
    for block in model.blocks if name == "ltmp" else ():
        block.thresholds.merge.fill_(2)  # nothing is merged, nothing pruned
    found = fpet.merged_features(model, images())
    assert found.tokens.shape == (3, 1 + LEFT[name], 32)
    assert torch.equal(found.size.sum(1), torch.full((3, 1), 17.0))
    counted = torch.stack([torch.bincount(s, minlength=1 + LEFT[name]) for s in found.source])
    assert torch.equal(counted.float(), found.size.squeeze(-1))
    assert (found.source[:, 0] == 0).all() and (found.source[:, 1:] > 0).all()
    assert model.forward_features(images()).shape == (3, 17, 32)
    maps = model.forward_intermediates(images(), intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(3, 32, 4, 4)] * 4
    same = torch.allclose(model(images()), plain, atol=1e-5)
    assert same == (name in ("none", "ltmp"))
    comparators.remove_reduction(model)
    assert torch.equal(model(images()), plain) and model.state_dict().keys() == weights.keys()
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(("n", "prefix", "r"), [(17, 1, 3), (16, 0, 8), (16, 0, 3), (18, 2, 5), (12, 1, 99)])
def test_tome_against_a_loop(n: int, prefix: int, r: int) -> None:
    """As published: even numbers, the class token's 0 among them, are sources; then sources that are left, then destinations."""
    x, key, size, out = reduced(ToMe(r), n, prefix)
    mean = key.mean(1)
    for i in range(2):
        a = [t for t in range(0, n, 2) if t >= prefix]
        b = [t for t in range(1, n, 2) if t >= prefix]
        score = {(s, d): torch.cosine_similarity(mean[i, s], mean[i, d], dim=0).item() for s in a for d in b}
        best = {s: max(b, key=lambda d, s=s: score[s, d]) for s in a}
        ranked = sorted(a, key=lambda s: -score[s, best[s]])
        merged, left = ranked[: min(r, (n - prefix) // 2)], ranked[min(r, (n - prefix) // 2) :]
        order = [*range(prefix), *(sorted(left) if prefix else left), *b]
        groups = {t: [t] for t in order}
        for s in merged:
            groups[best[s]].append(s)
        assert out.tokens.shape[1] == len(order)
        for place, t in enumerate(order):
            members = groups[t]
            weight = size[i, members]
            torch.testing.assert_close(out.tokens[i, place], (x[i, members] * weight).sum(0) / weight.sum(), msg=f"token {t}")
            assert out.size[i, place] == weight.sum()
            assert (out.match[i, members] == place).all()


@pytest.mark.parametrize("n", [17, 16])
@pytest.mark.parametrize("maximum", [False, True])
def test_pooling_against_a_loop(n: int, maximum: bool) -> None:
    x, _, size, out = reduced(MaximumPooling() if maximum else AveragePooling(), n)
    groups = [[0]] + [list(range(t, min(t + 2, n))) for t in range(1, n, 2)]
    for place, members in enumerate(groups):
        expected = x[:, members].amax(1) if maximum else x[:, members].mean(1)
        torch.testing.assert_close(out.tokens[:, place], expected)
        assert torch.equal(out.size[:, place], size[:, members].sum(1))
        assert (out.match[:, members] == place).all()


@pytest.mark.parametrize(("n", "prefix", "left"), [(17, 1, 9), (16, 1, 9), (18, 2, 10), (16, 0, 8)])
def test_soft_matching_at_one_layer_merges_every_source(n: int, prefix: int, left: int) -> None:
    _, _, _, out = reduced(SoftMatching(None), n, prefix)
    assert out.tokens.shape[1] == left
    b = [t for t in range(1, n, 2) if t >= prefix]
    assert out.match[:, b].tolist() == [list(range(prefix, left))] * 2


@torch.no_grad()
def test_the_checkerboard_without_refinement_is_fpet_without_it() -> None:
    expected, found = fpet.apply(build(), layer=2), comparators.apply_reduction(build(), "bsm-checkerboard", layer=2)
    torch.testing.assert_close(found(images()), expected(images()))


def test_without_gradient_stopping_only_the_keys_gradient_differs() -> None:
    expected = fpet.apply(build(), layer=2, refinement={"dropout": 0.0})
    found = comparators.apply_reduction(build(), "fpet-no-stop", layer=2, refinement={"dropout": 0.0})
    found.blocks[2].refinement.load_state_dict(expected.blocks[2].refinement.state_dict())
    outputs = [model(images()) for model in (expected, found)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(
        found.blocks[2].refinement.adapter_up.weight.grad, expected.blocks[2].refinement.adapter_up.weight.grad
    )
    keys = [model.blocks[2].attn.qkv.weight.grad[32:64] for model in (expected, found)]
    assert not torch.allclose(keys[0], keys[1])
    queries = [model.blocks[2].attn.qkv.weight.grad[:32] for model in (expected, found)]
    torch.testing.assert_close(queries[1], queries[0])


@pytest.mark.parametrize("name", COMPARATORS)
def test_gradients_with_adapters_and_checkpointing(name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = build()
        torch.manual_seed(1)
        fpet.add_adapters(model, "adaptformer", hidden_dim=2)
        comparators.apply_reduction(model, name, layer=1, refinement={"dropout": 0.0})
        fpet.freeze(model)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.requires_grad and "adapter_up" in n:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.any() for n, g in grads[0].items() if "refinement" not in n and "thresholds" not in n)
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        if g is None:  # LTMP's last block, which no score depends on
            assert grads[1][n] is None and n.startswith("blocks.3.thresholds")
        else:
            torch.testing.assert_close(grads[1][n], g, msg=n)


# --- LTMP ----------------------------------------------------------------------------------------------------------------


def ltmp(merge: float, prune: float, **arguments: Any) -> nn.Module:
    model = comparators.apply_reduction(build(**arguments), "ltmp", layer=1)
    for i, block in enumerate(model.blocks):
        block.thresholds.merge.data.fill_(merge + 0.02 * i)
        block.thresholds.prune.data.fill_(prune + 0.02 * i)
    return model


@pytest.mark.parametrize(("n", "prefix"), [(17, 1), (16, 0), (11, 2)])
@pytest.mark.parametrize(("merge", "prune"), [(0.3, 0.6), (-2.0, -1.0), (2.0, 0.9)])
@torch.no_grad()
def test_ltmp_against_a_loop(n: int, prefix: int, merge: float, prune: float) -> None:
    g = torch.Generator().manual_seed(n)
    x, key, importance = (
        torch.randn(2, n, 6, generator=g),
        torch.randn(2, 2, n, 4, generator=g),
        torch.rand(2, n, generator=g) * 2,
    )
    size = torch.randint(1, 4, (2, n), generator=g).float()
    size[1, prefix + 3] = size[1, n - 1] = 0
    module = Thresholds()
    module.merge.fill_(merge)
    module.prune.fill_(prune)
    state = torch.stack((size, (size > 0).float()), -1)
    trained, out = module.train()(x, state, key, importance, prefix), module.eval()(x, state, key, importance, prefix)
    longest = 0
    for i in range(2):
        patches = [t for t in range(prefix, n) if size[i, t] > 0]
        numbered = [*range(prefix), *patches]
        a = [t for k, t in enumerate(numbered) if k % 2 == 0 and t >= prefix]
        b = [t for k, t in enumerate(numbered) if k % 2 == 1 and t >= prefix]
        masked = [*range(prefix), *a, *b, *(t for t in range(prefix, n) if t not in patches)]  # where training leaves them
        group, mean = {t: [t] for t in (*range(prefix), *patches)}, key[i].mean(0)
        for s in a:
            score = {d: torch.cosine_similarity(mean[s], mean[d], dim=0).item() for d in b}
            best = max(b, key=lambda d, score=score: score[d])
            if score[best] > merge:
                group[best] += group.pop(s)
        weighs = {t: max(importance[i, m].item() for m in members) for t, members in group.items()}
        most = max((t for t in group if t >= prefix), key=lambda t: weighs[t])
        left = [t for t in masked if t in group and (t < prefix or weighs[t] > prune or (prefix == 0 and t == most))]
        longest = max(longest, len(left))
        for place, t in enumerate(left):
            weight = size[i, group[t]]
            expected = (x[i, group[t]] * weight[:, None]).sum(0) / weight.sum()
            for found, at in ((trained, masked.index(t)), (out, place)):
                torch.testing.assert_close(found.tokens[i, at], expected)
                assert found.size[i, at].tolist() == [weight.sum().item(), 1.0]
                assert (found.match[i, group[t]] == at).all()
        there = {t for key in left for t in group[key]}
        assert all(out.match[i, t] == trained.match[i, t] == -1 for t in range(n) if t not in there)
        assert (
            trained.size[i, [masked.index(t) for t in range(n) if t not in left]].eq(0).all()
            and out.size[i, len(left) :].eq(0).all()
        )
    assert out.tokens.shape[1] == longest and trained.tokens.shape[1] == n


@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}], ids=str)
def test_ltmp_masks_and_removes_alike(arguments: dict[str, Any]) -> None:
    model = ltmp(0.9, 0.4, **arguments)
    with torch.no_grad():
        removed = fpet.merged_features(model, images())
        expected = model(images())
        single = torch.cat([model(image[None]) for image in images()])
    tokens = removed.tokens.shape[1]
    assert tokens < 14 and len({int((s > 0).sum()) for s in removed.size}) > 1, "images that keep different numbers"
    torch.testing.assert_close(single, expected)
    for block in model.blocks:
        block.thresholds.train()
    masked = fpet.merged_features(model, images())
    assert masked.tokens.shape[1] > tokens
    torch.testing.assert_close(model(images()), expected)
    assert torch.equal(masked.size.sum(1), removed.size.sum(1))


def test_ltmp_learns_its_thresholds_by_cross_entropy_and_penalty() -> None:
    model = ltmp(0.5, 0.5).train()
    fpet.freeze(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"blocks.{i}.thresholds.{t}" for i in range(4) for t in ("merge", "prune")} | {"head.weight", "head.bias"}
    assert fpet.count_parameters(model).refinement == 8
    scores, flops = model(images(), with_flops=True)
    thresholds = [p for n, p in model.named_parameters() if "thresholds" in n]
    by_loss = torch.autograd.grad(scores.logsumexp(1).sum(), thresholds, retain_graph=True, allow_unused=True)
    assert all(g is not None and g != 0 for g in by_loss[:6]), "all but the last block's, which the class token can't see"
    by_flops = torch.autograd.grad(flops, thresholds)
    for i, block in enumerate(model.blocks):
        assert by_flops[2 * i] > 0, f"block {i}: a higher threshold merges less"
        assert by_flops[2 * i + 1] < 0, f"block {i}: a higher threshold prunes more"
        assert block.attn.qkv.weight.grad is None


@pytest.mark.parametrize("prune", [True, False])
def test_ltmp_flops_count_the_tokens_that_are_left(prune: bool) -> None:
    model, n, dim = ltmp(0.5, 0.5 if prune else -9.0), 17, 32
    shares = [torch.ones(3)]
    for depth in (1, 2, 3, 4):
        shares.append((model._encode(images(), depth=depth).size > 0).sum((1, 2)) / n)
    work = [4 * (i * n) * dim**2 + 2 * (i * n) ** 2 * dim + 8 * (o * n) * dim**2 for i, o in pairwise(shares)]
    expected = torch.stack(work).sum(0).mean() / (4 * (12 * n * dim**2 + 2 * n**2 * dim))
    torch.testing.assert_close(model(images(), with_flops=True)[1], expected)
    assert expected < 0.9


def test_ltmp_is_given_what_fpet_spends() -> None:
    """ViT-B/16 merging in block 6: 13.4 of 17.6 GMAC, patch embedding and head not counted."""
    vit = timm.create_model("vit_base_patch16_224", depth=12)
    assert comparators.flops_target(comparators.apply_reduction(vit, "ltmp", layer=6)) == pytest.approx(13.4 / 17.5, abs=0.01)
    assert comparators.flops_target(comparators.apply_reduction(vit, "ltmp", target=0.5)) == 0.5
    assert comparators.flops_target(comparators.apply_reduction(vit, "avg-pool")) is None


def test_ltmp_reaches_its_target() -> None:
    model = comparators.apply_reduction(build(), "ltmp", target=0.6).train()
    parameters = [p for n, p in model.named_parameters() if "thresholds" in n]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(60):
        scores, flops = model(images(), with_flops=True)
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2])) + PENALTY * (flops - 0.6) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.eval()(images(), with_flops=True)[1].item() == pytest.approx(0.6, abs=0.08)


@torch.no_grad()
def test_ltmp_unmerges_what_is_left_and_zeros_the_rest() -> None:
    model = ltmp(0.9, 0.95)
    found, full = fpet.merged_features(model, images()), model.forward_features(images())
    restored = found.tokens.gather(1, found.source[:, :, None].expand(-1, -1, 32))
    pruned = found.source[:, 1:] == 0
    assert pruned.any() and full[:, 1:][pruned].eq(0).all()
    torch.testing.assert_close(full[:, 1:][~pruned], restored[:, 1:][~pruned])


def test_ltmp_copies_and_is_saved(tmp_path: Path) -> None:
    model = fpet.add_adapters(build(), "lora", hidden_dim=2)
    comparators.apply_reduction(model, "ltmp", layer=1)
    for block in model.blocks:
        block.thresholds.merge.data.fill_(0.4)
    expected = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), expected)
        twin.blocks[0].thresholds.merge.data.fill_(2.0)
        assert not torch.equal(twin(images()), expected) and torch.equal(model(images()), expected)
    fpet.save(model, tmp_path / "ltmp.safetensors")
    loaded = fpet.load(build(), tmp_path / "ltmp.safetensors")
    assert loaded.fpet_reduction == model.fpet_reduction
    torch.testing.assert_close(loaded.eval()(images()), expected)
    fpet.remove_adapters(loaded)
    assert loaded.blocks[0].thresholds.merge == 0.4


@torch.no_grad()
def test_applying_another_replaces_the_first() -> None:
    twice = comparators.apply_reduction(comparators.apply_reduction(build(), "tome"), "avg-pool")
    assert torch.equal(twice(images()), comparators.apply_reduction(build(), "avg-pool")(images()))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of fpet, none.*got 'magic'"):
        comparators.apply_reduction(build(), "magic")
    with pytest.raises(ValueError, match=r"layer: expected a block index in range\(4\), got 4"):
        comparators.apply_reduction(build(), "bsm", layer=4)
    with pytest.raises(ValueError, match="r: expected at least 1, got 0"):
        comparators.apply_reduction(build(), "tome", r=0)
    with pytest.raises(ValueError, match=r"target: expected a part of the FLOPs in \(0, 1\], got 2"):
        comparators.apply_reduction(build(), "ltmp", target=2.0)
    with pytest.raises(TypeError, match="pooling by class token"):
        comparators.apply_reduction(build(class_token=False, global_pool="max"), "ltmp")
    with pytest.raises(TypeError, match="expected timm's VisionTransformer, got Eva"):
        comparators.apply_reduction(timm.create_model("eva02_tiny_patch14_224", depth=1), "bsm")
    with pytest.raises(ValueError, match="attn_mask"):
        comparators.apply_reduction(build(), "bsm")(images(), attn_mask=torch.zeros(17, 17))
