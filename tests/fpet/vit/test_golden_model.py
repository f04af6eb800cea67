"""Logits, loss and gradients of whole tuned models against data made by the authors' published implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import fpet

FILES = sorted((Path(__file__).parents[2] / "golden_model").glob("*.npz"))


def build(data, backend):
    meta = json.loads(str(data["meta"]))
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model = VisionTransformer(**{name: meta[name] for name in names})
    fpet.add_adapters(model, meta["method"], hidden_dim=meta["hidden_dim"], scale=meta["scale"], bits=meta["bits"])
    if meta["merge_layer"] is not None:
        fpet.apply(
            model, meta["merge_layer"], refinement=meta["refinement"], backend=backend, similarity=meta["similarity"],
            proportional_attention=meta["proportional_attention"],
        )  # fmt: skip
    parameters = {k.removeprefix("param/"): torch.from_numpy(data[k]) for k in data.files if k.startswith("param/")}
    model.load_state_dict(parameters, strict=True)  # the authors' names are ours
    return fpet.freeze(model).double().eval()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_the_authors_code(path, backend, device):
    data = np.load(path)
    model = build(data, backend).to(device)
    image = torch.from_numpy(data["image"]).to(device)
    logits = model(image)
    loss = F.cross_entropy(logits, torch.from_numpy(data["target"]).to(device))
    np.testing.assert_allclose(logits.detach().cpu(), data["logits"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(loss.detach().cpu(), data["loss"], rtol=0, atol=1e-9)
    if "size_out" in data.files:
        size = fpet.merged_features(model, image).size
        np.testing.assert_allclose(size.detach().cpu(), data["size_out"], rtol=0, atol=1e-9)

    loss.backward()
    expected = {k.removeprefix("grad/"): data[k] for k in data.files if k.startswith("grad/")}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        np.testing.assert_allclose(parameter.grad.cpu(), expected[name], rtol=0, atol=1e-8, err_msg=name)
        assert np.abs(expected[name]).max() > 1e-6, f"{name}: a gradient of zero would prove nothing"


def test_there_is_golden_data():
    assert len(FILES) == 4
