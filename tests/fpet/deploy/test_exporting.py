"""Exported files compute what the model computes, for batches of one and of five, without this package where they promise it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import fpet
from fpet.deploy import FORMATS, export
from fpet.deploy.exporting import runner
from fpet_kernels import alternating, bdm_merge, bdm_unmerge
from fpet_kernels.decompositions import inference_decompositions


def small(method: str | None = "lora", layer: int | None = 1, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5, **arguments)
    if method is not None:
        fpet.add_adapters(model, method)
        for name, parameter in model.named_parameters():
            if "lora" in name or "adapter" in name:
                nn.init.normal_(parameter, std=0.02)
    return fpet.apply(model, layer=layer, refinement=True if layer is not None else None)


def images(count: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_file_computes_what_the_model_computes(tmp_path: Path, format: str) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"--format onnx needs {package}")
    model, path = small(), tmp_path / FORMATS[format][0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = export(model, path, format=format, images=images(3), metadata={"class_names": ["ä", "b", "c", "d", "e"]})
    assert found.folded and found.agreement == 1 and found.error < 1e-5 and found.path == path
    told = json.loads(found.metadata.read_text(encoding="utf-8"))
    assert told["class_names"][0] == "ä" and told["input"] == {"shape": ["batch", 3, 64, 64], "dtype": "float32"}
    assert set(told["latency_ms"]) == {"eager", "exported", "threads"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, found.metadata.name]), "nothing else is left"
    after = model.state_dict()
    assert model.training and after.keys() == before.keys() and all(torch.equal(after[n], v) for n, v in before.items())

    run = runner(path, format)
    for count in (1, 5):
        others = images(count, seed=2)
        with torch.no_grad():
            torch.testing.assert_close(run(others), model.eval()(others), atol=1e-5, rtol=1e-4)
    with pytest.raises(FileExistsError, match=path.name):
        export(model, path, format=format, images=images(1))


def test_onnx_holds_standard_operators_only(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="--format onnx needs onnx")
    export(small("adaptformer"), tmp_path / "model.onnx", format="onnx", images=images(2))
    loaded = onnx.load(str(tmp_path / "model.onnx"))
    assert {entry.domain for entry in loaded.opset_import} <= {"", "ai.onnx"}
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}
    runs_alone = (
        "import sys, numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(tmp_path / 'model.onnx')!r})\n"
        "assert session.run(None, {'images': numpy.zeros((4, 3, 64, 64), 'float32')})[0].shape == (4, 5)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", runs_alone], check=True)


def test_what_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner
    monkeypatch.setattr("fpet.deploy.exporting.runner", lambda *a: lambda x: real(*a)(x) + 0.1)
    with pytest.raises(RuntimeError, match=r"differs from the eager one by .* nothing was written"):
        export(small(), tmp_path / "exported.pt2", format="torch", images=images(1))
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: expected one of torch, aoti, onnx, got 'tflite'"):
        export(small(), tmp_path / "x", format="tflite", images=images(1))
    with pytest.raises(ValueError, match="images: expected"):
        export(small(), tmp_path / "x.pt2", format="torch", images=images(0))


@pytest.mark.parametrize("layers", [1, (0, 1)])
def test_decompositions_give_what_the_operators_give(layers: Any) -> None:
    """In float64, where nothing but the formula can differ; through one merge and two."""
    model = small(None, layers).double().eval()
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=1)}
        program = torch.export.export(model, (images(2).double(),), dynamic_shapes=(batch,))
        plain = program.run_decompositions(inference_decompositions())
        assert not [node for node in plain.graph.nodes if "fpet" in str(node.target)]
        for count in (1, 5):
            torch.testing.assert_close(plain.module()(images(count).double()), model(images(count).double()))


def test_unmerging_other_splits_sizes_and_no_prefix_decompose_too() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor, key: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
            merged = bdm_merge(x, key, split=alternating(9), num_prefix_tokens=0, size=size, similarity="dot")
            return *merged, bdm_unmerge(merged.tokens, merged.match, split=alternating(9), num_prefix_tokens=0)

    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 9, 6, generator=g), torch.randn(2, 3, 9, 4, generator=g), torch.rand(2, 9, 1, generator=g) + 1)
    with torch.no_grad():
        program = torch.export.export(Both(), inputs).run_decompositions(inference_decompositions())
        for found, expected in zip(program.module()(*inputs), Both()(*inputs), strict=True):
            torch.testing.assert_close(found, expected)
