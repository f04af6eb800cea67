"""What learns and what stays."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import fpet
from fpet.train import Config, build_model, evaluate_run, train
from train_support import tuned


def test_the_backbone_stays_and_the_rest_moves(config: Config) -> None:
    torch.manual_seed(config.seed)
    start = build_model(config, 16)
    expected = {n: p.detach().clone() for n, p in start.named_parameters()}
    train(config)
    end = tuned(config)
    assert end.keys() == {n for n, p in start.named_parameters() if p.requires_grad}
    assert any("refinement" in n for n in end) and not any(".qkv." in n for n in end)
    moved = {n for n, v in end.items() if not torch.equal(v, expected[n])}
    assert moved == end.keys()


def test_keys_get_no_gradient_through_the_matching(config: Config) -> None:
    """With everything frozen but the merging block's qkv, its key part gets gradient through attention alone."""

    def key_gradient(reduction: str) -> Tensor:
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(config, reduction=reduction, drop_path=0.0), 16).eval()
        weight = model.blocks[3].attn.qkv.weight.requires_grad_(True)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        # The attention's own output cut off: only matching could carry a gradient.
        model.blocks[3].attn.proj.register_forward_hook(lambda module, args, out: out.detach())
        model(images).square().sum().backward()
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    assert not key_gradient("fpet").any()
    leaked = key_gradient("fpet-no-stop").view(3, 64, 64)
    assert leaked[1].any() and not leaked[0].any() and not leaked[2].any()


def test_refinement_lowers_the_loss(config: Config) -> None:
    """Nothing but the refinement is trained, so a lower loss is its doing."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, method="none", refinement_dropout=0.0), 16).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("refinement" in name)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(16, 64))
        for block in model.blocks[3:]:
            block.attn.qkv.weight.mul_(4)  # an untrained class token hardly looks at the patches
    images, labels = torch.rand(16, 3, 32, 32), torch.randint(16, (16,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == 2 * 32 * 32
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert min(losses) < losses[0]


def test_training_the_refinement_reaches_a_lower_loss_than_freezing_it() -> None:
    """Same seeds, same images, same steps; the head learns in both. Matches flip, so single runs scatter: the mean counts."""

    def lowest_loss(seed: int, refine: bool) -> float:
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=8
        )
        with torch.no_grad():  # weights with which attention and MLP do something
            for name, p in model.named_parameters():
                if p.dim() == 2:
                    p.copy_(torch.randn_like(p) * 1.5 / p.shape[1] ** 0.5)
                elif name == "pos_embed":
                    p.normal_()
        fpet.freeze(fpet.apply(model, 0, refinement={"dropout": 0.0, "bits": 32, "hidden_dim": 16})).train()
        refinement: Any = model.blocks[0].refinement
        before = [p.detach().clone() for p in refinement.parameters()]
        refinement.requires_grad_(refine)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.randn(48, 3, 16, 16, generator=generator), torch.randint(8, (48,), generator=generator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0)
        losses = []
        for _ in range(80):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for old, new in zip(before, refinement.parameters(), strict=True):
            assert torch.equal(old, new) != refine
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        return min(losses)

    trained, frozen = (sum(lowest_loss(seed, refine) for seed in range(4)) / 4 for refine in (True, False))
    assert trained < frozen - 0.02


def test_frozen_refinement_stays(config: Config) -> None:
    config = dataclasses.replace(config, refine=False, epochs=1, warmup_epochs=0.0)
    train(config)
    assert not any("refinement" in name for name in tuned(config))


def test_accumulation_and_checkpointing_change_nothing_but_rounding(config: Config) -> None:
    plain = dataclasses.replace(
        config, drop_path=0.0, dropout=0.0, refinement_dropout=0.0, lr=1e-3, epochs=1, warmup_epochs=0.0
    )
    train(plain)
    for name, change in {"accumulate": {"accumulate": 4}, "checkpointing": {"grad_checkpointing": True}}.items():
        other = dataclasses.replace(plain, output=f"{config.output}-{name}", **change)
        train(other)
        for key, value in tuned(plain).items():
            torch.testing.assert_close(tuned(other)[key], value, rtol=1e-3, atol=2e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("change", [{"amp": True}, {"method": "bi-lora"}, {"method": "vpt-deep", "hidden_dim": 2}], ids=str)
def test_other_settings_train(config: Config, change: dict[str, Any]) -> None:
    result = train(dataclasses.replace(config, epochs=1, warmup_epochs=0.0, **change))
    assert 0 <= result.accuracy <= 1 and result.train_loss < 5


def test_ltmp_trains_with_its_penalty_and_comes_back(config: Config) -> None:
    config = dataclasses.replace(config, reduction="ltmp", ltmp_target=0.1, accumulate=2)
    result = train(config)
    assert result.refinement == 2 * 6
    moved = [v for n, v in tuned(config).items() if n.endswith("thresholds.merge")]
    assert len(moved) == 6 and all(v < 0.9 for v in moved), "a tenth of the FLOPs needs lower thresholds"
    assert evaluate_run(config.output).accuracy == pytest.approx(result.accuracy)
