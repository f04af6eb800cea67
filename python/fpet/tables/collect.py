"""What one call of ``fpet tables`` measures: costs that are counted, times taken in turns, accuracies of runs."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpet_kernels import backends

from .. import data
from ..adapters.freezing import count_parameters
from ..measure.timing import quotient, take_turns
from . import accuracy, measure
from .measure import MODELS, Variant
from .published import lookup

__all__ = ["COUNTED", "MEASURES", "Collector", "trains"]

Row = dict[str, Any]
PAPER_BATCH = {"time": 256, "memory": 64}
MEASURES = {
    "time": ("time_ms",),
    "step": ("step_ms",),
    "gmac": ("gmac",),
    "memory": ("memory_gb", "reserved_gb"),
    "parameters": ("parameters_m", "stored_kib"),
}
COUNTED = {name for measure_name in ("gmac", "memory", "parameters") for name in MEASURES[measure_name]}


@dataclass
class Collector:
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
            published = {} if variant.hidden_dim is not None else lookup(*variant.key)
            merges = variant.reduction == "fpet"
            self.rows[variant] = {
                "benchmark": "paper_tables", "model": variant.model, "timm_name": MODELS[variant.model].timm_name,
                "method": variant.method, "reduction": variant.reduction, "layer": variant.layer,
                "hidden_dim": variant.hidden_dim, "device": o.device.type,
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
            if "memory_gb" in quantities and trains(variant):
                batch = PAPER_BATCH["memory"]
                found, how = measure.training_bytes(variant, batch, o.device, o.attention, o.amp)
                measured["memory_gb"], told["memory_gb"] = found / 1e9, {"batch": batch, "how": how}
            if "reserved_gb" in quantities and trains(variant):
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
        variants = [v for v in variants if (trains(v) if training else self.spends_the_same(v))]
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
                "data": o.family,
                "tasks": f"{len(tasks)} of {len(data.task_names(o.family))}",
                "seeds": len(o.seeds),
                "s": "chosen by task" if o.scales and accuracy.has_scale(variant.method) else "the method's own",
            }
            self.bar.update()


def trains(variant: Variant) -> bool:
    """Whether a step of tuning has something to tune before the head, which alone makes no table of training."""
    return variant.method not in ("none", "linear")


def _batch(model: str, device: torch.device, training: bool) -> int:
    """The paper's on a GPU; on a CPU as many images as make about 10¹¹ multiply-adds, a power of two up to 16."""
    if device.type == "cuda":
        return PAPER_BATCH["memory" if training else "time"]
    images = 100 / measure.gmac(Variant(model, "none", "none"))
    return int(2 ** min(4, max(0, int(images).bit_length() - 1)))
