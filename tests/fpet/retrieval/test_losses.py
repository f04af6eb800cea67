"""Contrast, matching, the momentum encoder and the queue."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fpet import huggingface as hf
from fpet import retrieval
from fpet.retrieval import inputs
from retrieval_support import SMALL, load, randomize, tiny, tuned_parameters, tuned_state


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


def test_a_momentum_encoder_copies_what_is_tuned_and_nothing_else():
    model = retrieval.prepare(tiny(), dataclasses.replace(SMALL, grad_checkpointing=True))
    tuned = tuned_parameters(model)
    slow = retrieval.momentum_copy(model)
    assert len(tuned) > 20
    for (name, p), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert (other is p) == (name not in tuned), name
        assert torch.equal(p, other) and not other.requires_grad
    assert all(b is other for b, other in zip(model.buffers(), slow.buffers(), strict=True))
    assert len({id(p) for p in (*model.parameters(), *slow.parameters())}) == len(list(model.parameters())) + len(tuned)
    assert slow.vision_model.fpet_config == model.vision_model.fpet_config
    assert all(p.requires_grad for p in tuned.values())


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
        for name, p in tuned_parameters(slow).items():
            p.copy_(0.9 * before[name] + 0.1 * p)
        features = [(hf.encode_image(m, pixels)[1], hf.encode_text(m, ids, mask)) for m in (model, slow)]
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
    for name, p in tuned_parameters(slow).items():
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
    tuned = tuned_parameters(model)
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
        gradients.append({name: p.grad for name, p in tuned_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


def test_the_encode_token_takes_the_first_place():
    ids = torch.tensor([[2, 7, 3], [2, 8, 3]])
    assert inputs.with_encode_token(ids, 9).tolist() == [[9, 7, 3], [9, 8, 3]]
    assert inputs.with_encode_token(ids, None) is ids
