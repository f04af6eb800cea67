"""UniAdapters against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fpet
from fpet import huggingface as hf
from fpet import retrieval
from fpet.retrieval.uniadapter import UniAdapter, add_uniadapters, remove_uniadapters
from retrieval_support import SMALL, tiny


def test_an_adapter_in_three_modes():
    torch.manual_seed(0)
    adapter = UniAdapter(8, 5, scale=0.3).double()
    torch.nn.init.normal_(adapter.up_text.weight)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    h = F.relu(F.layer_norm(x, (8,)) @ adapter.down.weight.t())
    text = h @ adapter.up_text.weight.t()
    cross = h @ adapter.up_cross.weight.t() + adapter.up_cross.bias + text
    assert torch.allclose(adapter(x, "text"), 0.3 * text)
    assert torch.allclose(adapter(x, "vision"), 0.3 * (h @ adapter.up_vision.weight.t() + adapter.up_vision.bias))
    assert torch.allclose(adapter(x, "cross"), 0.3 * F.layer_norm(cross, (8,)))
    with pytest.raises(ValueError, match="modality"):
        adapter(x, "audio")


@torch.no_grad()
def test_adapters_in_the_layers(batch):
    """Each layer's output against its formula, from what its parts were given."""
    model = tiny().double()
    add_uniadapters(model, 4, scale=0.5)
    hf.apply(model, 0)
    for adapter in model.uniadapters:
        torch.nn.init.normal_(adapter.up_text.weight)
    pixels, ids, mask = batch[0].double(), batch[1], batch[2]
    vision, text = model.vision_model.encoder.layers[0], model.text_encoder.encoder.layer[1]
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args, out)))
        for name, module in {
            "vision": vision, "mlp": vision.mlp, "norm": vision.layer_norm2, "text": text, "self": text.attention,
            "cross": text.crossattention,
        }.items()
    ]  # fmt: skip

    def layer(x):
        return text.output(text.intermediate(x), x)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    adapter0, adapter1 = model.uniadapters
    model(ids, pixels, attention_mask=mask)
    merged = seen["norm"][0][0]
    assert torch.allclose(first(seen["vision"][1]), merged + seen["mlp"][1] + adapter0(merged, "vision"))
    assert merged.shape[1] == 1 + 8
    query, crossed = first(seen["self"][1]), first(seen["cross"][1])[..., :16]
    want = layer(crossed) + adapter1(query, "text") + adapter1(crossed, "cross")
    assert torch.allclose(first(seen["text"][1]), want)
    model(ids, pixels, attention_mask=mask, use_itm_head=False)
    alone = first(seen["self"][1])
    assert torch.allclose(first(seen["text"][1]), layer(alone) + adapter1(alone, "text"))
    for handle in handles:
        handle.remove()


def test_adapters_come_and_go(batch):
    model = tiny()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.no_grad():
        before = model(batch[1], batch[0]).itm_score
        add_uniadapters(model, 4)
        assert not torch.equal(model(batch[1], batch[0]).itm_score, before)
        new = [name for name in model.state_dict() if name not in keys]
        assert {name.split(".")[0] for name in new} == {"uniadapters", "key_value_adapters"}
        with pytest.raises(ValueError, match="it has UniAdapters"):
            add_uniadapters(model)
        hf.apply(model, 1)
        hf.remove(model)  # which leaves the adapters
        assert hasattr(model, "uniadapters")
        remove_uniadapters(model)
        assert torch.equal(model(batch[1], batch[0]).itm_score, before)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert remove_uniadapters(model) is model


def test_merging_outlives_the_adapters(batch):
    model, other = tiny(), tiny()
    hf.apply(model, 1)
    remove_uniadapters(add_uniadapters(model, 4))
    hf.apply(other, 1)
    assert torch.equal(model(batch[1], batch[0]).itm_score, other(batch[1], batch[0]).itm_score)


def test_a_copy_has_adapters_of_its_own(batch):
    model = retrieval.prepare(tiny(), SMALL)
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(batch[1], batch[0]).itm_score
        assert torch.equal(other(batch[1], batch[0]).itm_score, want)
        for p in other.uniadapters.parameters():
            p.add_(1)
        assert torch.equal(model(batch[1], batch[0]).itm_score, want)
        assert not torch.equal(other(batch[1], batch[0]).itm_score, want)


def test_adapters_of_published_size():
    """12 layers of a BLIP of width 768 with a bottleneck of 512."""
    with torch.device("meta"):
        count = sum(p.numel() for p in UniAdapter(768, 512).parameters())
    assert count == 768 * 512 + 512 + 3 * (512 * 768 + 768) + 4 * 768
    model = tiny()
    add_uniadapters(model, 4, key_value_dim=3)
    counted = fpet.count_parameters(fpet.freeze(model))
    count = sum(p.numel() for p in model.uniadapters.parameters()) + 2 * (16 * 3 + 3 + 3 * 16 + 16 + 1)
    assert counted.adapters == counted.trainable == count


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True])
def test_keys_and_values_of_cross_attention_are_adapted(batch, merge):
    """The model with adapted keys and values is one without, each of whose projections was given what the adapters add."""
    model, plain = tiny().double(), tiny().double()
    for some, key_value_dim in ((model, 3), (plain, 0)):
        hf.apply(some, 0 if merge else None)
        add_uniadapters(some, 4, key_value_dim=key_value_dim)
    plain.uniadapters.load_state_dict(model.uniadapters.state_dict())
    pixels, ids, mask = batch[0].double(), batch[1], batch[2]
    before = plain(ids, pixels, attention_mask=mask).itm_score
    for name, adapter in model.key_value_adapters.items():
        assert adapter.scale == 1 and adapter.down.weight.std() < 0.05 and not adapter.up.bias.any()
        for p in adapter.parameters():
            torch.nn.init.normal_(p)
        for layer in plain.text_encoder.encoder.layer:
            projection = getattr(layer.crossattention.self, name)
            projection.weight += adapter.scale * adapter.up.weight @ adapter.down.weight
            projection.bias += adapter.scale * (adapter.up.weight @ adapter.down.bias + adapter.up.bias)
    got = model(ids, pixels, attention_mask=mask).itm_score
    assert torch.allclose(got, plain(ids, pixels, attention_mask=mask).itm_score, atol=1e-10)
    assert not torch.allclose(got, before, atol=1e-3)
    text = model(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
    assert torch.equal(text, plain(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score)


def test_adapters_start_as_published():
    torch.manual_seed(0)
    adapter = UniAdapter(64, 128)
    for layer in (adapter.down, adapter.up_vision, adapter.up_text, adapter.up_cross):
        assert not layer.bias.any()
    assert not adapter.up_text.weight.any()
    for layer in (adapter.up_vision, adapter.up_cross):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and layer.weight.abs().max() > 0.05
    assert adapter.down.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)


def test_adapters_that_cannot_be_shared():
    from transformers import BlipConfig, BlipForImageTextRetrieval

    both = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BlipForImageTextRetrieval(
        BlipConfig(
            vision_config={**both, "hidden_size": 24, "image_size": 16, "patch_size": 4},
            text_config={**both, "hidden_size": 16, "encoder_hidden_size": 24, "vocab_size": 30},
        )
    )
    with pytest.raises(ValueError, match=r"widths 24 and 16.*UniAdapter defines nothing"):
        add_uniadapters(model)
    with pytest.raises(TypeError, match="BlipForImageTextRetrieval"):
        add_uniadapters(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="key_value_dim"):
        add_uniadapters(tiny(), 4, key_value_dim=-1)
    for arguments in ({"hidden_dim": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            UniAdapter(8, **arguments)
