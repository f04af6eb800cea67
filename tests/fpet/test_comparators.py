"""Comparators: what each does to the tokens, against plain loops; that they train, unmerge, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fpet
from fpet import comparators
from fpet.comparators import COMPARATORS, Matching, Pooling, ToMe, _Tokens

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5)
LEFT = {"none": 16, "bsm": 8, "bsm-checkerboard": 8, "fpet-no-stop": 8, "avg-pool": 8, "max-pool": 8, "tome": 16 - 4 * 2}


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
    return x, key, size, reducer(_Tokens(x, size, prefix, None), key, None)


@pytest.mark.parametrize("name", COMPARATORS)
@torch.no_grad()
def test_every_comparator_runs_and_restores(name: str) -> None:
    model = build()
    plain, weights, classes = model(images()), dict(model.state_dict()), [type(m) for m in model.modules()]
    comparators.apply(model, name, layer=1, r=2)
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
    assert same == (name == "none")
    comparators.remove(model)
    assert torch.equal(model(images()), plain) and model.state_dict().keys() == weights.keys()
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(("n", "prefix", "r"), [(17, 1, 3), (16, 0, 8), (18, 2, 5), (12, 1, 99)])
def test_tome_against_a_loop(n: int, prefix: int, r: int) -> None:
    x, key, size, out = reduced(ToMe(r), n, prefix)
    mean = key.mean(1)
    for i in range(2):
        a, b = list(range(prefix, n, 2)), list(range(prefix + 1, n, 2))
        score = {(s, d): torch.cosine_similarity(mean[i, s], mean[i, d], dim=0).item() for s in a for d in b}
        best = {s: max(b, key=lambda d, s=s: score[s, d]) for s in a}
        merged = sorted(a, key=lambda s: -score[s, best[s]])[: min(r, len(b))]
        groups = {t: [t] for t in range(n) if t not in merged}
        for s in merged:
            groups[best[s]].append(s)
        assert out.tokens.shape[1] == len(groups)
        for place, (t, members) in enumerate(sorted(groups.items())):
            weight = size[i, members]
            torch.testing.assert_close(out.tokens[i, place], (x[i, members] * weight).sum(0) / weight.sum(), msg=f"token {t}")
            assert out.size[i, place] == weight.sum()
            assert (out.match[i, members] == place).all()


@pytest.mark.parametrize("n", [17, 16])
@pytest.mark.parametrize("maximum", [False, True])
def test_pooling_against_a_loop(n: int, maximum: bool) -> None:
    x, _, size, out = reduced(Pooling(maximum), n)
    groups = [[0]] + [list(range(t, min(t + 2, n))) for t in range(1, n, 2)]
    for place, members in enumerate(groups):
        expected = x[:, members].amax(1) if maximum else x[:, members].mean(1)
        torch.testing.assert_close(out.tokens[:, place], expected)
        assert torch.equal(out.size[:, place], size[:, members].sum(1))
        assert (out.match[:, members] == place).all()


def test_matching_of_alternating_tokens_is_tome_that_merges_every_source() -> None:
    _, _, _, matched = reduced(Matching(checkerboard=False), 17)
    _, _, _, merged = reduced(ToMe(8), 17)
    torch.testing.assert_close(matched.tokens, merged.tokens)
    assert torch.equal(matched.size, merged.size) and torch.equal(matched.match, merged.match)


@torch.no_grad()
def test_the_checkerboard_without_refinement_is_fpet_without_it() -> None:
    expected, found = fpet.apply(build(), layer=2), comparators.apply(build(), "bsm-checkerboard", layer=2)
    torch.testing.assert_close(found(images()), expected(images()))


def test_without_gradient_stopping_only_the_keys_gradient_differs() -> None:
    expected = fpet.apply(build(), layer=2, refinement={"dropout": 0.0})
    found = comparators.apply(build(), "fpet-no-stop", layer=2, refinement={"dropout": 0.0})
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
        comparators.apply(model, name, layer=1, refinement={"dropout": 0.0})
        fpet.freeze(model)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.requires_grad and "adapter_up" in n:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.any() for n, g in grads[0].items() if "refinement" not in n)
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, msg=n)


@torch.no_grad()
def test_applying_another_replaces_the_first() -> None:
    twice = comparators.apply(comparators.apply(build(), "tome"), "avg-pool")
    assert torch.equal(twice(images()), comparators.apply(build(), "avg-pool")(images()))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of none, bsm.*got 'magic'"):
        comparators.apply(build(), "magic")
    with pytest.raises(ValueError, match=r"layer: expected a block index in range\(4\), got 4"):
        comparators.apply(build(), "bsm", layer=4)
    with pytest.raises(ValueError, match="r: expected at least 1, got 0"):
        comparators.apply(build(), "tome", r=0)
    with pytest.raises(TypeError, match="expected timm's VisionTransformer, got Eva"):
        comparators.apply(timm.create_model("eva02_tiny_patch14_224", depth=1), "bsm")
    with pytest.raises(ValueError, match="attn_mask"):
        comparators.apply(build(), "bsm")(images(), attn_mask=torch.zeros(17, 17))
