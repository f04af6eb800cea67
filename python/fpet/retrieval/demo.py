"""All of it on drawn shapes and a tiny BLIP."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.captions import WORDS, write_folder
from ..data.flickr30k import load_split
from .config import RetrievalConfig
from .evaluation import RetrievalScore, evaluate
from .inputs import image_transform
from .run import train
from .tuning import prepare, tuned_parameters

__all__ = ["run_demo", "tiny_blip", "word_tokenizer"]


def tiny_blip(width: int = 48, depth: int = 2, image_size: int = 32, patch_size: int = 4, vocabulary: int = 64) -> Any:
    """A BlipForImageTextRetrieval with random weights that a CPU can train."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    both = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "initializer_range": width**-0.5,  # transformers' 0.02 is for wide models
    }
    text = {
        "vocab_size": vocabulary, "encoder_hidden_size": width, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
    }  # fmt: skip
    vision = {"image_size": image_size, "patch_size": patch_size}
    return BlipForImageTextRetrieval(
        BlipConfig(vision_config={**both, **vision}, text_config={**both, **text}, image_text_hidden_size=width)
    )


def word_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Any:
    """A BertTokenizer of whole words; writes its vocabulary into ``folder``."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return BertTokenizer.from_pretrained(folder)


def run_demo(
    folder: Path, *, seed: int = 0, progress: bool = True, say: Callable[[str], None] = print
) -> dict[str, RetrievalScore]:
    """Draws pairs, trains a tiny BLIP on some, then tunes it to others, on a lighter ground, with and without merging.

    Returns:
        What the test pairs give: "before", "unmerged", "merged".
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(folder / "tokenizer")
    write_folder(folder / "first", {"train": 700}, seed=1)
    write_folder(folder / "then", {"train": 300, "test": 100}, seed=2, background=0.4)
    transform = image_transform(32)
    first, train_split, test = (
        load_split(folder / name, part, transform) for name, part in (("first", "train"), ("then", "train"), ("then", "test"))
    )
    model = tiny_blip(vocabulary=tokenizer.vocab_size)
    say(
        f"{len(test.files)} test images, {len(test)} captions; guessing finds {100 / len(test.files):.1f} % of the images first"
    )
    # A run of a hundred steps is over before features of earlier steps and their mean are of use: no queue.
    every = RetrievalConfig(merge=False, queue_size=0, epochs=4, batch_size=32, lr=2e-3, weight_decay=0.01, top_k=16, seed=seed)
    train(model, tokenizer, first, every, progress=progress)
    scores = {"before": evaluate(model, tokenizer, test, every, progress=progress)}
    say(f"\nbefore tuning, {time.perf_counter() - start:.0f} s\n{scores['before'].table()}")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, merge in (("unmerged", False), ("merged", True)):
        config = dataclasses.replace(every, merge=merge, layer=0, adapter_dim=32)
        torch.manual_seed(seed)
        tuned = tiny_blip(vocabulary=tokenizer.vocab_size)
        tuned.load_state_dict(state)
        prepare(tuned, config)
        train(tuned, tokenizer, train_split, config, output=folder / name, progress=progress)
        scores[name] = evaluate(tuned, tokenizer, test, config, progress=progress)
        count = sum(p.numel() for p in tuned_parameters(tuned).values())
        say(f"\ntuned, {name}: {count:,} parameters, {time.perf_counter() - start:.0f} s\n{scores[name].table()}")
    return scores
