"""The command ``fpet retrieval``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import huggingface
from ..data.flickr30k import ImageTextSplit, check_folder, load_split
from ..files.fetching import one_attempt
from ..train.folder import refuse
from ..train.processes import pick_device, place, process_group
from .config import RetrievalConfig
from .demo import run_demo
from .evaluation import evaluate
from .inputs import image_transform
from .run import train
from .tuning import load_tuned, prepare

__all__ = ["add_arguments", "run"]


def _load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    try:
        with one_attempt():
            return BlipForImageTextRetrieval.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model: {args.model} can't be had ({reason}); fetch its config.json, model.safetensors and tokenizer files where "
            "there is a network, and pass their folder: --model FOLDER"
        ) from error


def _split(args: argparse.Namespace, name: str, *, augment: bool = False) -> ImageTextSplit:
    transform = image_transform(args.image_size, augment=augment)
    return load_split(args.data_dir, name, transform, list_name=args.list_name, image_folder=args.image_folder)


def _run_train(args: argparse.Namespace) -> int:
    names = {field.name for field in dataclasses.fields(RetrievalConfig)}
    config = RetrievalConfig(**{name: value for name, value in vars(args).items() if name in names})
    refuse(Path(args.output), dataclasses.asdict(config))
    split = _split(args, "train", augment=args.augment)
    torch.manual_seed(config.seed)  # of what is new in the model
    model, tokenizer = _load_model(args)
    prepare(model, config)
    history = train(
        model, tokenizer, split, config, output=args.output, device=pick_device(args.device), workers=args.workers,
        progress=not args.quiet,
    )  # fmt: skip
    if place()[0] != 0:
        return 0
    for epoch, (contrastive, matching) in enumerate(history, 1):
        print(f"epoch {epoch}: contrastive loss {contrastive:.4f}, matching loss {matching:.4f}")
    print(f"written: {Path(args.output) / 'model.safetensors'}")
    return 0


def _run_evaluate(args: argparse.Namespace) -> int:
    split = _split(args, args.split)
    model, tokenizer = _load_model(args)
    config = RetrievalConfig() if args.tuned is None else load_tuned(model, args.tuned)
    if args.no_merging:
        huggingface.remove(model)
    if args.top_k is not None:
        config = dataclasses.replace(config, top_k=args.top_k)
    if args.encode_token_id is not None:
        config = dataclasses.replace(config, encode_token_id=args.encode_token_id)
    device, rank = pick_device(args.device), place()[0]
    score = evaluate(
        model.to(device), tokenizer, split, config, batch_size=args.batch_size, device=device, workers=args.workers,
        progress=not args.quiet and rank == 0,
    )  # fmt: skip
    if rank == 0:
        print(json.dumps(dataclasses.asdict(score)) if args.json else score.table())
    return 0


def _run_check(args: argparse.Namespace) -> int:
    wrong = check_folder(args.data_dir, decode=not args.no_decode, list_name=args.list_name, image_folder=args.image_folder)
    print("\n".join(wrong) or f"{args.data_dir}: whole")
    return 1 if wrong else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet retrieval --demo``, ``train``, ``evaluate``, ``check``."""
    parser.add_argument("--demo", action="store_true", help="all of it on drawn shapes and a tiny BLIP, without any download")
    parser.add_argument("--seed", type=int, default=0, help="of --demo")
    parser.set_defaults(work=None, usage_error=parser.error)
    commands = parser.add_subparsers(metavar="COMMAND")
    default = RetrievalConfig()

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(work=run)
        command.add_argument("--data-dir", required=True, help="folder with the list and the folder of images")
        command.add_argument("--list-name", default="dataset_flickr30k.json", help="default: %(default)s")
        command.add_argument("--image-folder", default="flickr30k-images", help="default: %(default)s")
        return command

    def add_model(command: argparse.ArgumentParser) -> None:
        command.add_argument("--model", default="Salesforce/blip-itm-base-flickr", help="name or folder (default: %(default)s)")
        command.add_argument("--image-size", type=int, default=384, help="pixels a side (default: %(default)s)")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
        command.add_argument("--workers", type=int, default=0, help="processes that read images")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_argument("--encode-token-id", type=int, help="first token where text meets image; BLIP's own is 30523")

    tune = add("train", "tune a BlipForImageTextRetrieval on the training split", _run_train)
    add_model(tune)
    tune.add_argument("--output", required=True, help="folder of the run; a run that was killed goes on in its own")
    tune.add_argument("--no-merging", dest="merge", action="store_false", help="keep every image token")
    tune.add_argument("--layer", type=int, help="0-based layer that merges (default: the middle one)")
    tune.add_argument("--no-refinement", dest="refine", action="store_false", help="match by raw keys")
    tune.add_argument("--attention", choices=("eager", "sdpa"), help="of the vision encoder (default: the model's)")
    tune.add_argument("--no-augment", dest="augment", action="store_false", help="no random crops, flips and RandAugment")
    tune.add_argument("--negative-all-rank", action="store_true", help="hard negatives from the batches of all processes")
    tune.add_argument("--grad-checkpointing", action="store_true", help="compute activations again to save memory")
    tune.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    for name in (
        "adapter_dim", "adapter_scale", "key_value_dim", "temperature", "queue_size", "momentum", "alpha", "epochs",
        "batch_size", "lr", "min_lr", "weight_decay", "max_length", "top_k", "seed",
    ):  # fmt: skip
        value = getattr(default, name)
        tune.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, help="default: %(default)s")

    score = add("evaluate", "recall of a model, tuned or as it comes", _run_evaluate)
    add_model(score)
    score.add_argument("--tuned", help="model.safetensors of a run")
    score.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: %(default)s")
    score.add_argument("--no-merging", action="store_true", help="the tuned weights with every image token kept")
    score.add_argument("--top-k", type=int, help=f"candidates to re-rank (default: the run's, or {default.top_k})")
    score.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    score.add_argument("--json", action="store_true", help="the score as JSON")

    check = add("check", "say what is missing or damaged in a data folder", _run_check)
    check.add_argument("--no-decode", action="store_true", help="do not open every image")


def run(args: argparse.Namespace) -> int:
    """Does what was asked for; 1 where ``check`` found something."""
    if args.work is None and not args.demo:
        args.usage_error("expected --demo, train, evaluate or check")
    if args.work is None:
        with tempfile.TemporaryDirectory() as folder:
            run_demo(Path(folder), seed=args.seed)
        return 0
    if args.work is _run_check:
        return _run_check(args)
    with process_group(pick_device(args.device)):
        return int(args.work(args))
