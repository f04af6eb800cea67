"""``fpet tables``: the tables of the paper, measured here, beside what was published.

What 1, 3 and A3 hold is known: the tuning methods on VTAB-1K, and ways to have fewer tokens. Of 4, 5, A1 and A2 we know the
quantities and the backbones, but had no copy to read which is which: the assignment below is ours, and the title says so.

Time is that of a forward of the tuned model, methods that are linear folded in; of a step of tuning (forward, loss, backward,
AdamW); both on seeded noise, with random weights, on which neither depends. All variants of a backbone take turns, and a ratio
is the median over rounds of the quotient of two times of one round: to the same method with every token kept ("× plain"), or
to the bare backbone. Nothing is timed before every token is accounted for.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fpet_kernels import backends
from fpet_kernels.provenance import provenance

from .. import data
from ..adapters import METHODS
from ..adapters.freezing import count_parameters
from ..comparators import REDUCTIONS
from ..measure.timing import CLOCKS, MIN_ROUNDS, quotient, take_turns
from . import accuracy, measure, render
from .measure import MODELS, Variant
from .published import lookup
from .render import QUANTITIES

__all__ = ["QUANTITIES", "TABLES", "Table", "add_arguments", "markdown", "run", "variants_of"]

Row = dict[str, Any]
PAPER_BATCH = {"time": 256, "memory": 64}
MEASURES = {
    "time": ("time_ms",), "step": ("step_ms",), "gmac": ("gmac",), "memory": ("memory_gb", "reserved_gb"),
    "parameters": ("parameters_m", "stored_kib"),
}  # fmt: skip
COUNTED = {name for measure_name in ("gmac", "memory", "parameters") for name in MEASURES[measure_name]}
DEFAULT_BUDGET = 120.0
ONE_LAYER = tuple(name for name in REDUCTIONS if name not in ("none", "tome", "ltmp"))  # the others reduce everywhere


class Table(NamedTuple):
    """Attributes: title; quantities, in the order of columns; rows, of a backbone and the methods chosen; known, whether the
    paper's table of this number is known to hold this."""

    title: str
    quantities: tuple[str, ...]
    rows: Callable[[str, Sequence[str]], list[Variant]]
    known: bool


def _merging(model: str, method: str, reduction: str, layer: int | None = None) -> Variant:
    middle = MODELS[model].depth // 2
    return Variant(model, method, reduction, (layer or middle) if reduction in ONE_LAYER else None)


def _methods(model: str, methods: Sequence[str]) -> list[Variant]:
    return [_merging(model, method, reduction) for method in methods for reduction in ("none", "fpet")]


def _tuned(model: str, methods: Sequence[str]) -> list[Variant]:
    return [variant for variant in _methods(model, methods) if _trains(variant)]


def _reductions(model: str, methods: Sequence[str]) -> list[Variant]:
    return [_merging(model, method, reduction) for method in methods for reduction in ("none", *_without_none(REDUCTIONS))]


def _layers(model: str, methods: Sequence[str]) -> list[Variant]:
    sixth = max(1, MODELS[model].depth // 6)
    return [
        variant
        for method in methods[:1]
        for variant in (Variant(model, method, "none"), *(_merging(model, method, "fpet", sixth * k) for k in range(1, 6)))
    ]


def _without_none(names: Iterable[str]) -> list[str]:
    return [name for name in names if name != "none"]


TABLES = {
    "1": Table(
        "tuning methods, with and without merging", ("accuracy", "time_ms", "gmac", "memory_gb", "parameters_m"), _methods, True
    ),
    "3": Table(
        "ways to have fewer tokens, with AdaptFormer", ("accuracy", "time_ms", "gmac", "memory_gb"),
        lambda model, methods: _reductions(model, ["adaptformer"]), True,
    ),
    "4": Table("cost of tuning", ("step_ms", "memory_gb", "reserved_gb"), _tuned, False),
    "5": Table(
        "where to merge, with AdaptFormer", ("accuracy", "time_ms", "gmac", "memory_gb"),
        lambda model, methods: _layers(model, ["adaptformer"]), False,
    ),
    "A1": Table("backbones", ("accuracy", "time_ms", "gmac", "memory_gb"), _methods, False),
    "A2": Table("what is tuned and stored", ("parameters_m", "stored_kib"), _methods, False),
    "A3": Table(
        "ways to have fewer tokens, with other methods", ("accuracy", "time_ms", "gmac", "memory_gb"),
        lambda model, methods: _reductions(model, ["lora", "bi-adaptformer"]), True,
    ),
}  # fmt: skip


def variants_of(tables: Iterable[str], models: Iterable[str], methods: Sequence[str]) -> dict[Variant, set[str]]:
    """Every row of these tables once, and the quantities that some table wants of it."""
    wanted: dict[Variant, set[str]] = {}
    for name in tables:
        for model in models:
            for variant in TABLES[name].rows(model, methods):
                wanted.setdefault(variant, set()).update(TABLES[name].quantities)
                wanted.setdefault(variant.plain, set()).update(TABLES[name].quantities)  # what ratios are taken to
    return wanted


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class _Collector:
    """Measures what the options ask for. Attributes: rows so far; left_out, what was not measured, and why."""

    options: argparse.Namespace
    bar: Any

    def __post_init__(self) -> None:
        self.rows: dict[Variant, Row] = {}
        self.left_out: list[str] = []
        self.failures: list[str] = []

    def row(self, variant: Variant) -> Row:
        if variant not in self.rows:
            o = self.options
            published = lookup(variant.model, variant.method, variant.reduction, variant.layer)
            merges = variant.reduction == "fpet"
            self.rows[variant] = {
                "benchmark": "paper_tables", "model": variant.model, "timm_name": MODELS[variant.model].timm_name,
                "method": variant.method, "reduction": variant.reduction, "layer": variant.layer, "device": o.device.type,
                "dtype": "bfloat16 autocast" if o.amp else "float32", "attention": o.attention,
                "backend": backends.select(torch.empty(1, 1, 1, device=o.device), None) if merges else None,
                "measured": {}, "ratio": {}, "backbone_ratio": {}, "conditions": {},
                "published": {name: number._asdict() for name, number in published.items()},
            }  # fmt: skip
        return self.rows[variant]

    def spends_the_same(self, variant: Variant) -> bool:
        """Whether inference costs with random weights what it costs with tuned ones; notes it where not."""
        if variant.reduction != "ltmp":
            return True
        note = "time and FLOPs of LTMP: they depend on what it has learnt, and these weights are random"
        if note not in self.left_out:
            self.left_out.append(note)
        return False

    def counted(self, wanted: dict[Variant, set[str]]) -> None:
        """FLOPs, memory and parameters: no time in them."""
        o = self.options
        for variant, quantities in wanted.items():
            self.bar.set_description(f"{variant}: counting")
            row = self.row(variant)
            measured, told = row["measured"], row["conditions"]
            if "gmac" in quantities and self.spends_the_same(variant):
                measured["gmac"] = measure.gmac(variant)
            if "memory_gb" in quantities and _trains(variant):
                batch = PAPER_BATCH["memory"]
                found, how = measure.training_bytes(variant, batch, o.device, o.attention, o.amp)
                measured["memory_gb"], told["memory_gb"] = found / 1e9, {"batch": batch, "how": how}
            if "reserved_gb" in quantities and _trains(variant):
                batch = PAPER_BATCH["memory"]
                found, how = measure.reserved_bytes(variant, batch, o.device, o.attention, o.amp)
                measured["reserved_gb"], told["reserved_gb"] = found / 1e9, {"batch": batch, "how": how}
            if {"parameters_m", "stored_kib"} & quantities:
                model = measure.build(measure.backbone(variant.model, torch.device("meta")), variant, training=True)
                counts = count_parameters(model)
                measured["parameters_m"] = (counts.adapters + counts.refinement) / 1e6
                measured["stored_kib"] = counts.adapter_bytes / 1024
            self.bar.update()
        for variant in wanted:
            for name in ("gmac", "memory_gb", "reserved_gb"):
                mine, plain = (self.rows[v]["measured"].get(name) for v in (variant, variant.plain))
                if mine is not None and plain is not None:
                    self.rows[variant]["ratio"][name] = mine / plain

    def timed(self, model: str, variants: Sequence[Variant], quantity: str, budget: float) -> None:
        """Times of a forward ("time_ms") or a step of tuning ("step_ms") of variants of one backbone, in turns."""
        o, training = self.options, quantity == "step_ms"
        variants = [v for v in variants if (_trains(v) if training else self.spends_the_same(v))]
        batch = o.batch or _batch(model, o.device, training)
        images, labels = measure.inputs(MODELS[model].image_size, batch, o.device)
        base = measure.backbone(model, o.device, o.attention)
        calls: dict[Variant, Any] = {}
        for variant in variants:
            self.bar.set_description(f"{variant}: warm-up")
            why = measure.complaint(measure.build(base, variant, training=False), variant, images[:1])
            if why is not None:
                self.failures.append(why)
                continue
            built = measure.build(base, variant, training=training)
            call = measure.step_call(built, images, labels, o.amp) if training else measure.forward_call(built, images, o.amp)
            try:
                call()
                calls[variant] = call
            except (torch.OutOfMemoryError, MemoryError) as error:
                self.left_out.append(f"{variant}, {quantity}, batch {batch}: {str(error).splitlines()[0]}")
        self.bar.set_description(f"{MODELS[model].title}, {quantity}, batch {batch}: timing {len(calls)} in turns")
        seconds = take_turns(calls, o.device, budget, clock=o.clock)
        bare = next((v for v in seconds if v.reduction == "none" and v.method in ("full", "linear", "none")), None)
        for variant, taken in seconds.items():
            row = self.row(variant)
            row["measured"][quantity] = 1e3 * statistics.median(taken) / batch
            clock = "device" if o.device.type == "cuda" else o.clock
            told = {"batch": batch, "rounds": len(taken), "clock": clock, "threads": torch.get_num_threads()}
            row["conditions"][quantity] = told
            if variant.plain in seconds:
                row["ratio"][quantity] = quotient(taken, seconds[variant.plain])
            if bare is not None and not training:
                row["backbone_ratio"][quantity] = quotient(taken, seconds[bare])
        del base, calls
        gc.collect()
        self.bar.update()

    def trained(self, variants: Iterable[Variant], tasks: Sequence[str]) -> None:
        """Accuracies on data that is at hand."""
        o = self.options
        for variant in variants:
            found = accuracy.on_data(
                variant, o.family, tasks, Path(o.data), o.seeds, Path(o.runs), o.set, self.bar.set_description, o.scales
            )
            row = self.row(variant)
            row["measured"]["accuracy"] = accuracy.vtab_mean({task: statistics.fmean(v) for task, v in found.items()})
            row["accuracies"] = found
            row["conditions"]["accuracy"] = {
                "data": o.family, "tasks": f"{len(tasks)} of {len(data.task_names(o.family))}", "seeds": len(o.seeds),
                "s": "chosen by task" if o.scales and accuracy.has_scale(variant.method) else "the method's own",
            }  # fmt: skip
            self.bar.update()


def _trains(variant: Variant) -> bool:
    """Whether a step of tuning has something to tune before the head, which alone makes no table of training."""
    return variant.method not in ("none", "linear")


def _batch(model: str, device: torch.device, training: bool) -> int:
    """The paper's on a GPU; on a CPU as many images as make about 10¹¹ multiply-adds, a power of two up to 16."""
    if device.type == "cuda":
        return PAPER_BATCH["memory" if training else "time"]
    images = 100 / measure.gmac(Variant(model, "none", "none"))
    return int(2 ** min(4, max(0, int(images).bit_length() - 1)))


# --- output --------------------------------------------------------------------------------------------------------------


def markdown(
    rows: Sequence[Row], tables: Iterable[str], methods: Sequence[str] | None = None, models: Sequence[str] | None = None
) -> str:
    """Every table, as Markdown, for at least half of whose rows ``rows`` have something.

    Args:
        methods: of the tables over methods; None: those that the rows are of. models: backbones; None: all.
    """
    parts: list[str] = []
    if methods is None:
        methods = [name for name in METHODS if any(r["method"] == name for r in rows if r["model"] != "embedded")]
    for setting, found in render.merge_rows(rows).items():
        present = [name for name in MODELS if any(v.model == name for v in found) and (models is None or name in models)]
        for name in tables:
            table = TABLES[name]
            for chosen in [present] if name == "A1" else [[model] for model in present]:
                variants = list(dict.fromkeys(v for model in chosen for v in table.rows(model, methods)))
                here = {v: found[v] for v in variants if v in found}
                told = [v for v, row in here.items() if any(q in row["measured"] for q in table.quantities)]
                if not told or 2 * len(told) < len(variants):
                    continue
                ours = "" if table.known else " (what this number holds is our assignment)"
                where = "" if name == "A1" else f", {MODELS[chosen[0]].title}"
                device, dtype, attention = setting
                parts.append(
                    "\n".join(
                        [
                            f"### Table {name}: {table.title}{where}{ours}", "",
                            f"Here: {device}, {dtype}, {attention} attention.",
                            *(f"{line}." for line in render.conditions(here, table.quantities)), "",
                            render.variant_table(variants, table.quantities, here),
                        ]
                    )
                )  # fmt: skip
    if any(row["model"] == "embedded" for row in rows):
        title = "### Embedded tasks: ways to have fewer tokens, as in Table 3, on a tiny backbone\n\n"
        parts.append(title + render.embedded_table(rows))
    return "\n\n".join(parts)


def _checkout() -> Path | None:
    """The benchmarks folder of the source tree that this package runs from, or None."""
    folder = Path(__file__).parents[3] / "benchmarks"
    return folder if (folder / "paper_tables.py").is_file() else None


# --- command line --------------------------------------------------------------------------------------------------------


def _names(known: Iterable[str], shortcuts: dict[str, Sequence[str]]) -> Callable[[str], list[str]]:
    known = list(known)

    def names(text: str) -> list[str]:
        if text in shortcuts:
            return list(shortcuts[text])
        found = [name for name in text.replace(" ", "").split(",") if name]
        if not found or any(name not in known for name in found):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join([*known, *shortcuts])}, got {text!r}")
        return found

    return names


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different integers of at least 0, separated by commas, got {text!r}")
    return seeds


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch sees no CUDA device here, got {text!r}")
    return device


def _number(kind: type, least: float) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number of at least {least:g}, got {text!r}")
        return value

    return number


_EXAMPLES = """\
examples:
  fpet tables --quick                                        ViT-S and two methods, ten seconds of timing
  fpet tables --models all --measure gmac,memory,parameters  what can be counted without timing, for everything
  fpet tables --device cuda                                  batch 256, training memory at batch 64
  fpet tables --tables 3 --measure none --accuracy embedded --seeds 0,1,2
  fpet tables --tables 1 --accuracy data --data vtab-1k --device cuda
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet tables``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (__doc__ or "").partition("\n\n")[2]
    tables = "".join(f"  {name:<3} {t.title}{'' if t.known else ' (our assignment)'}\n" for name, t in TABLES.items())
    parser.epilog = f"tables:\n{tables}\n{_EXAMPLES}"
    public = [name for name in MODELS if name != "tiny"]
    add = parser.add_argument
    add("--tables", type=_names(TABLES, {"all": list(TABLES)}), default=list(TABLES), help="such as 1,3; default all")
    add("--models", type=_names(MODELS, {"all": public}),
        help=f"some of {', '.join(MODELS)}; all: every one but tiny; default vitb16")  # fmt: skip
    add("--methods", type=_names(METHODS, {"all": list(METHODS)}), help="of the tables over methods; default all")
    add("--measure", type=_names(MEASURES, {"all": list(MEASURES), "none": []}), default=list(MEASURES),
        help=f"some of {', '.join(MEASURES)}; all (default); none")  # fmt: skip
    add("--device", type=_device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1")
    add("--amp", action="store_true", help="bfloat16 autocast; default float32")
    add("--attention", choices=("fused", "plain"), default="fused",
        help="plain keeps attention matrices, as the timm release under the paper's code does")  # fmt: skip
    add("--batch", type=_number(int, 1), help="images at a time where time is measured; default on CUDA 256, in training 64")
    add("--threads", type=_number(int, 1), help="CPU threads; default torch's")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: the process's own processor time, for a shared machine")
    add("--budget", type=_number(float, 0), default=DEFAULT_BUDGET,
        help=f"seconds of timing in all, default {DEFAULT_BUDGET:g}, but at least {MIN_ROUNDS} rounds")  # fmt: skip
    add("--quick", action="store_true", help="a rough look: vits16, adaptformer and lora, 10 seconds of timing, tables 1, 3, 4")
    add("--accuracy", choices=("none", "embedded", "untuned", "data"), default="none",
        help="embedded: tune on generated tasks; untuned: reduce the tokens of the embedded backbone as it was pre-trained; "
        "data: tune on --data by the paper's recipe; none (default)")  # fmt: skip
    add("--data", metavar="DIR", help="folder of the data, in the format of fpet train")
    add("--family", choices=("vtab1k", "torchvision", "fgvc"), default="vtab1k", help="of the data; default vtab1k")
    add("--tasks", help="comma-separated; default: orientation (embedded), every task that DIR holds (data)")
    add("--seeds", type=_seeds, default=[0], help="of the accuracies; default 0")
    add("--scales", type=_scales, default=[], metavar="S,S,…",
        help="with --accuracy data: the scale s of each task is the best of these on its validation images")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the runs, as of fpet train")
    add("--runs", default="runs/tables", help="folder of the runs that accuracies come from; default runs/tables")
    add("--out", help="JSON lines are appended here; none: nowhere; default benchmarks/results/paper_tables-DEVICE.jsonl in "
        "a source tree, else ./paper_tables-DEVICE.jsonl")  # fmt: skip
    add("--markdown", metavar="FILE", help="the tables, besides on the screen, in this file")
    add("--plot", metavar="FILE", help="a picture in the manner of Figures 3 and A1: cost and accuracy of every row")
    add("--note", help="what else a reader should know, kept in every row")
    add("--show", metavar="FILE", help="measure nothing: tables, and --plot, of the rows in FILE")


def _complete(options: argparse.Namespace) -> None:
    """Fills in what depends on other options. ValueError: options that don't go together; before any work."""
    options.set = {"device": options.device.type} | accuracy.parse_settings(options.set)
    if options.quick:
        options.models, options.methods = options.models or ["vits16"], options.methods or ["adaptformer", "lora"]
        options.tables = [name for name in options.tables if name in ("1", "3", "4")]
        options.budget = min(options.budget, 10.0)
    if options.show is None:
        options.models, options.methods = options.models or ["vitb16"], options.methods or list(METHODS)
    if (options.accuracy == "data") != (options.data is not None):
        raise ValueError("--accuracy, --data: expected both of --accuracy data and --data DIR, or neither")
    if options.data is not None and not Path(options.data).is_dir():
        raise ValueError(f"--data: expected a folder, got {options.data}")
    known = data.task_names("shapes" if options.accuracy == "embedded" else options.family)
    if options.tasks is not None:
        if options.accuracy in ("none", "untuned"):
            raise ValueError(f"--tasks: expected --accuracy embedded or data with it, got --tasks {options.tasks} alone")
        options.tasks = options.tasks.split(",")
        if wrong := [task for task in options.tasks if task not in known]:
            raise ValueError(f"--tasks: expected some of {', '.join(known)}, got {', '.join(wrong)}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: expected the package matplotlib, which is not installed")
    for name in ("plot", "markdown"):
        path = getattr(options, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name}: expected a file in a folder that exists, got {path}")
    if options.show is not None and not Path(options.show).is_file():
        raise ValueError(f"--show: expected a file, got {options.show}")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes; 1 where something was found to compute wrongly and so was not timed."""
    _complete(options)
    if options.show is not None:
        rows = [json.loads(line) for line in Path(options.show).read_text(encoding="utf-8").splitlines() if line.strip()]
        _report([row for row in rows if row.get("benchmark") == "paper_tables"], options)
        return 0
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        rows, collector = _measure(options)
    finally:
        torch.set_num_threads(before)
    context = {**provenance(options.device, options.command_line), "note": options.note}
    rows = [{**row, **context} for row in rows]
    _report(rows, options)
    if options.out != "none" and rows:
        benchmarks = _checkout()
        default = Path() if benchmarks is None else benchmarks / "results"
        path = Path(options.out or default / f"paper_tables-{options.device.type}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"\n{len(rows)} rows appended to {path}", file=sys.stderr)
    for line in collector.left_out:
        print(f"left out: {line}", file=sys.stderr)
    for line in collector.failures:
        print(f"WRONG, and so not timed: {line}", file=sys.stderr)
    return 1 if collector.failures else 0


def _measure(options: argparse.Namespace) -> tuple[list[Row], _Collector]:
    wanted = variants_of(options.tables, options.models, options.methods)
    asked = {name for measure_name in options.measure for name in MEASURES[measure_name]}
    wanted = {variant: quantities & (asked | {"accuracy"}) for variant, quantities in wanted.items()}
    countable = {v: q for v, q in wanted.items() if q & COUNTED}
    timings = [
        (model, quantity, [v for v, q in wanted.items() if v.model == model and quantity in q])
        for model in options.models
        for quantity in ("time_ms", "step_ms")
    ]
    timings = [(model, quantity, variants) for model, quantity, variants in timings if variants]
    with_accuracy = [v for v, q in wanted.items() if "accuracy" in q]
    tasks: Sequence[str] = []
    absent: dict[str, str] = {}
    if options.accuracy == "data":
        tasks, absent = accuracy.present_tasks(options.family, Path(options.data), options.set)
        tasks = [task for task in tasks if options.tasks is None or task in options.tasks]
        absent = {task: why for task, why in absent.items() if options.tasks is None or task in options.tasks}
        if not tasks:
            raise ValueError(f"--data: expected at least one whole task of {options.family} in {options.data}; {absent}")
        for variant in with_accuracy:
            accuracy.paper_config(
                variant, options.family, tasks[0], Path(options.data), 0, Path(options.runs), options.set
            ).check()
    total = len(countable) + len(timings) + (len(with_accuracy) if tasks else 0)
    with tqdm(total=total, file=sys.stderr, leave=False, disable=None, bar_format="{l_bar}{bar:20}| {elapsed}") as bar:
        collector = _Collector(options, bar)
        collector.counted(countable)
        for model, quantity, variants in timings:
            collector.timed(model, variants, quantity, options.budget / len(timings))
        if tasks:
            collector.trained(with_accuracy, tasks)
            collector.left_out += [f"accuracy on {task}: {why}" for task, why in absent.items()]
        rows = [row for row in collector.rows.values() if row["measured"]]
        if options.accuracy in ("embedded", "untuned"):
            rows += _embedded(options, bar)
    return rows, collector


def _embedded(options: argparse.Namespace, bar: Any) -> list[Row]:
    """Accuracies on the embedded tasks, of every reduction: tuned with AdaptFormer's binary form or the methods that were asked
    for, or untuned."""
    found: list[Row]
    if options.accuracy == "untuned":
        task, by_reduction = accuracy.untuned(options.seeds, Path(options.runs), options.set, bar.set_description)
        found = [
            {"task": task, "method": "untuned", "reduction": name, "accuracies": values}
            for name, values in by_reduction.items()
        ]  # fmt: skip
    else:
        methods = options.methods if len(options.methods) < len(METHODS) else ["bi-adaptformer"]
        variants = [Variant("embedded", method, reduction) for method in methods for reduction in REDUCTIONS]
        tasks = options.tasks or ["orientation"]
        found = accuracy.on_embedded(variants, tasks, options.seeds, Path(options.runs), options.set, bar.set_description)
    return [
        {
            "benchmark": "paper_tables", "model": "embedded", "method": entry["method"], "reduction": entry["reduction"],
            "layer": None, "task": entry["task"], "device": options.device.type,
            "measured": {"accuracies": entry["accuracies"], "accuracy": statistics.fmean(entry["accuracies"])},
            "conditions": {"accuracy": {"seeds": options.seeds, "settings": options.set}}, "published": {},
        }
        for entry in found
    ]  # fmt: skip


def _report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    text = markdown(rows, options.tables, options.methods, options.models)
    print(text or "nothing was measured")
    if options.markdown is not None:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        found = render.merge_rows(rows)
        if not found:
            raise RuntimeError("--plot: expected rows with a time per image, got none")
        (device, dtype, attention), of_setting = next(iter(found.items()))
        render.picture(of_setting, f"{device}, {dtype}, {attention} attention", Path(options.plot))
