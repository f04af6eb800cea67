"""``fpet tables``: the tables of the paper, measured here, beside what was published.

Rows are the paper's; a row that can't be measured here is printed with a dash. Tables without anything to measure here (A5,
A7 to A9) are printed as they are where they are asked for.

Time is that of a forward of the tuned model, methods that are linear folded in; of a step of tuning (forward, loss, backward,
AdamW); both on seeded noise, with random weights, on which neither depends. All variants of a backbone take turns, and a ratio
is the median over rounds of the quotient of two times of one round: to the same method with every token kept ("× plain"), or
to the bare backbone. Nothing is timed before every token is accounted for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fpet_kernels.provenance import provenance

from .. import data
from ..adapters import METHODS
from ..comparators import REDUCTIONS
from ..measure.timing import CLOCKS, MIN_ROUNDS
from . import accuracy, published, render
from .collect import COUNTED, MEASURES, Collector
from .definitions import MEASURED_AS, TABLES, variants_of
from .measure import MODELS, Variant
from .render import QUANTITIES

__all__ = ["QUANTITIES", "TABLES", "add_arguments", "markdown", "run", "variants_of"]

Row = dict[str, Any]
DEFAULT_BUDGET = 120.0
MEASURABLE = [name for name, table in TABLES.items() if table.rows]


def markdown(
    rows: Sequence[Row], tables: Iterable[str], methods: Sequence[str] | None = None, models: Sequence[str] | None = None
) -> str:
    """As Markdown: every table at least half of whose rows ``rows`` have something of, and those that are only printed.

    Args:
        methods: of the tables over methods; None: the paper's. models: backbones; None: all.
    """
    tables = list(tables)
    parts = [
        f"### Table {name}: {TABLES[name].title}\n\n{render.paper_table(name)}" for name in tables if not TABLES[name].rows
    ]
    for (device, dtype, attention), found in render.merge_rows(rows).items():
        present = [name for name in MODELS if any(v.model == name for v in found) and (models is None or name in models)]
        for name in tables:
            parts += [
                f"### Table {name}: {TABLES[name].title}{where}\n\nHere: {device}, {dtype}, {attention} attention.\n{text}"
                for where, text in _tables(name, found, present, methods)
            ]
    if any(row["model"] == "embedded" for row in rows):
        title = "### Embedded tasks: ways to have fewer tokens, as in Table 3, on a tiny backbone\n\n"
        parts.append(title + render.embedded_table(rows))
    return "\n\n".join(parts)


def _tables(
    name: str, found: dict[Variant, Row], present: Sequence[str], methods: Sequence[str] | None
) -> Iterator[tuple[str, str]]:
    """One table for each backbone that there are rows of; one over backbones where the paper's is."""
    table = TABLES[name]
    over = len({row.variant.model for row in table.rows if row.variant is not None}) > 1
    for chosen in [list(present)] if over else [[model] for model in present]:
        lines = table.rows_for(chosen, methods)
        here = {row.variant: found[row.variant] for row in lines if row.variant in found}
        told = [v for v, row in here.items() if any(MEASURED_AS.get(q, q) in row["measured"] for q in table.quantities)]
        if told and table.over_methods and methods is None and _sparse(told, lines):
            there = [m for m in METHODS if any(v.method == m for v in told)]  # the others were not asked for
            lines = table.rows_for(chosen, there)
        if not told or _sparse(told, lines):
            continue
        plain = {v.plain: found[v.plain] for v in here if v.plain in found}  # what differences are taken to
        numbers = [
            (row.label, row.variant, {q: published.of_row(name, row, q) for q in row.numbers} or _elsewhere(row.variant))
            for row in lines
        ]
        how = "".join(f"{line}.\n" for line in render.conditions(here, [MEASURED_AS.get(q, q) for q in table.quantities]))
        text = f"{how}\n{render.table(numbers, table.quantities, plain | here)}"
        if name == "2" and chosen == ["vitb16"] and methods is None:
            text += f"\n\n{render.task_table(here, [(row.label, row.variant) for row in lines])}"
        yield "" if over else f", {MODELS[chosen[0]].title}", text


def _sparse(told: Sequence[Variant], lines: Sequence[Any]) -> bool:
    return 2 * len(told) < sum(row.variant is not None for row in lines)


def _elsewhere(variant: Variant | None) -> dict[str, published.Published]:
    """What any other table of the paper says of a row that this one has for another backbone."""
    return {} if variant is None or variant.hidden_dim is not None else published.lookup(*variant.key)


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
    tables = "".join(f"  {name:<3} {t.title}{'' if t.rows else ' (printed only)'}\n" for name, t in TABLES.items())
    parser.epilog = f"tables:\n{tables}\n{_EXAMPLES}"
    public = [name for name in MODELS if name != "tiny"]
    add = parser.add_argument
    add("--tables", type=_names(TABLES, {"all": list(TABLES)}), help="such as 1,3; default every one of ViT-B/16; all")
    add(
        "--models",
        type=_names(MODELS, {"all": public}),
        help=f"some of {', '.join(MODELS)}; all: every one but tiny; default those of the tables",
    )
    add("--methods", type=_names(METHODS, {"all": list(METHODS)}), help="of the tables over methods; default the paper's")
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
    add("--out", help="JSON lines are appended here; none: nowhere; default paper_tables-DEVICE.jsonl in the folder of --runs")
    add("--markdown", metavar="FILE", help="the tables, besides on the screen, in this file")
    add("--plot", metavar="FILE", help="a picture in the manner of Figures 3 and A1: cost and accuracy of every row")
    add("--note", help="what else a reader should know, kept in every row")
    add("--show", metavar="FILE", help="measure nothing: tables, and --plot, of the rows in FILE")


def _complete(options: argparse.Namespace) -> None:
    """Fills in what depends on other options. ValueError: options that don't go together; before any work."""
    options.set = {"device": options.device.type} | accuracy.parse_settings(options.set)
    if options.quick:
        options.models, options.methods = options.models or ["vits16"], options.methods or ["adaptformer", "lora"]
        options.tables = [name for name in options.tables or MEASURABLE if name in ("1", "3", "4")]
        options.budget = min(options.budget, 10.0)
    if options.show is None:
        options.models = options.models or (["vitb16"] if options.tables is None else None)
    options.tables = options.tables or MEASURABLE
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
        path = Path(options.out or Path(options.runs) / f"paper_tables-{options.device.type}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"\n{len(rows)} rows appended to {path}", file=sys.stderr)
    for line in collector.left_out:
        print(f"left out: {line}", file=sys.stderr)
    for line in collector.failures:
        print(f"WRONG, and so not timed: {line}", file=sys.stderr)
    return 1 if collector.failures else 0


def _measure(options: argparse.Namespace) -> tuple[list[Row], Collector]:
    wanted = variants_of(options.tables, options.models, options.methods)
    asked = {name for measure_name in options.measure for name in MEASURES[measure_name]}
    wanted = {variant: quantities & (asked | {"accuracy"}) for variant, quantities in wanted.items()}
    countable = {v: q for v, q in wanted.items() if q & COUNTED}
    timings = [
        (model, quantity, [v for v, q in wanted.items() if v.model == model and quantity in q])
        for model in dict.fromkeys(v.model for v in wanted)
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
        collector = Collector(options, bar)
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
        ]
    else:
        methods = options.methods or ["bi-adaptformer"]
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
