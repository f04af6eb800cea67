"""Whatever fpet.save writes, fpet.load takes on a fresh backbone; what can't be is refused by save, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fpet
from fpet import comparators
from fpet.layers.quantize import QuantizedLinear


def vit(num_classes: int = 5, name: str = "test_vit", **arguments: Any) -> Any:
    """A backbone whose weights do not depend on its head."""
    torch.manual_seed(0)
    body = timm.create_model(name, num_classes=0, **arguments)
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    model.load_state_dict(body.state_dict(), strict=False)
    return model.eval()


def images(side: int = 160) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def step(model: Any, side: int = 160) -> Any:
    """One of training, of all that has requires_grad."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    model.train()
    out = model(torch.randn(4, 3, side, side))
    nn.functional.cross_entropy(out, torch.arange(4) % out.shape[1]).backward()
    optimizer.step()
    return model.eval()


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fpet"])


def tuned(method: str = "lora", **arguments: Any) -> Any:
    return fpet.freeze(fpet.add_adapters(vit(**arguments), method))


def replaced_head() -> tuple[Any, Any]:
    model = vit(1000)
    model.head = nn.Linear(64, 7)
    return step(fpet.freeze(fpet.add_adapters(model, "lora"))), None


def compiled() -> tuple[Any, Any]:
    model = tuned()
    outer = torch.compile(model, backend="eager")
    step(outer)
    return outer, model


def compiled_blocks() -> tuple[Any, Any]:
    model = tuned()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return step(model), None


def data_parallel() -> tuple[Any, Any]:
    model = step(tuned())
    return nn.DataParallel(model), model


def averaged() -> tuple[Any, Any]:
    model = torch.optim.swa_utils.AveragedModel(step(tuned()))
    return model, model.module


def norms() -> tuple[Any, Any]:
    model = tuned()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)
    return step(model), None


def position() -> tuple[Any, Any]:
    model = tuned("none")
    model.pos_embed.requires_grad_(True)
    model.cls_token.requires_grad_(True)
    return step(model), None


def reduced() -> tuple[Any, Any]:
    model = comparators.apply_reduction(tuned("none"), "tome", r=3)
    return step(fpet.freeze(model)), None


def without_stop() -> tuple[Any, Any]:
    model = comparators.apply_reduction(tuned("bi-lora"), "fpet-no-stop", layer=2)
    return step(fpet.freeze(model)), None


@pytest.mark.parametrize(
    "made",
    [replaced_head, compiled, compiled_blocks, data_parallel, averaged, norms, position, reduced, without_stop],
    ids=lambda made: made.__name__,
)
@pytest.mark.parametrize("into", ["plain", "compiled"])
def test_what_is_written_can_be_loaded(made: Callable[[], tuple[Any, Any]], into: str, tmp_path: Path) -> None:
    model, plain = made()
    expected = (model if plain is None else plain)(images())
    fpet.save(model, tmp_path / "a.safetensors")
    fresh = vit(3)
    target = torch.compile(fresh, backend="eager") if into == "compiled" else fresh
    assert fpet.load(target, tmp_path / "a.safetensors") is target
    torch.testing.assert_close(fresh.eval()(images()), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_was_never_frozen_is_saved_whole(tmp_path: Path) -> None:
    model = step(fpet.apply(vit(), 2, refinement=True))
    with pytest.warns(UserWarning, match=r"whole backbone has requires_grad, so the file holds all of it; call fpet\.freeze"):
        fpet.save(model, tmp_path / "all.safetensors")
    torch.testing.assert_close(fpet.load(vit(), tmp_path / "all.safetensors")(images()), model(images()))


def test_running_statistics_of_batch_norms_are_saved(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"name": "vit_small_resnet26d_224", "img_size": 64, "depth": 2}
    model = vit(**arguments)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    fpet.apply(fpet.add_adapters(model, "lora"), 1)
    before = {n: b.clone() for n, b in model.named_buffers()}
    step(fpet.freeze(model), 64)
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers())
    fpet.save(model, tmp_path / "bn.safetensors")
    loaded = fpet.load(vit(**arguments), tmp_path / "bn.safetensors")
    torch.testing.assert_close(loaded(images(64)), model(images(64)))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(loaded.named_buffers())[name]), name


class Cosine(nn.Linear):
    """A head with a Linear's parameters that computes something else."""


def with_head(head: nn.Module) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        model.head = head
        return model

    return change


def slot(name: str, module: nn.Module) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        fpet.apply(model, 2)
        setattr(model.blocks[2], name, module)
        return model

    return change


def extra(model: Any) -> Any:
    model.own = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_head(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))),
            "got Sequential, which fpet.load could not make",
        ),
        (with_head(Cosine(64, 5)), "got Cosine, which fpet.load could not make"),
        (with_head(nn.Linear(64, 5, bias=False)), r"expected head.bias of shape \(5,\), as fpet.load makes it, got none"),
        (slot("adapter_mlp", nn.Linear(64, 64)), "blocks.2.adapter_mlp.weight was trained, but fpet.load could not make"),
        (slot("adapter_mlp", fpet.adapters.BottleneckAdapter(64, 64, 2, activation="relu")), "adapter_down.weight was trained"),
        (slot("refinement", nn.Linear(32, 32)), "expected blocks.2.refinement to be a KeyRefinement, got Linear"),
        (extra, "own.bias was trained, and timm's test_vit has no such parameter"),
    ],
)
def test_save_refuses_by_name_what_can_not_be_loaded(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    model = fpet.freeze(change(vit()))
    if hasattr(model, "own"):
        model.own.requires_grad_(True)
    with pytest.raises(TypeError, match=message):
        fpet.save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_wrapper_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected the timm vision transformer itself, got Sequential around one: save that"):
        fpet.save(nn.Sequential(tuned()), tmp_path / "a.safetensors")


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    names = ["Äpfel", "b", "c", "d", "e"]
    fpet.save(tuned(), path, class_names=names, metadata={"who": "me"})
    found = header(path)
    assert found["class_names"] == names and found["metadata"] == {"who": "me"}
    described = {k: found["backbone"][k] for k in ("name", "tag", "image_size", "patch_size", "channels", "dtype")}
    assert described == {
        "name": "test_vit", "tag": "test_vit.r160_in1k", "image_size": [160, 160], "patch_size": [16, 16], "channels": 3,
        "dtype": "float32",
    }  # fmt: skip
    known = timm.data.resolve_model_data_config(vit())
    assert found["preprocessing"]["mean"] == list(known["mean"]) and found["preprocessing"]["size"] == [160, 160]
    with pytest.raises(ValueError, match="class_names: expected 5, one for each class of the head, got 1"):
        fpet.save(tuned(), path, class_names=["a"])
    with pytest.raises(ValueError, match="metadata: expected texts by text, got 3 for 'n'"):
        fpet.save(tuned(), path, metadata={"n": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: vit(img_size=96), r"expected image size \[160, 160\], got \[96, 96\]"),
        (lambda: vit(name="test_vit2"), "expected name test_vit, got test_vit2"),
        (lambda: vit(in_chans=1), "expected channels 3, got 1"),
        (lambda: vit().double(), "expected dtype float32, got float64"),
        (lambda: vit(depth=3), "expected depth 6, got 3"),
        (lambda: changed("blocks.3.mlp.fc1.weight"), "blocks.3.mlp.fc1.weight has another shape or other values"),
        (lambda: vit(init_values=0.1), "the model also has blocks.0.ls1.gamma"),
    ],
)
def test_a_refused_backbone_is_told_what_differs_first(other: Callable[[], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fpet.save(tuned(), path)
    with pytest.raises(ValueError, match=message):
        fpet.load(other(), path)


def changed(name: str) -> Any:
    model = vit()
    with torch.no_grad():
        model.get_parameter(name)[0] += 1
    return model


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lookup_tables_outlive_to_empty_and_assignment(bits: int) -> None:
    layer = QuantizedLinear(16, 8, bits)
    x, state = torch.randn(3, 16), layer.state_dict()
    expected = layer(x)
    emptied = QuantizedLinear(16, 8, bits).to(device="meta").to_empty(device="cpu")
    emptied.load_state_dict(state)
    assert torch.equal(emptied(x), expected)
    with torch.device("meta"):
        assigned = QuantizedLinear(16, 8, bits)
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(x), expected)
    assert torch.equal(emptied.half().float().table, layer.table)
