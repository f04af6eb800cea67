"""Training, resuming, and the file of what was tuned."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fpet import retrieval
from fpet.data import flickr30k
from fpet.files import checkpoint
from fpet.retrieval import RetrievalConfig, run
from retrieval_support import SMALL, load, tiny, tuned_state
from train_support import Stopped, assert_same_state


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


@pytest.mark.parametrize("queue_size", [0, 10])
def test_a_killed_run_ends_with_the_same_weights(folder, tokenizer, tmp_path, queue_size):
    split = flickr30k.load_split(folder, "train", retrieval.image_transform(16, augment=True))
    config = dataclasses.replace(SMALL, queue_size=queue_size)

    def tune(output, transform=split.transform):
        torch.manual_seed(3)
        model = retrieval.prepare(tiny(), config)
        data = load(folder, "train")
        data.transform = transform
        history = retrieval.train(model, tokenizer, data, config, output=output)
        return tuned_state(model), history

    whole, history = tune(tmp_path / "whole")
    read = [0]

    def dies(image):
        read[0] += 1
        if read[0] > 15:  # in the second epoch
            raise Stopped
        return split.transform(image)

    with pytest.raises(Stopped):
        tune(tmp_path / "killed", dies)
    torch.rand(5)  # whatever the next process draws before it resumes
    again, resumed = tune(tmp_path / "killed")
    assert resumed == history
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    one, two = (checkpoint.load_newest(tmp_path / name)[1] for name in ("whole", "killed"))
    assert_same_state(one, two)
    assert one["tuned"] and bool(one["task"]["queue"]) == bool(one["task"]["momentum"]) == bool(queue_size)
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


def test_a_batch_that_can_not_be_shared(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(run, "place", lambda: (0, 3))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes with at least 2 in each, got 4"):
        retrieval.train(retrieval.prepare(tiny(), SMALL), tokenizer, load(folder, "train"), SMALL)
