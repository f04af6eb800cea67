"""Merging in transformers' vision encoders, against a straightforward implementation in float64 and transformers' own code."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="fpet.huggingface needs transformers")

from transformers import (  # noqa: E402
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)

from fpet import huggingface as hf  # noqa: E402
from huggingface_support import DEPTH, FAMILIES, GRID, HEADS, SIDE, TEXT, VISION, WIDTH, spread  # noqa: E402


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return spread(FAMILIES[request.param]()).double().eval()


@pytest.fixture
def retrieval():
    return spread(BlipForImageTextRetrieval(BlipConfig(vision_config=VISION, text_config=TEXT))).double().eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def texts():
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 7, dtype=torch.long)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return ids, mask


def tensors(output):
    return [value for value in output.to_tuple() if torch.is_tensor(value)]


def tokens_of(output):
    return output[0] if isinstance(output, tuple) else output  # CLIP's layers in transformers 4


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


# --- the straightforward implementation -------------------------------------------------------------------------------


def attention(q, k, v, size=None):
    """(B, N, D), heads side by side; each key counts ``size`` (B, N) times."""
    q, k, v = (t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).exp()
    if size is not None:
        weights = weights * size[:, None, None, :]
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


def merge(x, key, size, prefix, refinement, similarity="cosine"):
    """Section 4.2 of the paper, one image at a time; hard in the forward, soft in the backward."""
    tokens, sizes = [], []
    cells = [(r, c) for r in range(GRID) for c in range(GRID)]
    a = [prefix + i for i, (r, c) in enumerate(cells) if (r + c) % 2 == 0]
    b = [prefix + i for i, (r, c) in enumerate(cells) if (r + c) % 2 == 1]
    for xi, ki, ni in zip(x, key, size, strict=True):
        ki = ki.view(len(ki), HEADS, -1).mean(1).detach()
        if refinement is not None:
            ki = ki + F.relu(ki @ refinement.down_weight().t()) @ refinement.up_weight().t()
        if similarity == "cosine":
            ki = F.normalize(ki, dim=-1)
        scores = ki[a] @ ki[b].t()
        soft = (scores - scores.topk(2, dim=1).values.mean(1, keepdim=True)).sigmoid()
        hard = F.one_hot(scores.argmax(1), len(b)).to(soft)
        match = (hard + soft - soft.detach()).t()
        n = ni[b] + match @ ni[a]
        y = (xi[b] * ni[b, None] + match @ (xi[a] * ni[a, None])) / n[:, None]
        tokens.append(torch.cat((xi[:prefix], y)))
        sizes.append(torch.cat((ni[:prefix], n)))
    return torch.stack(tokens), torch.stack(sizes)


def parts(layer):
    """norm before attention; q, k, v; projection; norm before the MLP; MLP."""
    if hasattr(layer, "self_attn"):
        a = layer.self_attn
        qkv = (lambda x: a.qkv(x).chunk(3, -1)) if hasattr(a, "qkv") else lambda x: (a.q_proj(x), a.k_proj(x), a.v_proj(x))
        project = a.projection if hasattr(a, "projection") else a.out_proj
        return layer.layer_norm1, qkv, project, layer.layer_norm2, layer.mlp
    if hasattr(layer, "intermediate"):  # ViT in transformers 4
        a = layer.attention.attention
        return (
            layer.layernorm_before,
            lambda x: (a.query(x), a.key(x), a.value(x)),
            layer.attention.output.dense,
            layer.layernorm_after,
            lambda x: layer.output.dense(layer.intermediate(x)),
        )
    a = layer.attention
    return layer.layernorm_before, lambda x: (a.q_proj(x), a.k_proj(x), a.v_proj(x)), a.o_proj, layer.layernorm_after, layer.mlp


def straightforward(encoder, images, layer, similarity="cosine"):
    """Tokens (B, M, D) after the final norm, and sizes (B, M)."""
    x = encoder.embeddings(images)
    if hasattr(encoder, "pre_layrnorm"):
        x = encoder.pre_layrnorm(x)
    size = x.new_ones(x.shape[:2])
    for i, block in enumerate(hf.vision_layers(encoder)):
        norm1, qkv, project, norm2, mlp = parts(block)
        q, k, v = qkv(norm1(x))
        x = x + project(attention(q, k, v, size))
        if i == layer:
            x, size = merge(x, k, size, x.shape[1] - GRID * GRID, getattr(block, "refinement", None), similarity)
        x = x + mlp(norm2(x))
    if "CLIP" in type(encoder).__name__:
        return x, size
    return (encoder.layernorm if hasattr(encoder, "layernorm") else encoder.post_layernorm)(x), size


def straightforward_match(model, ids, mask, tokens, size):
    """The text encoder with cross-attention over tokens that count ``size`` times, and the matching head."""
    encoder = model.text_encoder
    x = encoder.embeddings(input_ids=ids)
    for layer in encoder.encoder.layer:
        for block, memory, weight in ((layer.attention, x, mask.to(x)), (layer.crossattention, tokens, size)):
            a = block.self
            memory = x if memory is not tokens else tokens
            out = attention(a.query(x), a.key(memory), a.value(memory), weight)
            x = block.output.LayerNorm(block.output.dense(out) + x)
        x = layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x)
    return model.itm_head(x[:, 0])


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 1, DEPTH - 1])
def test_agrees_with_a_straightforward_implementation(model, images, layer, how):
    hf.apply(model, layer, refinement={"dropout": 0.0}, attention=how)
    encoder = hf.find_vision_encoder(model)
    refinement = hf.vision_layers(encoder)[layer].refinement
    weight = torch.randn(2, 1, WIDTH, dtype=torch.float64)

    got = hf.merged_features(model, images)
    ((got.tokens * weight).sum() + (got.size**2).sum()).backward()
    gradients = [p.grad.clone() for p in refinement.parameters()]
    model.zero_grad()
    tokens, size = straightforward(encoder, images, layer)
    ((tokens * weight).sum() + (size**2).sum()).backward()

    assert torch.equal(got.size.squeeze(-1).round(), size.round())
    close(got.tokens, tokens)
    for gradient, p in zip(gradients, refinement.parameters(), strict=True):
        assert p.grad.abs().max() > 0
        close(gradient, p.grad)


def test_dot_similarity(model, images):
    hf.apply(model, 1, similarity="dot")
    tokens, _ = straightforward(hf.find_vision_encoder(model), images, 1, similarity="dot")
    close(hf.merged_features(model, images).tokens, tokens)


@pytest.mark.parametrize("how", [None, "sdpa"])
def test_matching_agrees_with_a_straightforward_implementation(retrieval, images, texts, how):
    hf.apply(retrieval, 1, refinement={"dropout": 0.0}, attention=how)
    refinement = retrieval.vision_model.encoder.layers[1].refinement

    got = retrieval(texts[0], images, attention_mask=texts[1]).itm_score
    got.square().sum().backward()
    gradients = [p.grad.clone() for p in refinement.parameters()]
    retrieval.zero_grad()
    want = straightforward_match(retrieval, *texts, *straightforward(retrieval.vision_model, images, 1))
    want.square().sum().backward()

    close(got, want)
    for gradient, p in zip(gradients, refinement.parameters(), strict=True):
        assert p.grad.abs().max() > 0
        close(gradient, p.grad)


def test_weighed_cross_attention_is_the_unmodified_one_over_every_position(retrieval, images, texts):
    """What makes captioners and language models, which read every position, go on working."""
    stock = copy.deepcopy(retrieval)
    hf.apply(retrieval, 1)
    got = retrieval(texts[0], images, attention_mask=texts[1])
    assert got.last_hidden_state.shape == (2, 1 + GRID * GRID, WIDTH)
    states = stock.text_encoder(
        input_ids=texts[0], attention_mask=texts[1], encoder_hidden_states=got.last_hidden_state
    ).last_hidden_state
    close(got.itm_score, stock.itm_head(states[:, 0]))
    plain = stock(texts[0], images, attention_mask=texts[1]).itm_score
    assert (got.itm_score - plain).abs().max() > 1e-3  # else merging would have done nothing


def test_without_weights_cross_attention_is_plain(retrieval, images, texts):
    hf.apply(retrieval, 1, proportional_attention=False)
    image, _ = hf.encode_image(retrieval, images)
    assert image.size is None
    states = retrieval.text_encoder(input_ids=texts[0], attention_mask=texts[1], encoder_hidden_states=image.tokens)
    close(retrieval(texts[0], images, attention_mask=texts[1]).itm_score, retrieval.itm_head(states.last_hidden_state[:, 0]))


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_without_merging_it_computes_what_it_did(model, images):
    before, keys = model(images, output_hidden_states=True), list(model.state_dict())
    hf.apply(model, None)
    after = model(images, output_hidden_states=True)
    assert same(tensors(before), tensors(after))
    assert same(before.hidden_states, after.hidden_states)
    assert list(model.state_dict()) == keys


def test_retrieval_without_merging(retrieval, images, texts):
    before = [retrieval(texts[0], images, use_itm_head=head, attention_mask=texts[1]).itm_score for head in (True, False)]
    hf.apply(retrieval, None)
    after = [retrieval(texts[0], images, use_itm_head=head, attention_mask=texts[1]).itm_score for head in (True, False)]
    assert same(before, after)


def test_remove_gives_the_model_back(model, images):
    before, keys, classes = tensors(model(images)), list(model.state_dict()), [type(m) for m in model.modules()]
    hf.apply(model, 1, refinement=True)
    assert not same(before, tensors(model(images, output_hidden_states=True)))
    hf.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert same(before, tensors(model(images)))
    assert hf.remove(model) is model


def test_remove_from_retrieval(retrieval, images, texts):
    before, classes = retrieval(texts[0], images).itm_score, [type(m) for m in retrieval.modules()]
    hf.remove(hf.apply(retrieval, (0, 1), refinement=True))
    assert [type(m) for m in retrieval.modules()] == classes
    assert torch.equal(before, retrieval(texts[0], images).itm_score)


def test_only_this_model_is_patched(model, images):
    other = copy.deepcopy(model)
    before = tensors(other(images))
    hf.apply(model, 0)
    assert same(before, tensors(other(images)))
    assert hf.find_vision_encoder(other) is not None and not hasattr(hf.find_vision_encoder(other), "fpet_config")


# --- what changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, (0, 2)])
def test_later_layers_see_half_of_the_patches(model, images, layers):
    hf.apply(model, layers)
    encoder = hf.find_vision_encoder(model)
    seen = []
    for layer in hf.vision_layers(encoder):
        layer.register_forward_hook(lambda module, args, out: seen.append((args[0].shape[1], tokens_of(out).shape[1])))
    got = hf.merged_features(model, images)
    prefix = got.source.shape[1] - GRID * GRID
    full, once, twice = prefix + 25, prefix + 12, prefix + 6  # of 25 patches 12 are left, of these the 6 in odd rows
    want = [(full, full), (full, once), (once, once)] if layers == 1 else [(full, once), (once, once), (once, twice)]
    assert seen == want
    assert got.tokens.shape == (2, want[-1][1], WIDTH)
    assert torch.equal(got.size.sum(dim=(1, 2)), torch.full((2,), float(full), dtype=got.size.dtype))


def test_every_original_position_is_given_its_token(model, images):
    hf.apply(model, 1)
    merged = hf.merged_features(model, images)
    output = model(images, output_hidden_states=True, output_attentions=True)
    full = merged.source.shape[1]
    for row in range(2):
        close(output.last_hidden_state[row], merged.tokens[row, merged.source[row]])
        assert torch.equal(merged.source[row].bincount().to(merged.size), merged.size[row, :, 0])
    assert [t.shape[1] for t in output.hidden_states] == [full] * (DEPTH + 1)
    left = merged.tokens.shape[1]
    assert [t.shape[-1] for t in output.attentions] == [full, full, left]
    for weights in output.attentions:
        close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_pooling_by_attention_weighs_by_size(images):
    model = spread(FAMILIES["siglip"]()).double().eval()
    hf.apply(model, 1)
    output = model(images)
    head = hf.find_vision_encoder(model).head
    close(output.pooler_output, head(output.last_hidden_state))


def test_image_classification(images):
    model = spread(ViTForImageClassification(ViTConfig(**VISION, num_labels=5))).double().eval()
    before = model(images).logits
    hf.apply(model, 0)
    logits = model(images).logits
    assert logits.shape == (2, 5) and not torch.allclose(logits, before)
    tokens, _ = straightforward(model.vit, images, 0)
    close(logits, model.classifier(tokens[:, 0]))


def test_a_captioner_reads_every_position(images, texts):
    model = spread(BlipForConditionalGeneration(BlipConfig(vision_config=VISION, text_config=TEXT))).double().eval()
    hf.apply(model, 1)
    logits = model(pixel_values=images, input_ids=texts[0], attention_mask=texts[1]).logits
    states = model.vision_model(images).last_hidden_state
    assert states.shape[1] == 1 + GRID * GRID
    want = model.text_decoder(input_ids=texts[0], attention_mask=texts[1], encoder_hidden_states=states).logits
    close(logits, want)


def test_clip_as_a_whole(images):
    text = {key: value for key, value in TEXT.items() if key not in ("encoder_hidden_size", "sep_token_id")}
    model = spread(CLIPModel(CLIPConfig(vision_config=VISION, text_config=text))).eval()  # CLIP 4's text has no float64
    hf.apply(model, 1)
    output = model(input_ids=torch.randint(3, 30, (2, 6)), pixel_values=images.float())
    encoder = hf.find_vision_encoder(model)
    tokens, _ = straightforward(encoder, images.float(), 1)
    want = F.normalize(model.visual_projection(encoder.post_layernorm(tokens[:, 0])), dim=-1)
    close(output.image_embeds, want, 1e-5)


def test_another_image_size(model):
    hf.apply(model, 1)
    images = torch.rand(1, 3, 32, 56, dtype=torch.float64)  # 4 × 7 patches
    got = model(images, interpolate_pos_encoding=True).last_hidden_state
    merged = hf.merged_features(model, images, interpolate_pos_encoding=True)
    assert merged.tokens.shape[1] == merged.source.shape[1] - 14
    assert torch.equal(got[0], merged.tokens[0, merged.source[0]])


# --- gradients --------------------------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_backbone_through_the_keys(model, images):
    """Sizes depend on the keys alone: the refinement learns from them, nothing else does."""
    hf.apply(model, DEPTH - 1, refinement={"dropout": 0.0})
    encoder = hf.find_vision_encoder(model)
    hf.merged_features(model, images).size.square().sum().backward()
    for name, p in encoder.named_parameters():
        if "refinement" in name:
            assert p.grad.abs().max() > 0, name
        else:
            assert p.grad is None or not p.grad.any(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, images, reentrant):
    hf.apply(model, 0, refinement={"dropout": 0.0})
    model.train()

    def gradients():
        model.zero_grad()
        x = images.clone().requires_grad_()
        model(x).last_hidden_state.square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    layers = hf.vision_layers(hf.find_vision_encoder(model))
    assert all(layer.gradient_checkpointing for layer in layers)
    for a, b in zip(plain, gradients(), strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_loses_no_token(model, images, dtype):
    model.to(dtype)
    hf.apply(model, 1, refinement=True)
    merged = hf.merged_features(model, images.to(dtype))
    assert merged.tokens.dtype == dtype and merged.tokens.isfinite().all()
    assert (merged.size.sum(dim=(1, 2)) == merged.source.shape[1]).all()


def test_autocast(retrieval, images, texts):
    hf.apply(retrieval.float(), 1, refinement=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = retrieval(texts[0], images.float(), attention_mask=texts[1]).itm_score
    want = retrieval(texts[0], images.float(), attention_mask=texts[1]).itm_score
    assert scores.isfinite().all() and scores.shape == want.shape
    scores.float().sum().backward()
    assert retrieval.vision_model.encoder.layers[1].refinement.adapter_up.weight.grad.isfinite().all()


# --- copies and files -------------------------------------------------------------------------------------------------


def test_copies_compute_the_same(model, images):
    hf.apply(model, 1, refinement=True)
    want = tensors(model(images))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(want, tensors(copied(images)))
        with torch.no_grad():
            next(copied.parameters()).add_(1)
        assert same(want, tensors(model(images)))


def test_state_dict_goes_into_another_model(model, images):
    hf.apply(model, 1, refinement=True)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(hf.remove(copy.deepcopy(model)))
    spread(other.float()).double()
    hf.apply(other, 1, refinement=True)
    other.load_state_dict(torch.load(buffer))
    assert same(tensors(model(images)), tensors(other(images)))


def test_save_pretrained_names_the_original_class(retrieval, tmp_path):
    hf.apply(retrieval, 1)
    retrieval.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BlipForImageTextRetrieval"]
    again = BlipForImageTextRetrieval.from_pretrained(tmp_path)
    assert again.state_dict().keys() == retrieval.state_dict().keys()
