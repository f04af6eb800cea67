"""How much faster whole models are with merging: ``python benchmarks/model_latency.py``.

Timed are, on the same images and with the same weights,

- timm:  the model as timm makes it;
- fpet:  the same after ``fpet.apply(model, layer, refinement=True)``: half of the patches merged in one block by bdm_merge;
- tome:  the same with ToMe's matching in that block instead, in plain PyTorch, through the same patch: alternating patches,
         keys as they are, the best destination of every source by one matrix product, tokens summed by scatter_add.

inference is a forward under no_grad. training is a step of tuning with AdaptFormer (8 hidden units) in all three: forward,
loss, backward, AdamW. Attention is PyTorch's scaled_dot_product_attention on every side, which is checked. Reduced precision:
weights in it for inference, autocast for training.

Everything takes turns in one run (harness/timing.py), eager and compiled alike. A ratio is the median over rounds of the
quotient of two times of one round, always to timm in the same execution: eager to eager, compiled to compiled. On a CPU the
processor time of the process is noted beside: on a shared machine its ratio says more. FLOPs are what torch's counter
counts (a multiply-add is two). Extra memory is the most held at a time beyond weights and images. Merging is timed by
itself on the tokens and keys of that block, refinement and in training its backward included; its share is that time over
the model's.

Nothing is timed before it is right: with merging off the patched model gives timm's logits, with merging on every token is
accounted for, and the fused kernel merges as the float32 reference does.

    python benchmarks/model_latency.py                                                      # two to three minutes on two cores
    python benchmarks/model_latency.py --models all --execution eager,compiled --implementations all --budget 1200
    python benchmarks/model_latency.py --device cuda --batch 256 --execution compiled       # bfloat16
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

try:
    import timm  # noqa: F401
    import torch
    from torch import Tensor

    import fpet  # noqa: F401
    import fpet_kernels
except ImportError as missing:
    raise SystemExit(f"fpet is not installed here ({missing}): pip install -e '.[fpet,bench]'") from missing

from fpet_kernels import backends
from harness import cases, run, timing
from harness.options import DTYPES, Parser
from harness.rows import Row
from harness.run import compile_whole
from model.implementations import (
    CLASSES,
    FPET,
    IMPLEMENTATIONS,
    MODELS,
    MODES,
    TIMM,
    Setting,
    complaint,
    flops,
    implementation,
    merging_call,
    seeded,
    step,
)
from model.report import grouped, table

EXECUTIONS = ("eager", "compiled")
DEFAULT_IMPLEMENTATIONS = {"inference": IMPLEMENTATIONS, "training": (TIMM, FPET)}  # ToMe's step costs what FPET's does
DEFAULT_BUDGET = 60.0


class Bench(run.Bench):
    """Times whole models."""

    benchmark = "model_latency"
    bar_format = "{l_bar}{bar:20}| {elapsed}"  # its steps are too uneven to tell how long is left

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._images: tuple[int, Tensor] | None = None
        self._processor: dict[str, list[float]] = {}

    def implementations(self, setting: Setting) -> Sequence[str]:
        return self.options.implementations or DEFAULT_IMPLEMENTATIONS[setting.mode]

    def steps(self, setting: Setting) -> int:
        return 1 + len(self.implementations(setting))

    def images(self, size: int, batch: int) -> Tensor:
        """(batch, 3, size, size) float32: crops of a photograph; large batches repeat them."""
        if self._images is None or self._images[0] != size:
            count = min(cases.REPEATS_TO, max(self.options.batch))
            self._images = (size, cases.crops(cases.photograph(), count, size))
        crops = self._images[1]
        return crops.repeat(-(-batch // crops.shape[0]), 1, 1, 1)[:batch]

    def clocked(self, name: str, call: Callable[[], object]) -> Callable[[], object]:
        """``call``, which on a CPU also notes the processor time that it takes."""
        if self.device.type != "cpu":
            return call
        taken = self._processor.setdefault(name, [])

        def clocked() -> None:
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)

        return clocked

    def processor(self, name: str, sample: timing.Samples | None) -> timing.Samples | None:
        """The same rounds as ``sample``'s, in processor time; None where there is none."""
        if sample is None or name not in self._processor:
            return None
        calls, rounds = sample.calls, len(sample.seconds)
        taken = self._processor[name][-calls * rounds :]  # calls before the first round are not among them
        return timing.Samples(calls, [sum(taken[i * calls : (i + 1) * calls]) / calls for i in range(rounds)])

    def run(self, setting: Setting) -> list[Row]:
        """All implementations of one setting: gate, FLOPs, warm-up, memory, time."""
        self.clean()
        spec = MODELS[setting.model]
        layer = spec.layer if self.options.layer is None else self.options.layer
        self.bar.set_description(f"{setting}: model")
        images = self.images(spec.image_size, setting.batch)
        images = images.to(self.device, torch.float32 if setting.training else DTYPES[setting.dtype])
        labels = torch.arange(setting.batch, device=self.device) % CLASSES
        base = seeded(spec, setting, self.device)
        facts: dict[tuple[str, str], Row] = {}
        calls: dict[str, Callable[[], object]] = {}
        self._processor = {}
        for name in self.implementations(setting):
            self.bar.set_description(f"{setting}: gate of {name}")
            model = implementation(name, base, layer)
            why = complaint(name, model, base, layer, images, setting)
            if why is not None:
                self.failures.append(f"WRONG: {name} on {setting}: {why}")
                self.say(self.failures[-1] + ". No time is reported for it.")
                continue
            count = flops(model, images, labels, setting)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            for execution in self.options.execution:
                self.bar.set_description(f"{setting}: warm-up of {name}, {execution}")
                compiled = execution == "compiled"
                run = compile_whole(model) if compiled else model
                call = step(model, run, images, labels, setting)
                try:
                    if compiled:
                        call()  # the compiler's own memory is not the model's
                    peak = timing.peak_extra_bytes(call, self.device)
                except (torch.OutOfMemoryError, MemoryError, torch._dynamo.exc.TorchDynamoException) as error:
                    self.left_out.append(f"{setting}: {name}, {execution}: {str(error).strip().splitlines()[0]}")
                    continue
                tokens = None
                if name != TIMM:
                    merging, tokens = merging_call(model, layer, images, setting, compiled)
                    merging()
                    calls[f"merging, {name}, {execution}"] = merging
                calls[f"{name}, {execution}"] = self.clocked(f"{name}, {execution}", call)
                facts[name, execution] = {
                    "gflops_per_image": count / 1e9,
                    "trained_parameters": trained,
                    "tokens": tokens,
                    "peak_extra_mb": None if peak is None else peak / 1e6,
                }
            self.bar.update(1)
        if not facts:
            return []
        self.bar.set_description(f"{setting}: timing")
        samples, _ = timing.measure(calls, self.device, self.options.budget / self.options.settings)
        self.bar.update(1)
        return self.rows(setting, layer, facts, samples)

    def rows(
        self, setting: Setting, layer: int, facts: dict[tuple[str, str], Row], samples: dict[str, timing.Samples]
    ) -> list[Row]:
        spec, out = MODELS[setting.model], []
        tokens = next((fact["tokens"] for fact in facts.values() if fact["tokens"]), None)
        for (name, execution), fact in facts.items():
            sample = samples[f"{name}, {execution}"]
            merging = samples.get(f"merging, {name}, {execution}")
            processor = self.processor(f"{name}, {execution}", sample)
            timm_facts, timm_sample = facts.get((TIMM, execution)), samples.get(f"{TIMM}, {execution}")

            def times_timm(what: str, fact: Row = fact, timm_facts: Row | None = timm_facts) -> float | None:
                known = timm_facts is not None and fact[what] is not None and timm_facts[what]
                return fact[what] / timm_facts[what] if known and timm_facts is not None else None

            per_image = 1e3 / setting.batch
            out.append({
                "benchmark": self.benchmark, "implementation": name, "execution": execution, "model": setting.model,
                "timm_name": spec.timm_name, "image_size": spec.image_size, "layer": layer, "batch": setting.batch,
                "dtype": setting.dtype, "mode": setting.mode, "device": self.device.type, "sdpa": True,
                "backend": backends.select(torch.empty(1, 1, 1, device=self.device), None) if name == FPET else None,
                "tokens": tokens[0] if tokens else None, "tokens_left": fact["tokens"][1] if fact["tokens"] else None,
                "ms_per_image": sample.median * per_image, "ms_per_image_min": min(sample.seconds) * per_image,
                "ms_per_image_p10": sample.quantile(0.1) * per_image, "ms_per_image_p90": sample.quantile(0.9) * per_image,
                "rounds": len(sample.seconds), "calls_per_round": sample.calls,
                "time_ratio": quotient(sample, timm_sample),
                "processor_ms_per_image": processor.median * per_image if processor else None,
                "processor_time_ratio": quotient(processor, self.processor(f"{TIMM}, {execution}", timm_sample)),
                "time_ratio_of_minima": min(sample.seconds) / min(timm_sample.seconds) if timm_sample else None,
                "gflops_per_image": fact["gflops_per_image"], "flop_ratio": times_timm("gflops_per_image"),
                "peak_extra_mb": fact["peak_extra_mb"], "memory_ratio": times_timm("peak_extra_mb"),
                "merging_ms_per_image": merging.median * per_image if merging else None,
                "merging_share": quotient(merging, sample) if merging else None,
                "trained_parameters": fact["trained_parameters"],
            })  # fmt: skip
        return out


def quotient(one: timing.Samples | None, other: timing.Samples | None) -> float | None:
    """Median over rounds of the quotient of the two times in that round: what slows a whole round down cancels out."""
    if one is None or other is None:
        return None
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


# --- command line ------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(Bench.benchmark, __doc__, [name for name in DTYPES if name != "float64"])
    add = parser.add_argument
    add("--models", default="vitb16", help=f"comma-separated from {', '.join(MODELS)}; all; default vitb16")
    add("--batch", default="16", help="comma-separated; default 16")
    add("--mode", default=",".join(MODES), help="inference, training, or both (default)")
    add("--execution", default="eager", help="eager (default), compiled, or both: eager,compiled")
    add("--implementations", help="comma-separated from timm, fpet, tome; all; default: all, in training timm and fpet")
    add("--layer", type=int, help="0-based block that merges; default: the middle one")
    add("--budget", type=float, default=DEFAULT_BUDGET,
        help=f"seconds of timing in all, default {DEFAULT_BUDGET:g}, but at least {timing.MIN_ROUNDS} rounds each")  # fmt: skip
    add("--note", help="what else a reader should know, kept in every row: say that the machine was shared")
    options = parser.checked(argv)
    options.models = parser.chosen(options.models, MODELS, "models", public=[n for n in MODELS if n != "tiny"])
    options.mode = parser.chosen(options.mode, MODES, "mode")
    options.execution = parser.chosen(options.execution, EXECUTIONS, "execution")
    if options.implementations is not None:
        options.implementations = parser.chosen(
            options.implementations, IMPLEMENTATIONS, "implementations", public=IMPLEMENTATIONS
        )
    options.batch = parser.counts(options.batch, "batch")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.show:
        return 0 if run.show(options.show, Bench.benchmark, grouped, table) else 2

    started = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if backends.select(torch.empty(1, 1, 1, device=options.device), None) == "reference":
        print(f"!! No fused backend runs on {options.device}; fpet merges in plain PyTorch:", file=sys.stderr)
        print(fpet_kernels.explain(), file=sys.stderr)
    context = run.context(options, Bench.benchmark, argv, note=options.note)
    work = itertools.product(options.models, options.batch, options.dtype, options.mode)
    settings = [Setting(m, b, d, mode) for m, b, d, mode in work]
    options.settings = len(settings)
    bench = Bench(options)
    rows = bench.measure(settings, context, grouped, table)
    bench.finish(rows, context, time.perf_counter() - started)
    return bench.status()


if __name__ == "__main__":
    sys.exit(main())
