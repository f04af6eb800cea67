"""Image-text retrieval: losses, recall, UniAdapters, training and files, on generated pairs and a tiny random BLIP."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

transformers = pytest.importorskip("transformers", reason="fpet.retrieval needs transformers")

import fpet  # noqa: E402
from fpet import huggingface as hf  # noqa: E402
from fpet.data import captions as drawn  # noqa: E402
from fpet.data import flickr30k  # noqa: E402
from fpet.files import checkpoint  # noqa: E402
from fpet.retrieval import RetrievalConfig  # noqa: E402
from fpet.retrieval import run as retrieval  # noqa: E402
from fpet.retrieval.uniadapter import UniAdapter, add_uniadapters, remove_uniadapters  # noqa: E402

SMALL = RetrievalConfig(adapter_dim=4, epochs=2, batch_size=4, lr=1e-2, top_k=3, max_length=16, queue_size=10)


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    return retrieval.tiny_blip(**{"width": 16, "depth": 2, "image_size": 16, **sizes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return drawn.write_folder(root, {"train": 5, "val": 2, "test": 4}, size=16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return retrieval.word_tokenizer(tmp_path_factory.mktemp("words"))


def load(folder, name):
    return flickr30k.load_split(folder, name, retrieval.image_transform(16))


def tuned_state(model):
    return {name: p.detach().clone() for name, p in retrieval.tuned_parameters(model).items()}


@pytest.fixture
def batch(folder, tokenizer):
    split = load(folder, "train")
    pairs = [split[i] for i in (0, 3, 4, 6, 9)]  # the second and third are of one image
    ids, mask = retrieval.tokenize(tokenizer, [caption for _, caption, _ in pairs], 16)
    return torch.stack([image for image, _, _ in pairs]), ids, mask, torch.tensor([number for _, _, number in pairs])


# --- recall -----------------------------------------------------------------------------------------------------------


def brute_force_recall(scores, relevant, k):
    hits = 0
    for row, wanted in zip(scores.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], wanted[i]))  # what does not count comes first among equals
        hits += any(wanted[i] for i in order[:k])
    return hits / len(scores)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1, 1)])
def test_recall_is_what_sorting_finds(shape, levels):
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        scores = torch.randint(levels, shape, generator=generator).float()
        relevant = torch.rand(shape, generator=generator) < 0.3
        relevant[torch.arange(shape[0]), torch.randint(shape[1], (shape[0],), generator=generator)] = True
        for k, value in retrieval.recall(scores, relevant, (1, 3, 10)).items():
            assert value == pytest.approx(brute_force_recall(scores, relevant, k))


def test_equal_scores_find_nothing():
    relevant = torch.eye(4, dtype=torch.bool)
    assert retrieval.recall(torch.zeros(4, 4), relevant, (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}


def test_recall_errors():
    with pytest.raises(ValueError, match="shape"):
        retrieval.recall(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="something relevant for every query"):
        retrieval.recall(torch.zeros(2, 3), torch.tensor([[True, False, False], [False] * 3]))


@torch.no_grad()
@pytest.mark.parametrize(("merge", "top_k"), [(False, 3), (True, 0), (True, 3), (True, 500)])
def test_evaluation_is_one_pair_at_a_time(folder, tokenizer, merge, top_k):
    model = tiny()
    config = RetrievalConfig(merge=merge, adapter_dim=4, top_k=top_k)
    retrieval.prepare(model, config)
    for head in ("vision_proj", "text_proj", "itm_head"):
        torch.nn.init.normal_(getattr(model, head).weight)
    split = load(folder, "test")
    got = retrieval.evaluate(model, tokenizer, split, config, batch_size=5)

    similarity, matching = torch.empty(4, 12), torch.empty(4, 12)
    for i in range(4):
        image = split.image(i)[None]
        for j, caption in enumerate(split.captions):
            text = tokenizer([caption], return_tensors="pt")
            call = {"input_ids": text.input_ids, "attention_mask": text.attention_mask, "pixel_values": image}
            similarity[i, j] = model(**call, use_itm_head=False).itm_score
            matching[i, j] = model(**call).itm_score[0, 1]
    relevant = torch.tensor([[j // 3 == i for j in range(12)] for i in range(4)])
    for scores, other, wanted, result in (
        (similarity, matching, relevant, got.image_to_text),
        (similarity.t(), matching.t(), relevant.t(), got.text_to_image),
    ):
        for k in (1, 5, 10):
            hits = 0
            for sims, matches, want in zip(scores, other, wanted, strict=True):
                order = sims.argsort(descending=True).tolist()
                first = sorted(order[:top_k], key=lambda c: -matches[c])
                hits += any(want[c] for c in (first + order[top_k:])[:k])
            assert result[k] == pytest.approx(hits / len(scores))
    assert not model.training
    assert 0 <= got.mean <= 1 and "re-ranked" in got.table()


# --- losses -----------------------------------------------------------------------------------------------------------


def contrastive_by_loops(to_text, to_image, rows, columns, opinions, alpha):
    total = 0.0
    for matrix, opinion in zip((to_text, to_image), opinions, strict=True):
        for i, row in enumerate(rows.tolist()):
            same = [column == row for column in columns.tolist()]
            log = matrix[i] - matrix[i].logsumexp(0)
            target = [(1 - alpha) * s / sum(same) + alpha * o for s, o in zip(same, opinion[i].tolist(), strict=True)]
            total -= sum(t * value.item() for t, value in zip(target, log, strict=True)) / len(rows) / 2
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_contrastive_loss_is_what_loops_find(alpha):
    rows, columns = torch.tensor([7, 3, 7, 1]), torch.tensor([7, 3, 7, 1, -1, 3, -1])
    matrices = [torch.randn(4, 7, dtype=torch.float64) for _ in range(4)]
    opinions = tuple(matrix.softmax(dim=1) for matrix in matrices[2:])
    want = contrastive_by_loops(*matrices[:2], rows, columns, opinions, alpha)
    got = retrieval.contrastive_loss(*matrices[:2], rows, columns, opinions, alpha)
    assert got.item() == pytest.approx(want, abs=1e-12)
    if alpha == 0:
        assert retrieval.contrastive_loss(*matrices[:2], rows, columns).item() == pytest.approx(want, abs=1e-12)


def test_negatives_are_of_another_image_and_hard():
    ids = torch.tensor([0, 0, 1, 2])
    similarity = torch.zeros(4, 4)
    similarity[0] = torch.tensor([99.0, 99.0, 0.0, 8.0])
    torch.manual_seed(0)
    drawn_columns = torch.stack([retrieval.hard_negatives(similarity, ids) for _ in range(200)])
    assert not (ids[drawn_columns] == ids).any()
    assert (drawn_columns[:, 0] == 3).float().mean() > 0.95  # e⁸ : 1
    assert set(drawn_columns[:, 3].tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="two different images"):
        retrieval.hard_negatives(similarity, torch.zeros(4, dtype=torch.long))


# --- momentum encoder and queue ---------------------------------------------------------------------------------------


def test_a_momentum_encoder_copies_what_is_tuned_and_nothing_else():
    model = retrieval.prepare(tiny(), dataclasses.replace(SMALL, grad_checkpointing=True))
    tuned = retrieval.tuned_parameters(model)
    slow = retrieval.momentum_copy(model)
    assert len(tuned) > 20
    for (name, p), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert (other is p) == (name not in tuned), name
        assert torch.equal(p, other) and not other.requires_grad
    assert all(b is other for b, other in zip(model.buffers(), slow.buffers(), strict=True))
    assert len({id(p) for p in (*model.parameters(), *slow.parameters())}) == len(list(model.parameters())) + len(tuned)
    assert slow.vision_model.fpet_config == model.vision_model.fpet_config
    assert all(p.requires_grad for p in tuned.values())


def randomize(model, scale=0.3):
    with torch.no_grad():
        for p in retrieval.tuned_parameters(model).values():
            p.add_(scale * torch.randn_like(p))


def test_a_step_with_a_queue(batch):
    """The loss, the momentum encoder and the queue after it, from features that two plain models give."""
    pixels, ids, mask, images = batch[0].double(), *batch[1:]
    model = retrieval.prepare(tiny().double(), SMALL)
    randomize(model)
    loss = retrieval.RetrievalLoss(model, dataclasses.replace(SMALL, queue_size=7, momentum=0.9, temperature=0.2)).eval()
    before = tuned_state(model)
    old = F.normalize(torch.randn(2, 4, 16), dim=-1)
    loss.queue.put(old[0], old[1], torch.tensor([1, 40, 3, 40]))
    filler = loss.queue.image[4:].clone(), loss.queue.text[4:].clone()
    randomize(model)
    slow = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in retrieval.tuned_parameters(slow).items():
            p.copy_(0.9 * before[name] + 0.1 * p)
        features = [
            (hf.encode_image(m, pixels)[1], hf.encode_text(m, ids, mask)) for m in (model, slow)
        ]  # fmt: skip
    got = loss(pixels, ids, mask, images, alpha=0.3)

    (image, text), (slow_image, slow_text) = features
    every_image, every_text = (
        torch.cat((new, old[i].double(), filler[i].double())) for i, new in enumerate((slow_image, slow_text))
    )
    columns = torch.cat((images, torch.tensor([1, 40, 3, 40, -1, -1, -1])))
    opinions = (slow_image @ every_text.t() / 0.2).softmax(dim=1), (slow_text @ every_image.t() / 0.2).softmax(dim=1)
    to_text, to_image = image @ every_text.t() / 0.2, text @ every_image.t() / 0.2
    want = contrastive_by_loops(to_text, to_image, images, columns, opinions, 0.3)
    assert got.contrastive.item() == pytest.approx(want, abs=1e-9)
    averages = loss.averages()
    assert averages.keys() == before.keys()
    for name, p in retrieval.tuned_parameters(slow).items():
        assert torch.allclose(averages[name], p, atol=1e-12), name
    assert loss.queue.ids[[4, 5, 6, 0, 1]].tolist() == images.tolist() and loss.queue.ids[2:4].tolist() == [3, 40]
    assert torch.allclose(loss.queue.text[[4, 5, 6, 0, 1]].double(), slow_text, atol=1e-6)
    assert torch.allclose(loss.queue.image[[4, 5, 6, 0, 1]].double(), slow_image, atol=1e-6)
    assert int(loss.queue.next) == 2

    got.contrastive.backward()
    assert all(p.grad is None for p in loss.momentum_model.parameters() if not p.requires_grad)
    assert model.vision_proj.weight.grad.any() and model.text_proj.weight.grad.any()


def test_a_queue_keeps_the_newest():
    queue, kept = retrieval.FeatureQueue(7, 3), [(None, -1)] * 7
    assert torch.allclose(queue.image.norm(dim=1), torch.ones(7)) and not torch.equal(queue.image, queue.text)
    generator = torch.Generator().manual_seed(0)
    for count in (3, 3, 5, 7, 1, 2):
        image, text = torch.randn(2, count, 3, generator=generator)
        ids = torch.randint(90, (count,), generator=generator)
        queue.put(image, text, ids)
        kept = (kept + [(pair, number) for pair, number in zip(zip(image, text, strict=True), ids.tolist(), strict=True)])[-7:]
        order = [(int(queue.next) + i) % 7 for i in range(7)]  # the oldest first
        assert queue.ids[order].tolist() == [number for _, number in kept]
        for i, (pair, _) in zip(order, kept, strict=True):
            if pair is not None:
                assert torch.equal(queue.image[i], pair[0]) and torch.equal(queue.text[i], pair[1])


def test_alpha_grows_over_the_first_epoch_and_the_rate_falls_by_epochs(folder, tokenizer, monkeypatch):
    alphas, rates = [], []
    forward, step = retrieval.RetrievalLoss.forward, torch.optim.AdamW.step

    def spy(self, *args, alpha=None, **kwargs):
        alphas.append(alpha)
        return forward(self, *args, alpha=alpha, **kwargs)

    def spy_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(retrieval.RetrievalLoss, "forward", spy)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    config = dataclasses.replace(SMALL, alpha=0.6, min_lr=2e-3)
    retrieval.train(retrieval.prepare(tiny(), config), tokenizer, load(folder, "train"), config)
    assert alphas == pytest.approx([0, 0.2, 0.4, 0.6, 0.6, 0.6])
    assert rates == pytest.approx([1e-2] * 3 + [6e-3] * 3)


@pytest.mark.parametrize("queue_size", [0, 10])
def test_only_what_is_tuned_learns(batch, queue_size):
    model = tiny()
    retrieval.prepare(model, SMALL)
    with torch.no_grad():  # the published start hides the way down from the text's loss
        for adapter in model.uniadapters:
            torch.nn.init.normal_(adapter.up_text.weight)
    config = dataclasses.replace(SMALL, batch_size=5, queue_size=queue_size, encode_token_id=4)
    losses = retrieval.RetrievalLoss(model.train(), config)(*batch)
    (losses.contrastive + losses.matching).backward()
    tuned = retrieval.tuned_parameters(model)
    groups = {name.split(".")[0] if "refinement" not in name else "refinement" for name in tuned}
    assert groups == {"uniadapters", "key_value_adapters", "vision_proj", "text_proj", "itm_head", "refinement"}
    for name, p in model.named_parameters():
        if name in tuned:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        else:
            assert p.grad is None, name


def test_checkpointing_changes_no_gradient(batch):
    gradients = []
    for grad_checkpointing in (False, True):
        model = tiny().double()
        config = dataclasses.replace(SMALL, grad_checkpointing=grad_checkpointing)
        torch.manual_seed(1)
        retrieval.prepare(model, config).train()
        model.vision_model.encoder.layers[1].refinement.dropout = 0.0
        loss = retrieval.RetrievalLoss(model, config)
        torch.manual_seed(2)
        losses = loss(batch[0].double(), *batch[1:])
        (losses.contrastive + losses.matching).backward()
        gradients.append({name: p.grad for name, p in retrieval.tuned_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


def test_the_encode_token_takes_the_first_place():
    ids = torch.tensor([[2, 7, 3], [2, 8, 3]])
    assert retrieval.with_encode_token(ids, 9).tolist() == [[9, 7, 3], [9, 8, 3]]
    assert retrieval.with_encode_token(ids, None) is ids


# --- UniAdapters ------------------------------------------------------------------------------------------------------


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
    assert torch.allclose(seen["vision"][1][0], merged + seen["mlp"][1] + adapter0(merged, "vision"))
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


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(folder, tokenizer):
    model = retrieval.prepare(tiny(), RetrievalConfig(adapter_dim=8))
    refinement = model.vision_model.encoder.layers[1].refinement
    before = refinement.adapter_up.weight.detach().clone()
    frozen = model.vision_model.encoder.layers[0].mlp.fc1.weight.clone()
    config = RetrievalConfig(adapter_dim=8, epochs=12, batch_size=5, lr=1e-2, max_length=16, queue_size=0)
    history = retrieval.train(model, tokenizer, load(folder, "train"), config)
    assert history[-1][0] < 0.9 * history[0][0]
    assert not torch.equal(refinement.adapter_up.weight, before)
    assert torch.equal(model.vision_model.encoder.layers[0].mlp.fc1.weight, frozen)


class Killed(Exception):
    pass


def leaves(state, path=()):
    """Every tensor and number of a checkpoint, by where it is."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, (*path, key))
    else:
        yield path, state


@pytest.mark.parametrize("queue_size", [0, 10])
def test_a_killed_run_ends_with_the_same_weights(folder, tokenizer, tmp_path, queue_size):
    split = flickr30k.load_split(folder, "train", retrieval.image_transform(16, augment=True))
    config = dataclasses.replace(SMALL, queue_size=queue_size)

    def run(output, transform=split.transform):
        torch.manual_seed(3)
        model = retrieval.prepare(tiny(), config)
        data = load(folder, "train")
        data.transform = transform
        history = retrieval.train(model, tokenizer, data, config, output=output)
        return tuned_state(model), history

    whole, history = run(tmp_path / "whole")
    read = [0]

    def dies(image):
        read[0] += 1
        if read[0] > 15:  # in the second epoch
            raise Killed
        return split.transform(image)

    with pytest.raises(Killed):
        run(tmp_path / "killed", dies)
    torch.rand(5)  # whatever the next process draws before it resumes
    again, resumed = run(tmp_path / "killed")
    assert resumed == history
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    one, two = (dict(leaves(checkpoint.load_newest(tmp_path / name)[1])) for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert {path[0] for path in one} == {"tuned", "optimizer", "rng", "history"} | (
        {"momentum", "queue"} if queue_size else set()
    )
    for path, value in one.items():
        assert torch.equal(value, two[path]) if isinstance(value, torch.Tensor) else value == two[path], path
    with pytest.raises(ValueError, match="other settings"):
        retrieval.train(tiny(), tokenizer, split, dataclasses.replace(config, epochs=9), output=tmp_path / "whole")


def test_what_was_tuned_is_read_back(folder, tokenizer, tmp_path, batch):
    model = retrieval.prepare(tiny(), SMALL)
    retrieval.train(model, tokenizer, load(folder, "train"), SMALL, output=tmp_path)
    other = tiny()
    assert retrieval.load_tuned(other, tmp_path / "model.safetensors") == SMALL
    with torch.no_grad():
        assert torch.equal(model(batch[1], batch[0]).itm_score, other(batch[1], batch[0]).itm_score)
    with pytest.raises(ValueError, match="other frozen weights"):
        retrieval.load_tuned(tiny(seed=1), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="other layers or widths"):
        retrieval.load_tuned(tiny(depth=4), tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        retrieval.load_tuned(tiny(), tmp_path / "nothing")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="written by save_tuned"):
        retrieval.load_tuned(tiny(), tmp_path / "text")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("epochs", [0]), ("batch_size", [1]), ("top_k", [-1]), ("temperature", [0.0]), ("adapter_dim", [0]),
        ("queue_size", [-1, 255]), ("momentum", [-0.1, 1.1]), ("alpha", [-0.1, 1.1]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(field, values):
    for value in values:
        with pytest.raises(ValueError, match=field):
            RetrievalConfig(**{field: value})


def test_training_refuses(folder, tokenizer):
    split = load(folder, "train")
    with pytest.raises(ValueError, match="at most the 15 captions"):
        retrieval.train(retrieval.prepare(tiny(), SMALL), tokenizer, split, RetrievalConfig(batch_size=16))
    model = tiny()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="call prepare first"):
        retrieval.train(model, tokenizer, split, SMALL)
    model = retrieval.prepare(tiny(), SMALL)
    with torch.no_grad():
        model.itm_head.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="loss is nan"):
        retrieval.train(model, tokenizer, split, SMALL)


# --- data -------------------------------------------------------------------------------------------------------------


def write_list(root, entries):
    (root / flickr30k.LIST_NAME).write_text(json.dumps({"images": entries}))


@pytest.fixture
def mini(tmp_path):
    """Two images by hand, as the published list has them."""
    images = tmp_path / flickr30k.IMAGE_FOLDER
    images.mkdir()
    entries = []
    for number, split in enumerate(("train", "test")):
        Image.new("L", (9, 7), 40 * number).save(images / f"{number}.jpg")
        sentences = [
            {"tokens": ["a"], "raw": f"A (very)  Grey: image, number {number}.", "sentid": 2 * number + i, "imgid": number}
            for i in range(2)
        ]
        entries.append({"sentids": [0], "imgid": number, "sentences": sentences, "split": split, "filename": f"{number}.jpg"})
    write_list(tmp_path, entries)
    return tmp_path, entries


def test_the_published_format(mini):
    root, _ = mini
    split = flickr30k.load_split(root, "test", retrieval.image_transform(8))
    assert len(split) == 2 and split.image_of == [0, 0] and split.files[0].name == "1.jpg"
    assert split.captions == ["a very grey image, number 1"] * 2
    image, caption, number = split[1]
    assert image.shape == (3, 8, 8) and caption == split.captions[1] and number == 0
    mean, std = torch.tensor(retrieval._MEAN), torch.tensor(retrieval._STD)
    assert torch.allclose(image[:, 4, 4], (40 / 255 - mean) / std, atol=0.05)
    assert flickr30k.check_folder(root, sizes={"train": 1, "test": 1}) == []
    assert flickr30k.clean_caption("one two three", 2) == "one two"


def test_augmentation_is_as_published():
    """Every result is that of one of the ten operations at level 5 of 10, done by PIL, and each of them comes up."""
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (24, 32), mode="bicubic")[0]
    pixels = (40 + 150 * pixels.clamp(0, 1)).byte().permute(1, 2, 0)
    image = Image.fromarray(pixels.numpy())
    moves = {
        "shear": [(1, 0.15 * sign, 0, 0, 1, 0) for sign in (1, -1)] + [(1, 0, 0, 0.15 * sign, 1, 0) for sign in (1, -1)],
        "shift": [(1, 0, 5 * sign, 0, 1, 0) for sign in (1, -1)] + [(1, 0, 0, 0, 1, 5 * sign) for sign in (1, -1)],
    }
    bilinear, grey = Image.Resampling.BILINEAR, (128, 128, 128)
    expected = {"nothing": image, "contrast": ImageOps.autocontrast(image), "equalize": ImageOps.equalize(image)}
    expected |= {f"turn {sign}": image.rotate(15 * sign, bilinear, fillcolor=grey) for sign in (1, -1)}
    for name, matrices in moves.items():
        for i, matrix in enumerate(matrices):
            expected[f"{name} {i}"] = image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=grey)
    known = {name: tensor(other) for name, other in expected.items()}
    counts = dict.fromkeys(known, 0)
    for _ in range(1000):
        result = tensor(retrieval.RandAugment()(image))
        (name,) = (name for name, other in known.items() if (result - other).abs().mean() < 0.5)
        counts[name] += 1
    for name, count in counts.items():
        chance = {"nothing": 3 / 10, "contrast": 1 / 10, "equalize": 1 / 10}.get(name, 1 / 20)
        assert abs(count - 1000 * chance) < 5 * (1000 * chance) ** 0.5, name


def tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


def test_two_operations_every_other_time(monkeypatch):
    calls = [0]

    def count(self, image):
        calls[0] += 1
        return image

    monkeypatch.setattr(retrieval.RandAugment, "forward", count)
    transform, image = retrieval.image_transform(8, augment=True), Image.new("RGB", (20, 10), (200, 30, 90))
    results = [transform(image) for _ in range(400)]
    assert abs(calls[0] - 400) < 75  # five standard deviations of 2 · 400 · ½
    plain = retrieval.image_transform(8)(image)
    assert plain.shape == results[0].shape == (3, 8, 8) and torch.allclose(results[0], plain, atol=0.02)
    retrieval.image_transform(8)(image)
    assert calls[0] == pytest.approx(400, abs=75)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root, e: (root / flickr30k.LIST_NAME).unlink(), "no such file"),
        (lambda root, e: (root / flickr30k.LIST_NAME).write_text("{"), "expected JSON"),
        (lambda root, e: (root / flickr30k.LIST_NAME).write_text("[]"), '"images"'),
        (lambda root, e: write_list(root, [e[0], {"filename": "1.jpg", "split": "test"}]), r"images\[1\].*'sentences'"),
        (lambda root, e: write_list(root, [{**e[0], "sentences": []}]), r"images\[0\].*at least one caption"),
        (lambda root, e: write_list(root, [{**e[0], "split": 3}]), r"images\[0\].*strings"),
        (lambda root, e: write_list(root, [{**e[0], "filename": "../0.jpg"}]), "without folders"),
    ],
)
def test_lists_that_are_refused(mini, damage, message):
    root, entries = mini
    damage(root, entries)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        flickr30k.load_split(root, "train", retrieval.image_transform(8))
    (wrong,) = flickr30k.check_folder(root)
    assert str(root) in wrong


def test_splits_and_folders_that_are_not_there(mini):
    root, _ = mini
    for arguments, message in ((("dev",), "expected one of train, val, test"), (("val",), "images of split 'val', got none")):
        with pytest.raises(ValueError, match=message):
            flickr30k.load_split(root, *arguments, retrieval.image_transform(8))
    with pytest.raises(FileNotFoundError, match="folder of images"):
        flickr30k.load_split(root, "test", retrieval.image_transform(8), image_folder="other")


def test_the_checker_names_what_is_wrong(mini):
    root, entries = mini
    images = root / flickr30k.IMAGE_FOLDER
    (images / "0.jpg").write_bytes((images / "0.jpg").read_bytes()[:200])
    write_list(root, [*entries, {**entries[0], "split": "dev"}, {**entries[0], "filename": "2.jpg"}])
    wrong = "\n".join(flickr30k.check_folder(root))
    for part in (
        "expected 29000 images of split 'train', got 2", "expected 1014 images of split 'val', got 0",
        "4 images have not 5 captions", "unknown splits dev", "1 images are listed more than once, such as 0.jpg",
        "1 of 3 images are missing, such as 2.jpg", "0.jpg: damaged",
    ):  # fmt: skip
        assert part in wrong, part
    assert "damaged" not in "\n".join(flickr30k.check_folder(root, decode=False))
    (wrong,) = flickr30k.check_folder(root, image_folder="other", sizes={"train": 2, "test": 1, "dev": 1})[-1:]
    assert "no such folder" in wrong


def test_drawn_pairs(folder, tokenizer):
    assert flickr30k.check_folder(folder, sizes={"train": 5, "val": 2, "test": 4}) == []
    every = [flickr30k.load_split(folder, name, retrieval.image_transform(16)).captions for name in flickr30k.SPLITS]
    first = [caption for captions in every for caption in captions[::3]]
    assert len(set(first)) == len(first) == 11
    ids, _ = retrieval.tokenize(tokenizer, [caption for captions in every for caption in captions], 35)
    assert not (ids == tokenizer.unk_token_id).any()
    with pytest.raises(ValueError, match="at most 2592 images"):
        drawn.write_folder(folder, {"train": 3000})


def test_a_drawing_shows_what_its_caption_says():
    for what in range(0, 2592, 37):
        image, captions = drawn.draw_pair(what, torch.Generator().manual_seed(what))
        words = captions[0].split()
        first, second = drawn.COLOURS[words[1]], drawn.COLOURS[words[-2]]
        halves = image.split(16, dim=1 if "above" in words else 2)
        for half, colour in zip(halves, (first, second), strict=True):
            distance = (half - torch.tensor(colour)[:, None, None]).square().sum(0)
            assert (distance < 0.02).sum() > 8, captions


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(folder, tokenizer, tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "run"
    tiny().save_pretrained(model)
    tokenizer.save_pretrained(model)
    common = ["--data-dir", str(folder), "--model", str(model), "--image-size", "16", "--quiet"]
    tune = ["--epochs", "1", "--batch-size", "4", "--adapter-dim", "4", "--top-k", "3", "--lr", "0.01", "--queue-size", "8"]
    assert retrieval.main(["train", *common, *tune, "--output", str(output)]) == 0
    assert "epoch 1" in capsys.readouterr().out
    assert retrieval.main(["evaluate", *common, "--tuned", str(output / "model.safetensors")]) == 0
    assert "R@10" in capsys.readouterr().out
    assert retrieval.main(["evaluate", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_to_text"].keys() == {"1", "5", "10"}
    assert retrieval.main(["check", "--data-dir", str(folder)]) == 1
    assert "29000" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert retrieval.main(["train", "--data-dir", str(tmp_path), "--model", str(tmp_path / "none"), "--output", "x"]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        retrieval.main([])


# --- several processes ------------------------------------------------------------------------------------------------

TWO = """
import json, os, sys
import torch.distributed as dist
from fpet.retrieval import run as retrieval

commands, store = json.loads(sys.argv[1]), sys.argv[2]
write = retrieval._checkpoint


def write_if_all_have_the_same(folder, epoch, loss, *rest):
    tensors = [*retrieval.tuned_parameters(loss.model).values(), *loss.averages().values()]
    tensors += loss.queue.state_dict().values() if loss.queue else ()
    both = [None, None]
    dist.all_gather_object(both, [t.tolist() for t in tensors])
    assert both[0] == both[1]
    write(folder, epoch, loss, *rest)


retrieval._checkpoint = write_if_all_have_the_same
assert retrieval.main(commands[0]) == 0  # joins torchrun's group and leaves it
assert not dist.is_initialized()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=2)
for command in commands[1:]:
    if command[0] == "rename":
        if dist.get_rank() == 0:
            os.rename(*command[1:])
        dist.barrier()
    else:
        assert retrieval.main(command) == 0
dist.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(folder, tokenizer, tmp_path, capsys):
    torch.manual_seed(4)
    model = tmp_path / "model"
    tiny().save_pretrained(model)
    tokenizer.save_pretrained(model)
    common = ["--data-dir", str(folder), "--model", str(model), "--image-size", "16", "--quiet", "--device", "cpu"]
    drawing = ["train", *common, "--epochs", "2", "--adapter-dim", "4", "--lr", "0.001", "--max-length", "16"]
    # Dropout, augmentation and negatives of its own draw differently in each process, so there is none of them.
    tune = [*drawing, "--batch-size", "4", "--no-refinement", "--no-augment", "--negative-all-rank"]
    runs = {"queue": ["--queue-size", "10", "--momentum", "0.9"], "batch": ["--queue-size", "0"]}
    commands = {
        number: {name: [*tune, *more, "--output", str(tmp_path / number / name)] for name, more in runs.items()}
        for number in ("one", "two")
    }
    score = ["evaluate", *common, "--tuned", str(tmp_path / "one" / "queue" / "model.safetensors"), "--json", "--top-k", "5"]
    for command in (*commands["one"].values(), score):
        assert retrieval.main(command) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    (tmp_path / "two.py").write_text(TWO)
    # With all of them, a run that was killed in its second epoch.
    killed, last, kept = tmp_path / "killed", "step-00000002.ckpt", tmp_path / "step-00000002.ckpt"
    again = [*drawing, "--batch-size", "8", "--queue-size", "10", "--output", str(killed)]
    work = [*commands["two"].values(), again, ["rename", str(killed / last), str(kept)], again, score]
    script = [str(tmp_path / "two.py"), json.dumps(work), str(tmp_path / "store")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2") == 4 and done.stdout.count('contrastive":') == 1, "process 0 alone prints"
    found = json.loads(done.stdout.splitlines()[-1])
    for direction in ("image_to_text", "text_to_image"):
        assert found[direction] == pytest.approx(expected[direction], abs=1.01 / 4), "at most a near tie"

    for name in runs:
        (_, one), (_, two) = (checkpoint.load_newest(tmp_path / number / name) for number in ("one", "two"))
        assert len(one.pop("rng")) == 1 and len(two.pop("rng")) == 2
        one, two = dict(leaves(one)), dict(leaves(two))
        assert one.keys() == two.keys()
        for path, value in one.items():
            torch.testing.assert_close(two[path], value, rtol=1e-3, atol=2e-4, msg=f"{name}: {path}")

    one, two = (dict(leaves(checkpoint.read(path))) for path in (kept, killed / last))
    assert one.keys() == two.keys() and {path[:2] for path in one if path[0] == "rng"} == {("rng", 0), ("rng", 1)}
    for path, value in one.items():
        assert torch.equal(value, two[path]) if isinstance(value, torch.Tensor) else value == two[path], path

    # What two processes began, one may end.
    checkpoint.checkpoints(tmp_path / "two" / "queue")[0].unlink()
    with pytest.warns(RuntimeWarning, match="resumed with 1 processes instead of 2"):
        assert retrieval.main(commands["two"]["queue"]) == 0
    (_, one), (_, two) = (checkpoint.load_newest(tmp_path / number / "queue") for number in ("one", "two"))
    assert two["history"] == [pytest.approx(losses, rel=1e-4) for losses in one["history"]]


def test_a_batch_that_can_not_be_shared(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(retrieval, "_place", lambda: (0, 3))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes with at least 2 in each, got 4"):
        retrieval.train(retrieval.prepare(tiny(), SMALL), tokenizer, load(folder, "train"), SMALL)
