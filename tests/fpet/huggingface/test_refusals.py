"""What merging in transformers' encoders refuses, by name and before anything changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="fpet.huggingface needs transformers")

from transformers import (  # noqa: E402
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from fpet import huggingface as hf  # noqa: E402
from huggingface_support import DEPTH, FAMILIES, SIDE, VISION  # noqa: E402


@pytest.fixture
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Changed(ViTModel):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwinModel(SwinConfig(embed_dim=16, depths=[1], num_heads=[2], image_size=32)), "no knowledge of a vision"),
        (lambda: nn.Linear(2, 2), "no knowledge of a vision encoder"),
        (lambda: Changed(ViTConfig(**VISION)), "Changed is a subclass of ViTModel"),
        (lambda: nn.ModuleList([FAMILIES["vit"](), FAMILIES["clip"]()]), "holds 2 vision encoders"),
        (lambda: nn.DataParallel(FAMILIES["vit"]()), "unwrapped model"),
    ],
)
def test_models_that_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        hf.apply(make(), 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": DEPTH}, ValueError, rf"range\({DEPTH}\)"),
        ({"layer": (0, 0)}, ValueError, "at most once"),
        ({"layer": "1"}, ValueError, "layer"),
        ({"layer": 1.0}, TypeError, "layer: expected an int"),
        ({"layer": 1, "similarity": "l2"}, ValueError, "similarity"),
        ({"layer": 1, "attention": "flash"}, ValueError, "attention: expected 'eager', 'sdpa'"),
        ({"layer": 1, "proportional_attention": "yes"}, ValueError, "proportional_attention"),
        ({"layer": (0, 1), "refinement": nn.Identity()}, ValueError, "refinement: expected a dict"),
        ({"layer": 1, "refinement": 3}, TypeError, "refinement"),
        ({"layer": (0, 1, 2)}, None, ""),
    ],
)
def test_arguments(arguments, error, message):
    model = FAMILIES["vit"]()
    classes = [type(m) for m in model.modules()]
    if error is None:
        hf.apply(model, **arguments)
        return
    with pytest.raises(error, match=message):
        hf.apply(model, **arguments)
    assert [type(m) for m in model.modules()] == classes


def test_an_attention_that_cannot_weigh_is_refused():
    model = FAMILIES["clip"]()
    hf.find_vision_encoder(model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match="'flash_attention_2', which can't weigh tokens by size"):
        hf.apply(model, 1)
    hf.apply(model, 1, attention="sdpa")


def test_a_replaced_forward_is_refused_where_it_would_lose_something(images):
    model = FAMILIES["blip"]().double()
    layers, own = model.encoder.layers, model.encoder.layers[0].forward
    layers[0].forward = lambda hidden_states, *args, **kwargs: own(hidden_states, *args, **kwargs)
    before = model(images).last_hidden_state
    assert torch.equal(hf.apply(model, None)(images).last_hidden_state, before)
    hf.apply(model, 1)(images)  # a layer before the merge is called as transformers calls it
    layers[2].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(
        RuntimeError, match="attention of layer 2: its forward was replaced by one without the argument 'sizes'"
    ):
        model(images)
    hf.apply(model, 1, proportional_attention=False)(images)
    with pytest.raises(RuntimeError, match="layer 0: its forward was replaced"):
        hf.apply(model, 0)(images)


def test_arguments_that_merging_would_not_honour(images):
    model = hf.apply(FAMILIES["vit"]().double(), 1)
    with pytest.raises(ValueError, match="pixel_values"):
        model(None)
    with pytest.raises(TypeError, match=r"patched by fpet\.huggingface\.apply"):
        hf.merged_features(nn.Linear(2, 2), images)
    with pytest.raises(TypeError, match="expected a BlipForImageTextRetrieval"):
        hf.encode_image(model, images)


def test_transformers_is_optional():
    code = (
        "import sys; import fpet; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None\n"
        "try: import fpet.huggingface\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'transformers>=4.57'" in result.stdout
