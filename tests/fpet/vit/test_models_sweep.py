"""timm's registered vision transformers, one by one: patched without merging they compute the same, or they are refused."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from timm.models._registry import _module_to_models

import fpet
from fpet.vit.models import TIMM_MODELS

FAMILIES = ("vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos")
# The same few classes behind other stems; one of each is enough, as a convolutional stem takes a second to build.
OTHERS = ("vit_tiny_r_s16_p8_224", "vit_base_mci_224", "vitamin_small_224")
NAMES = sorted(
    name
    for family in FAMILIES
    for name in _module_to_models[family]
    if not name.endswith("_sam")  # deprecated aliases of names that are in the list, whose weights can't be named any more
)


def build(name: str) -> torch.nn.Module:
    """The model at 3 blocks of width 96 on 4×4 patches, its parameters random so that no branch is close to zero."""
    size = dict(depth=3, num_classes=5, mlp_ratio=2.0)
    if name in OTHERS:  # the stem decides on width and patches
        size |= dict(img_size=64)
    else:
        size |= dict(img_size=32, patch_size=8, embed_dim=96, num_heads=4)
    if "sapiens2" in name:
        size |= dict(num_kv_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, **size).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() == 1 else 0.15))
    return model


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
@torch.no_grad()
def test_patched_model_without_merging_reproduces_the_model(name: str) -> None:
    model = build(name)
    assert type(model) in TIMM_MODELS, "a class that timm added: support it or put it among the refused"
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    features, logits = model.forward_features(images), model(images)
    names = [key for key, _ in model.named_parameters()]

    fpet.apply(model, layer=None)
    torch.testing.assert_close(model.forward_features(images), features, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model(images), logits, rtol=2e-5, atol=2e-5)
    assert [key for key, _ in model.named_parameters()] == names

    fpet.apply(model, layer=1)
    n, grid = features.shape[1], model.patch_embed.grid_size
    merged = fpet.merged_features(model, images)
    assert merged.tokens.shape[1] == n - (grid[0] * grid[1] + 1) // 2
    assert torch.equal(merged.size.sum(1), torch.full((2, 1), float(n)))
    assert model(images).shape == logits.shape and model(images).isfinite().all()
    # Every original position gets its token back, so timm's own pooling over them is pooling by size.
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images), rtol=2e-5, atol=2e-5)

    fpet.remove(model)
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("samvit_base_patch16_224", "windows"),
        ("swin_tiny_patch4_window7_224", "windows"),
        ("swinv2_tiny_window8_256", "windows"),
        ("hiera_tiny_224", "mask units"),
        ("naflexvit_base_patch16_gap", "padded"),
        ("cait_xxs24_224", "no knowledge"),
        ("deit3_small_patch16_224", None),
        ("xcit_nano_12_p16_224", "no knowledge"),
        ("convit_tiny", "no knowledge"),
        ("volo_d1_224", "no knowledge"),
        ("levit_128s", "no knowledge"),
        ("resnet18", "no knowledge"),
    ],
)
def test_refused_models_say_why(name: str, reason: str | None) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = type(model)
    if reason is None:
        fpet.apply(model, layer=3)
        return
    with pytest.raises(TypeError, match=reason):
        fpet.apply(model, layer=3)
    assert type(model) is before


def test_patch_dropout_is_refused() -> None:
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):
        model = timm.create_model(name, patch_drop_rate=0.2, depth=1)
        with pytest.raises(TypeError, match="patch dropout"):
            fpet.apply(model, layer=0)
        assert type(model) in TIMM_MODELS


def test_unknown_block_attention_and_subclass_are_refused_untouched() -> None:
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    class MyAttention(Attention):
        pass

    class MyBlock(Block):
        pass

    class MyModel(VisionTransformer):
        pass

    tiny = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    for model, reason in (
        (VisionTransformer(**tiny, attn_layer=MyAttention), "MyAttention"),
        (VisionTransformer(**tiny, block_fn=MyBlock), "MyBlock"),
        (MyModel(**tiny), "subclass of timm's VisionTransformer"),
    ):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(TypeError, match=reason):
            fpet.apply(model, layer=0)
        assert [type(m) for m in model.modules()] == classes
