"""Which layer to merge in: what each choice costs and keeps, on one's own model and images."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..adapters import METHODS, add_adapters, remove_adapters
from ..adapters.freezing import freeze
from ..data import Transforms, image_files, load, read_image
from ..data.preprocessing import Preprocessing
from ..measure import flop_counter, step_memory
from ..measure.timing import quotient, take_turns
from ..train.inputs import load_data
from ..vit.patch import apply, find_model
from .loading import open_tuned

__all__ = ["Plan", "PlanRow", "add_arguments", "candidates", "picture", "plan", "run"]

MEMORY_BATCH = 64


class PlanRow(NamedTuple):
    """One choice. Attributes:

    layers: 0-based blocks that merge; none for the model as it is.
    time_ms: median of a forward, per image. time_ratio: to the model as it is, the median over rounds.
    gmac: 10⁹ multiply-adds of one image. memory_gb: of a tuning step of 64 images, exact tensors.
    agreement: share of the images whose best class is that of the model as it is. similarity: mean cosine of its outputs.
    accuracy: share of right answers; None without labels. The last three are None without images.
    """

    layers: tuple[int, ...]
    time_ms: float
    time_ratio: float
    gmac: float
    memory_gb: float
    agreement: float | None
    similarity: float | None
    accuracy: float | None

    @property
    def name(self) -> str:
        return "+".join(map(str, self.layers)) or "none"


class Plan(NamedTuple):
    """What :func:`plan` returns. Attributes: rows, the model as it is first; conditions, in words."""

    rows: list[PlanRow]
    conditions: list[str]

    def drop(self, row: PlanRow) -> float | None:
        """Points lost to merging before any tuning: of accuracy with labels, else of agreement; None without images."""
        if row.accuracy is not None and self.rows[0].accuracy is not None:
            return 100 * (self.rows[0].accuracy - row.accuracy)
        return None if row.agreement is None else 100 * (1 - row.agreement)

    def recommend(self, *, max_drop: float | None = None, speed_up: float | None = None) -> PlanRow | None:
        """The fastest row that loses at most ``max_drop`` points; or, of those ``speed_up`` times as fast, the best one.

        Returns:
            None where no merging row does. ValueError: neither or both are given, or nothing tells what is lost.
        """
        if (max_drop is None) == (speed_up is None):
            raise ValueError("max_drop, speed_up: expected one of them")
        merging = self.rows[1:]
        drops = {row: self.drop(row) for row in merging}
        if max_drop is not None:
            if any(value is None for value in drops.values()):
                raise ValueError("max_drop: needs images that tell what is lost")
            good = [row for row, value in drops.items() if value is not None and value <= max_drop + 1e-9]
            return min(good, key=lambda row: row.time_ratio, default=None)
        assert speed_up is not None
        fast = [row for row in merging if row.time_ratio <= 1 / speed_up]
        # Without images the later layer is the safer one.
        return min(fast, key=lambda row: (drops[row] or 0.0, -min(row.layers)), default=None)

    def table(self) -> str:
        """Every row in a line, and the conditions under them."""
        titles = ["layers", "ms/image", "× as it is", "GMAC", "tuning, GB", "same class", "cosine", "accuracy"]
        lines = [
            [
                row.name, f"{row.time_ms:.2f}", f"{row.time_ratio:.3f}", f"{row.gmac:.2f}", f"{row.memory_gb:.2f}",
                _percent(row.agreement), "" if row.similarity is None else f"{row.similarity:.4f}", _percent(row.accuracy),
            ]
            for row in self.rows
        ]  # fmt: skip
        shown = [i for i in range(len(titles)) if any(line[i] for line in lines)]
        widths = [max(len(titles[i]), *(len(line[i]) for line in lines)) for i in shown]
        rows = [titles, *lines]
        text = ["  ".join(cells[i].rjust(width) for i, width in zip(shown, widths, strict=True)) for cells in rows]
        return "\n".join([*text, "", *self.conditions])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def candidates(depth: int) -> list[tuple[int, ...]]:
    """Every single layer, and some pairs."""
    thirds = {
        (depth // 4, depth // 2),
        (depth // 4, 3 * depth // 4),
        (depth // 3, 2 * depth // 3),
        (depth // 2, 3 * depth // 4),
    }
    return [*((i,) for i in range(depth)), *sorted(pair for pair in thirds if pair[0] != pair[1])]


def plan(
    model: nn.Module,
    *,
    image_size: tuple[int, int],
    images: Tensor | None = None,
    labels: Tensor | None = None,
    layers: Sequence[tuple[int, ...]] | None = None,
    method: str = "bi-adaptformer",
    batch_size: int = 8,
    seconds: float = 60.0,
    tick: Callable[[str], object] = lambda text: None,
) -> Plan:
    """Time, work, memory and agreement with the unmerged model, for each choice of layers.

    Args:
        model: a timm model, on the device it is to run on. It is left as it was.
        image_size: (height, width) in pixels. images: (K, 3, H, W) as the model takes them; labels: (K,) int64, of the
            model's own classes. layers: which choices; None: :func:`candidates`.
        method: whose tuning step's memory is counted. batch_size: images per timed forward. seconds: for all timing together.
        tick: is told what is being done.

    Raises:
        TypeError: merging is not sound in this model. ValueError: an argument; or the grid is too small to merge twice.
    """
    inner: Any = find_model(model)
    like = next(model.parameters())
    device = like.device
    chosen: list[tuple[int, ...]] = [(), *(candidates(len(inner.blocks)) if layers is None else layers)]
    g = torch.Generator().manual_seed(0)
    if images is None:
        batch = torch.randn(batch_size, 3, *image_size, generator=g).to(device, like.dtype)
    else:
        batch = images[torch.arange(batch_size) % len(images)].to(device, like.dtype)
    training = model.training
    model.eval()

    rows: list[PlanRow] = []
    try:
        copies = {choice: _merging(model, choice) for choice in chosen}
        calls: dict[Any, Callable[[], object]] = {choice: _forward(one, batch) for choice, one in copies.items()}
        tick(f"timing {len(chosen)} choices in turns")
        taken = take_turns(calls, device, seconds)
        outputs: Tensor | None = None
        for choice, merging in copies.items():
            tick(f"layers {'+'.join(map(str, choice)) or 'none'}: counting")
            agreement = similarity = accuracy = None
            if images is not None:
                found = _outputs(merging, images, batch_size)
                outputs = found if outputs is None else outputs
                agreement = float((found.argmax(-1) == outputs.argmax(-1)).double().mean())
                similarity = float(nn.functional.cosine_similarity(found, outputs, dim=-1).double().mean())
                if labels is not None:
                    accuracy = float((found.argmax(-1) == labels.cpu()).double().mean())
            rows.append(
                PlanRow(
                    choice, 1e3 * statistics.median(taken[choice]) / batch_size, quotient(taken[choice], taken[()]),
                    _gmac(merging, image_size, device), _tuning_bytes(model, choice, method, image_size) / 1e9, agreement,
                    similarity, accuracy,
                )
            )  # fmt: skip
    finally:
        model.train(training)
    told = [
        f"Time: batch {batch_size} on {device}, {torch.get_num_threads()} threads, {len(taken[()])} rounds in turns, medians.",
        f"Memory: a tuning step of {MEMORY_BATCH} images with {method}, exact tensors.",
    ]
    if images is not None:
        told.append(f"Quality: {len(images)} images, before any tuning; tuning regains some of what is lost.")
    return Plan(rows, told)


def _merging(model: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    """The model with other merging layers, on the same parameters."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    refined: Any = find_model(other)
    known = [block.refinement for block in refined.blocks if getattr(block, "refinement", None) is not None]
    apply(other, layers, refinement=False)
    # A trained refinement goes where merging goes.
    return apply(other, layers, refinement=dict.fromkeys(layers, known[0])) if known and layers else other


def _forward(model: nn.Module, batch: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(batch)

    return run


def _outputs(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    like = next(model.parameters())
    with torch.no_grad():
        return torch.cat([model(part.to(like.device, like.dtype)).float().cpu() for part in images.split(batch_size)])


def _gmac(model: nn.Module, image_size: tuple[int, int], device: torch.device) -> float:
    like, counter = next(model.parameters()), flop_counter()
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, *image_size, device=device, dtype=like.dtype))
    return float(counter.get_total_flops()) / 2e9


def _tuning_bytes(model: nn.Module, layers: tuple[int, ...], method: str, image_size: tuple[int, int]) -> int:
    """Peak of a step of tuning, counted without computing: shapes and storages alone."""
    other = remove_adapters(copy.deepcopy(model).to("meta"))
    apply(other, None, refinement=False)
    freeze(apply(add_adapters(other, method), layers, refinement=True if layers else None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        other.to_empty(device="cpu").train()
        images = torch.empty(MEMORY_BATCH, 3, *image_size, dtype=next(other.parameters()).dtype)
        return step_memory(other, images, torch.zeros(MEMORY_BATCH, dtype=torch.int64)).peak


def picture(plan: Plan, path: str | Path) -> None:
    """Time against what is lost, a point per choice; without images, time by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    drops = [plan.drop(row) for row in plan.rows]
    for count, marker in ((0, "s"), (1, "o"), (2, "^")):
        here = [(row, drop) for row, drop in zip(plan.rows, drops, strict=True) if len(row.layers) == count]
        title = ("as it is", "one layer", "two layers")[count]
        if any(drop is not None for _, drop in here):
            axes.plot([r.time_ratio for r, _ in here], [d or 0.0 for _, d in here], marker, label=title)
            for row, drop in here:
                axes.annotate(row.name, (row.time_ratio, drop or 0.0), xytext=(4, 4), textcoords="offset points", fontsize=8)
        elif count == 1:
            axes.plot([r.layers[0] for r, _ in here], [r.time_ratio for r, _ in here], marker, label=title)
    if drops[0] is not None:
        labels = ("time, to the model as it is", "points lost before tuning")
        axes.legend()
    else:
        labels = ("layer that merges", "time, to the model as it is")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet plan``."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="timm's name of a model; without images only costs are told")
    what.add_argument("--run", dest="run_folder", metavar="RUN", help="folder of a finished run; judged on its test images")
    parser.add_argument(
        "--weights", help="file of the backbone's weights (default: timm's pre-trained ones, once images are given)"
    )
    parser.add_argument("--images", nargs="+", metavar="IMAGE|FOLDER", help="images to compare the outputs on")
    parser.add_argument("--data-dir", help="labelled images: a folder per class, or a CSV file")
    parser.add_argument("--count", type=int, default=256, help="how many images (default: %(default)s)")
    parser.add_argument("--layers", metavar="I,J,K+L", help="choices to try (default: every layer and some pairs)")
    parser.add_argument("--method", default="bi-adaptformer", choices=tuple(METHODS), help="whose tuning step's memory is counted (default: %(default)s)")  # fmt: skip  # noqa: E501
    parser.add_argument("--batch-size", type=int, default=8, help="images per timed forward (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for timing (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--max-drop", type=float, metavar="POINTS", help="recommend the fastest choice that loses at most this")
    wish.add_argument("--speed-up", type=float, metavar="TIMES", help="recommend the best choice that is this much faster")
    parser.add_argument("--plot", metavar="FILE", help="draw time against what is lost")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")


def run(options: argparse.Namespace) -> int:
    """Prints the table and what it recommends; 1 where no choice meets the wish."""
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs the package matplotlib: pip install matplotlib")
    for name in ("count", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    layers = None if options.layers is None else _choices(options.layers)
    model, size, images, labels = _inputs(options)
    if options.max_drop is not None and images is None:
        raise ValueError("--max-drop: needs images that tell what is lost: --images or --data-dir")
    found = plan(
        model, image_size=size, images=images, labels=labels, layers=layers, method=options.method,
        batch_size=options.batch_size, seconds=options.seconds, tick=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    if options.plot:
        picture(found, options.plot)
    print("\n".join(json.dumps(row._asdict()) for row in found.rows) if options.json else found.table())
    if options.max_drop is None and options.speed_up is None:
        return 0
    best = found.recommend(max_drop=options.max_drop, speed_up=options.speed_up)
    out = sys.stderr if options.json else sys.stdout
    if best is None:
        print("No choice does what was asked for.", file=out)
        return 1
    lost = found.drop(best)
    loses = "" if lost is None else f", {lost:.2f} points lost before tuning"
    print(f"Recommended: --layer {best.name}: {best.time_ratio:.3f} × the time{loses}.", file=out)
    return 0


def _choices(text: str) -> list[tuple[int, ...]]:
    try:
        return [tuple(sorted(int(layer) for layer in part.split("+"))) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--layers: expected layers such as 3,6 or pairs such as 3+6, got {text!r}") from error


def _inputs(options: argparse.Namespace) -> tuple[nn.Module, tuple[int, int], Tensor | None, Tensor | None]:
    """Model, image size, images and labels that the options ask for."""
    if options.run_folder is not None:
        tuned = open_tuned(options.run_folder, weights=options.weights, device=options.device)
        model, transform, size = tuned.model, tuned.transform, tuned.preprocessing.size
    else:
        if not timm.is_model(options.model):
            raise ValueError(f"--model: timm has no model {options.model!r}")
        wanted = options.weights is not None or options.images is not None or options.data_dir is not None
        overlay = {} if options.weights is None else {"pretrained_cfg_overlay": {"file": options.weights}}
        model = timm.create_model(options.model, pretrained=wanted, **overlay).to(options.device).eval()
        find_model(model)  # says why not, before any image is read
        how = Preprocessing.of(model)
        transform, size = how.transform(), how.size
    if options.images is not None:
        return model, size, torch.stack([transform(read_image(f)) for f in image_files(options.images)[: options.count]]), None
    if options.data_dir is not None:
        family = "folder" if Path(options.data_dir).is_dir() else "csv"
        test: Any = load(family, "", options.data_dir, transforms=Transforms(transform))
    elif options.run_folder is not None and tuned.config is not None:
        test = load_data(tuned.config)
    else:
        return model, size, None, None
    # Spread over the classes, which follow one another in the list.
    chosen = torch.linspace(0, len(test.test) - 1, min(options.count, len(test.test))).long().tolist()
    pairs = [test.test[i] for i in chosen]
    images = torch.stack([image for image, _ in pairs])
    if test.multi_label or test.num_classes != getattr(model, "num_classes", None):
        print("These are not the model's own classes: choices are compared by the model's outputs.", file=sys.stderr)
        return model, size, images, None
    return model, size, images, torch.tensor([label for _, label in pairs])
