"""Recall, against sorting and against one pair at a time."""

from __future__ import annotations

import pytest
import torch

from fpet import retrieval
from fpet.retrieval import RetrievalConfig
from retrieval_support import load, tiny


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
