"""What fpet.freeze leaves trainable in models that hold more than a timm transformer, and how peft and fpet go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fpet
from fpet.adapters.freezing import parameter_roles

peft = pytest.importorskip("peft")


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, **arguments).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


class Tower(nn.Module):
    """A wrapper with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.own_head = vit(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.own_head(self.body(x))


def test_a_wrappers_own_parameters_stay_as_they_are() -> None:
    model = Tower()
    fpet.add_adapters(model, "lora")
    fpet.apply(model, 2, refinement=True)
    assert model.body.adapter_config.method == "lora"
    model.own_head.bias.requires_grad_(False)
    names = trained(fpet.freeze(model))
    assert "own_head.weight" in names and "own_head.bias" not in names
    assert "body.head.weight" in names and "body.blocks.2.refinement.adapter_up.weight" in names
    assert not any("qkv" in n or "norm" in n for n in names)
    assert parameter_roles(model)["own_head.weight"] == "outside"
    fpet.remove_adapters(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_module_in_a_blocks_slot_is_an_adapter() -> None:
    model = vit()
    fpet.apply(model, 2)
    model.blocks[1].adapter_mlp = nn.Linear(64, 64)
    model.blocks[2].refinement = nn.Linear(32, 32)
    names = trained(fpet.freeze(model))
    assert {"blocks.1.adapter_mlp.weight", "blocks.2.refinement.weight"} <= names
    counted = fpet.count_parameters(model)
    assert counted.adapters == 64 * 65 and counted.refinement == 32 * 33


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("ViT", {"classifier.weight", "classifier.bias"}),
        ("CLIP", {"classifier.weight", "classifier.bias"}),
        ("Siglip", {"classifier.weight", "classifier.bias"}),
        ("DeiT", {f"{kind}_classifier.{p}" for kind in ("cls", "distillation") for p in ("weight", "bias")}),
    ],
)
def test_a_transformers_model_keeps_its_classifier_trainable(name: str, heads: set[str]) -> None:
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    if name == "CLIP":
        config = transformers.CLIPConfig(vision_config=small)
        model = transformers.CLIPForImageClassification(config)
    elif name == "Siglip":
        model = transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=small))
    elif name == "DeiT":
        model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**small))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**small))
    merges = name != "DeiT"
    if merges:
        fpet.huggingface.apply(model, 1, refinement=True)
    names = trained(fpet.freeze(model))
    assert {n for n in names if "refinement" not in n} == heads
    assert any("refinement" in n for n in names) == merges
    assert fpet.count_parameters(model).head == sum(p.numel() for n, p in model.named_parameters() if n in heads)


def lora(**arguments: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False, **arguments)


def test_freeze_leaves_peft_to_peft() -> None:
    model = peft.get_peft_model(vit(), lora(modules_to_save=["head"]))
    before = trained(model)
    fpet.apply(model, 2, refinement=True)
    names = trained(fpet.freeze(model))
    assert before <= names and {n for n in names - before if "refinement" not in n} == set()
    assert not any("original_module" in n for n in names)
    assert fpet.count_parameters(model).adapters >= sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_pefts_way_saves_the_refinement(tmp_path: Path) -> None:
    merging = {"refinement": True}
    model = peft.get_peft_model(fpet.apply(vit(), 2, **merging), lora(modules_to_save=["head", "refinement"]))
    names = trained(model)
    assert any("refinement" in n for n in names) and trained(fpet.freeze(model)) == names
    expected = shaken(model)(images())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fpet.apply(vit(), 2, **merging), tmp_path).eval()
    torch.testing.assert_close(again(images()), expected)
    plain = peft.PeftModel.from_pretrained(fpet.apply(vit(), 2, **merging), tmp_path).eval()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "refinement" in name:
                p.zero_()
    assert not torch.allclose(plain(images()), expected)  # the refinement that came back is at work


@pytest.mark.parametrize("wrapped", [True, False])
def test_save_refuses_what_is_pefts(wrapped: bool, tmp_path: Path) -> None:
    base = vit()
    model = peft.get_peft_model(base, lora())
    with pytest.raises(TypeError, match=r"lora_A.* more parameters are the peft library's, .*save_pretrained"):
        fpet.save(model if wrapped else base, tmp_path / "peft.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lora", "fact-tt"])
def test_fold_goes_into_the_layers_inside_pefts(method: str) -> None:
    model = peft.get_peft_model(vit(), lora())
    fpet.add_adapters(model, method, hidden_dim=2)
    expected = shaken(fpet.freeze(model))(images())
    fpet.fold(model)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "dora"), [("repadapter", False), ("ssf", False), ("lora", True)])
def test_what_can_not_be_folded_over_peft_says_so(method: str, dora: bool) -> None:
    model, clean = vit(), None
    if method == "lora":
        model = peft.get_peft_model(model, lora(use_dora=dora))
        fpet.add_adapters(model, method, hidden_dim=2)
    else:
        fpet.add_adapters(model, method)
        peft.inject_adapter_in_model(lora(), model)
    clean = model(images())
    with pytest.raises(TypeError, match=r"got peft's (lora|layer)\.Linear, whose own adapter .*merge_and_unload"):
        fpet.fold(model)
    torch.testing.assert_close(model(images()), clean)
