"""Weights of a backbone: files as users have them, files that are refused, and no network."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from fpet.train import Config, ConfigError, build_model, train
from fpet.train.build import backbone, load_weights
from fpet.train.inputs import resolve

MODEL = "test_vit"  # timm's smallest: 160 pixels in patches of 16


@pytest.fixture(scope="module")
def source() -> Any:
    torch.manual_seed(3)
    return timm.create_model(MODEL, num_classes=7)


def config(tmp_path: Path, **changes: Any) -> Config:
    return resolve(Config(model=MODEL, output=str(tmp_path / "run"), progress=False, **changes))


@pytest.mark.parametrize("kind", ["pth", "safetensors", "checkpoint", "module"])
@pytest.mark.parametrize("size", [160, 96, 224])
def test_weights_of_another_image_size_are_resampled_as_timm_does(source: Any, tmp_path: Path, kind: str, size: int) -> None:
    state, path = source.state_dict(), tmp_path / "weights.pth"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save(
            {
                "pth": state,
                "checkpoint": {"state_dict": state, "epoch": 3},
                "module": {f"module.{n}": v for n, v in state.items()},
            }[kind],
            path,
        )
    model: Any = backbone(config(tmp_path, weights=str(path), image_size=size), 3)
    grid = (size // 16, size // 16)
    assert torch.allclose(model.pos_embed, resample_abs_pos_embed(source.pos_embed, grid, num_prefix_tokens=1), atol=1e-6)
    for name, value in source.state_dict().items():
        if name != "pos_embed" and not name.startswith("head."):
            assert torch.equal(model.state_dict()[name], value), name
    assert model.head.out_features == 3
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


def test_a_head_that_fits_is_taken_and_patches_are_resampled(source: Any, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model: Any = backbone(config(tmp_path, weights=str(tmp_path / "weights.pth")), 7)
    assert torch.equal(model.head.weight, source.head.weight)
    other: Any = timm.create_model(MODEL, patch_size=8, img_size=80, num_classes=2)
    load_weights(other, tmp_path / "weights.pth")
    assert other.patch_embed.proj.weight.shape[-1] == 8 and torch.equal(other.norm.weight, source.norm.weight)


def test_weights_of_jax_are_resampled_too(tmp_path: Path) -> None:
    """A file with the names of the published ViT-B_16.npz, of a small ViT."""
    torch.manual_seed(0)
    source: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=4)
    width, heads = 192, 3
    block = "Transformer/encoderblock_0"
    entries = {
        "embedding/kernel": source.patch_embed.proj.weight.permute(2, 3, 1, 0), "embedding/bias": source.patch_embed.proj.bias,
        "cls": source.cls_token, "Transformer/posembed_input/pos_embedding": source.pos_embed,
        "Transformer/encoder_norm/scale": source.norm.weight, "Transformer/encoder_norm/bias": source.norm.bias,
        f"{block}/LayerNorm_0/scale": source.blocks[0].norm1.weight, f"{block}/LayerNorm_0/bias": source.blocks[0].norm1.bias,
        f"{block}/LayerNorm_2/scale": source.blocks[0].norm2.weight, f"{block}/LayerNorm_2/bias": source.blocks[0].norm2.bias,
    }  # fmt: skip
    for name, weight, bias in zip(
        ("query", "key", "value"),
        source.blocks[0].attn.qkv.weight.chunk(3),
        source.blocks[0].attn.qkv.bias.chunk(3),
        strict=True,
    ):
        entries[f"{block}/MultiHeadDotProductAttention_1/{name}/kernel"] = weight.t().reshape(width, heads, width // heads)
        entries[f"{block}/MultiHeadDotProductAttention_1/{name}/bias"] = bias.reshape(heads, width // heads)
    out = source.blocks[0].attn.proj
    entries[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = out.weight.t().reshape(heads, width // heads, width)
    entries[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = out.bias
    for i, layer in enumerate((source.blocks[0].mlp.fc1, source.blocks[0].mlp.fc2)):
        entries[f"{block}/MlpBlock_3/Dense_{i}/kernel"], entries[f"{block}/MlpBlock_3/Dense_{i}/bias"] = (
            layer.weight.t(),
            layer.bias,
        )
    numpy.savez(tmp_path / "vit.npz", **{name: value.detach().numpy() for name, value in entries.items()})
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1, num_classes=3)
    load_weights(model, tmp_path / "vit.npz")
    assert torch.allclose(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape[1] == 37 and not torch.allclose(model.pos_embed[:, :2], torch.zeros(()), atol=1e-3)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "other model", "other width", "text.npz", "folder"])
def test_files_that_are_no_weights_of_this_model_are_refused_in_one_line(source: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("weights.npz" if kind.endswith("npz") else "weights.pth")
    if kind == "other model":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif kind == "other width":
        torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6).state_dict(), path)
    elif kind == "cut":
        torch.save(source.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("" if kind == "empty" else "these are no weights")
    settings = Config(
        model=MODEL, weights=str(path), output=str(tmp_path / "run"), progress=False, data="shapes", train_count=80
    )
    with pytest.raises(ConfigError, match="weights: ") as error:
        train(settings)
    assert len(str(error.value).splitlines()) == 1 and (str(path) in str(error.value))
    # The folder is as good as new.
    torch.save(source.state_dict(), tmp_path / "good.pth")
    good = dataclasses.replace(
        settings,
        weights=str(tmp_path / "good.pth"),
        epochs=1,
        batch_size=40,
        test_count=10,
        train_count=40,
        image_size=32,
        lr=1e-3,
    )
    if kind == "text":
        assert train(good).accuracy is not None


def test_without_a_network_the_file_is_named_after_one_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[Any] = []

    def no_route(address: Any, timeout: float | None = None) -> None:
        attempts.append(address)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", no_route)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError,
        match=r"model: the weights of vit_tiny_patch16_224 can't be fetched.*model.safetensors of timm/vit_tiny.*--weights FILE",
    ):
        build_model(resolve(Config(model="vit_tiny_patch16_224", image_size=32, output=str(tmp_path))), 2)
    assert len(attempts) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "model: 'resnet18' can't be tuned here: .*vision transformers"),
        ("swin_tiny_patch4_window7_224", "model: 'swin_tiny_patch4_window7_224' can't be tuned here: .*Swin"),
        ("vit_b_16", "model: 'vit_b_16' is torchvision's.*timm's of the same kind is 'vit_base_patch16_224'"),
        ("vit_tiny_patch16_223", "got 'vit_tiny_patch16_223'; did you mean vit_tiny_patch16_224"),
    ],
)
def test_models_that_can_not_be_tuned_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(Config(model=name, output=str(tmp_path / "run"), pretrained=False))
    assert not (tmp_path / "run").exists()
