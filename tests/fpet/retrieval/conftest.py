"""Drawn pairs, a tokenizer of their words, a batch."""

from __future__ import annotations

import pytest
import torch

from fpet.data import captions as drawn


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return drawn.write_folder(root, {"train": 5, "val": 2, "test": 4}, size=16)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from fpet.retrieval import demo

    return demo.word_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture
def batch(folder, tokenizer):
    from fpet.retrieval import inputs
    from retrieval_support import load

    split = load(folder, "train")
    pairs = [split[i] for i in (0, 3, 4, 6, 9)]  # the second and third are of one image
    ids, mask = inputs.tokenize(tokenizer, [caption for _, caption, _ in pairs], 16)
    return torch.stack([image for image, _, _ in pairs]), ids, mask, torch.tensor([number for _, _, number in pairs])
