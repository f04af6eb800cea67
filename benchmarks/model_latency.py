"""How much faster whole models are with merging: ``python benchmarks/model_latency.py``.

Timed are, on the same images and with the same weights,

- timm:  the model as timm makes it;
- fpet:  the same after ``fpet.apply(model, layer, refinement=True)``: half of the patches merged in one block by bdm_merge;
- tome:  the same with ToMe's matching in that block instead, in plain PyTorch, through the same patch: alternating patches,
         keys as they are, the best destination of every source by one matrix product, tokens summed by scatter_add.

inference is a forward under no_grad. training is a step of tuning with AdaptFormer (8 hidden units) in all three: forward,
loss, backward, AdamW. Attention is PyTorch's scaled_dot_product_attention on every side, which is checked. Reduced precision:
weights in it for inference, autocast for training.

Everything takes turns in one run (timing.py), eager and compiled alike. A ratio is the median over rounds of the quotient of
two times of one round, always to timm in the same execution: eager to eager, compiled to compiled. On a CPU the processor time
of the process is noted beside: on a shared machine its ratio says more. FLOPs are what torch's
counter counts (a multiply-add is two). Extra memory is the most held at a time beyond weights and images. Merging is timed by
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
import copy
import gc
import itertools
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import timm
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    import fpet
    import fpet_kernels
except ImportError as missing:
    raise SystemExit(f"fpet is not installed here ({missing}): pip install -e '.[fpet,bench]'") from missing

import cases
import timing
from fpet.measure.flops import flop_counter
from fpet.vit.block import FPETBlock
from fpet.vit.merging import MergeStep
from fpet_kernels import Merged, backends

Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """timm's name, pixels along each side, and the block that merges: the middle one, as in the paper."""

    timm_name: str
    image_size: int
    layer: int


MODELS = {
    "vits16": Model("vit_small_patch16_224", 224, 6),
    "vitb16": Model("vit_base_patch16_224", 224, 6),
    "vitl16": Model("vit_large_patch16_224", 224, 12),
    "deitb_distilled": Model("deit_base_distilled_patch16_224", 224, 6),
    "dinov2_vitb14_reg": Model("vit_base_patch14_reg4_dinov2", 518, 6),
    "tiny": Model("test_vit", 160, 3),  # for the tests of this benchmark
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
MODES = ("inference", "training")
EXECUTIONS = ("eager", "compiled")
TIMM, FPET, TOME = IMPLEMENTATIONS = ("timm", "fpet", "tome")
DEFAULT_IMPLEMENTATIONS = {"inference": IMPLEMENTATIONS, "training": (TIMM, FPET)}  # ToMe's step costs what FPET's does
CLASSES, HIDDEN = 100, 8
DEFAULT_BUDGET = 60.0
GATE_IMAGES = 2
RESULTS = Path(__file__).parent / "results"


# --- ToMe-style merging ----------------------------------------------------------------------------------------------


class ToMeStep(MergeStep):
    """Merges every even patch into the odd one with the most similar key (mean over heads, cosine)."""

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
        prefix = x.shape[1] - self.split.num_tokens
        metric = F.normalize(key.mean(dim=1), dim=-1)
        match = (metric[:, prefix::2] @ metric[:, prefix + 1 :: 2].mT).argmax(dim=-1, keepdim=True)  # (B, N_A, 1)
        size = x.new_ones(x.shape[0], x.shape[1], 1, dtype=torch.float32) if self.size is None else self.size
        weighted = x if self.size is None else x * size.to(x.dtype)
        to = match.expand(-1, -1, x.shape[2])
        total = weighted[:, prefix + 1 :: 2].scatter_add(1, to, weighted[:, prefix::2])
        counts = size[:, prefix + 1 :: 2].scatter_add(1, match, size[:, prefix::2])
        tokens = torch.cat((x[:, :prefix], total / counts.to(x.dtype)), dim=1)
        return Merged(tokens, torch.cat((size[:, :prefix], counts), dim=1), match.squeeze(-1) + prefix)


class ToMeBlock(FPETBlock):
    """A patched block that merges by :class:`ToMeStep`."""

    def _run(self, x: Tensor, merge: MergeStep | None, **attention: Any) -> Any:
        return super()._run(x, None if merge is None else ToMeStep(*merge), **attention)


# --- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One group of rows."""

    model: str
    batch: int
    dtype: str
    mode: str

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}, {self.mode}"


def seeded(spec: Model, setting: Setting, device: torch.device) -> nn.Module:
    """The model that all implementations start from; for training with AdaptFormer in it, and the rest frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(spec.timm_name, pretrained=False, img_size=spec.image_size, num_classes=CLASSES)
        if setting.training:
            fpet.add_adapters(model, "adaptformer", hidden_dim=HIDDEN)
            fpet.freeze(model)
        else:
            model.requires_grad_(False)
    dtype = torch.float32 if setting.training else DTYPES[setting.dtype]
    return model.to(device, dtype).train(setting.training)


def implementation(name: str, base: nn.Module, layer: int) -> nn.Module:
    """``base`` with what ``name`` changes; all share the weights.

    Raises:
        RuntimeError: some attention does not go through scaled_dot_product_attention.
    """
    model: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if name != TIMM:
        fpet.apply(model, layer=layer, refinement=name == FPET)
        if not model.training:
            model.requires_grad_(False)
    if name == TOME:
        block = model.blocks[layer]
        if type(block) is not FPETBlock:
            raise TypeError(f"tome: expected a {FPETBlock.__name__}, got {type(block).__name__}")
        block.__class__ = ToMeBlock
    unfused = [path for path, module in model.named_modules() if getattr(module, "fused_attn", True) is False]
    if unfused:
        raise RuntimeError(f"expected scaled_dot_product_attention everywhere, not in {unfused[0]}: unset TIMM_FUSED_ATTN")
    return model


def step(model: nn.Module, run: Callable[..., Any], images: Tensor, labels: Tensor, setting: Setting) -> Callable[[], object]:
    """What is timed of ``model``, called as ``run``: a forward, or a step of training."""
    if not setting.training:

        def forward() -> object:
            with torch.no_grad():
                return run(images)

        return forward
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)

    def train() -> None:
        with autocast(images.device, setting):
            out = run(images)
        loss_of(out, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def loss_of(out: Any, labels: Tensor) -> Tensor:
    """Cross entropy; the mean over both heads of a distilled model."""
    heads = out if isinstance(out, tuple) else (out,)
    return torch.stack([F.cross_entropy(logits.float(), labels) for logits in heads]).mean()


def autocast(device: torch.device, setting: Setting) -> Any:
    reduced = setting.training and setting.dtype != "float32"
    return torch.autocast(device.type, DTYPES[setting.dtype]) if reduced else nullcontext()


# --- merging by itself -------------------------------------------------------------------------------------------------


def captured(model: Any, layer: int, images: Tensor, setting: Setting) -> tuple[Any, Tensor, Tensor]:
    """What merging gets in one forward: the step, x (B, N, D) and the key (B, heads, N, C), in place in the qkv buffer."""
    seen: dict[str, Any] = {}

    @dataclass
    class Spy:
        step: Any

        def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Merged:
            seen.update(step=self.step, x=x.detach(), key=key.detach())
            return self.step.merge(x, key, refinement)

    block = model.blocks[layer]
    tome = isinstance(block, ToMeBlock)

    def hook(_block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "merge": Spy(ToMeStep(*kwargs["merge"]) if tome else kwargs["merge"])}

    block.__class__ = FPETBlock  # the spy hands ToMe's step over itself
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), autocast(images.device, setting):
            model(images)
    finally:
        handle.remove()
        block.__class__ = ToMeBlock if tome else FPETBlock
    return seen["step"], seen["x"], seen["key"]


def merging_call(
    model: Any, layer: int, images: Tensor, setting: Setting, compiled: bool
) -> tuple[Callable[[], object], tuple[int, int]]:
    """The merging of one block as it is called there, in training with its backward; and the tokens before and after."""
    merge_step, x, key = captured(model, layer, images, setting)
    refinement = getattr(model.blocks[layer], "refinement", None)

    def merge(x: Tensor, key: Tensor) -> Merged:
        return merge_step.merge(x, key, refinement)

    run = compile_whole(merge) if compiled else merge
    with torch.no_grad():
        tokens, size, _ = merge(x, key)
    left = tokens.shape[1]
    if not setting.training:

        def forward() -> object:
            with torch.no_grad():
                return run(x, key)

        return forward, (x.shape[1], left)
    x.requires_grad_()
    weights = [] if refinement is None else [p for p in refinement.parameters() if p.requires_grad]
    upstream = torch.randn_like(tokens), torch.randn_like(size)

    def both() -> object:
        with autocast(images.device, setting):
            tokens, size, _ = run(x, key)
        pairs = [(out, grad) for out, grad in zip((tokens, size), upstream, strict=True) if out.requires_grad]
        return torch.autograd.grad([out for out, _ in pairs], [x, *weights], [grad for _, grad in pairs])

    return both, (x.shape[1], left)


def compile_whole(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)


# --- gate --------------------------------------------------------------------------------------------------------------


def complaint(name: str, model: Any, base: nn.Module, layer: int, images: Tensor, setting: Setting) -> str | None:
    """Why ``model`` must not be timed; None if it is right. Leaves it as it was."""
    if name == TIMM:
        return None
    images = images[:GATE_IMAGES]
    try:
        with torch.no_grad(), autocast(images.device, setting):
            model.eval()
            base.eval()
            expected, found = base(images), fpet.merged_features(model, images)
            n = found.source.shape[1]
            if not torch.equal(found.size.sum(1).round(), torch.full_like(found.size[:, 0], n)):
                return f"sizes sum to {found.size.sum(1).flatten().tolist()}, not to {n} tokens"
            with fpet.merged(model, layer=None):
                plain = model(images)
            if name == FPET:
                with fpet.merged(model, layer=layer, backend="reference"):
                    source = fpet.merged_features(model, images).source
                differing = (source != found.source).float().mean().item()
                if differing > 0.02:  # near ties may fall either way
                    return f"{100 * differing:.1f} % of the tokens are merged elsewhere than the reference merges them"
    finally:
        model.train(setting.training)
        base.train(setting.training)
    error = (plain.float() - expected.float()).abs().max() / expected.float().abs().max()
    allowed = 8 * torch.finfo(DTYPES[setting.dtype]).eps ** (0.5 if setting.dtype == "float32" else 1.0)
    return None if error <= allowed else f"with merging off its logits differ from timm's by {error:.2g} of the largest"


def flops(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting) -> int:
    """Of one image: the forward, in training also the backward."""
    with flop_counter() as counter, autocast(images.device, setting), torch.set_grad_enabled(setting.training):
        out = model(images[:1])
        if setting.training:
            loss_of(out, labels[:1]).backward()
    model.zero_grad()
    return int(counter.get_total_flops())


# --- running -----------------------------------------------------------------------------------------------------------


class Bench:
    """Runs settings and collects rows; what went wrong is in ``failures``, what was not run in ``left_out``."""

    def __init__(self, options: argparse.Namespace, bar: Any) -> None:
        self.options, self.bar, self.device = options, bar, options.device
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self._images: tuple[int, Tensor] | None = None
        self._processor: dict[str, list[float]] = {}

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
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
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
        for name in self.options.implementations or DEFAULT_IMPLEMENTATIONS[setting.mode]:
            self.bar.set_description(f"{setting}: gate of {name}")
            model = implementation(name, base, layer)
            why = complaint(name, model, base, layer, images, setting)
            if why is not None:
                self.failures.append(f"WRONG: {name} on {setting}: {why}")
                self.bar.write(self.failures[-1] + ". No time is reported for it.")
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
                    "gflops_per_image": count / 1e9, "trained_parameters": trained, "tokens": tokens,
                    "peak_extra_mb": None if peak is None else peak / 1e6,
                }  # fmt: skip
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
                "benchmark": "model_latency", "implementation": name, "execution": execution, "model": setting.model,
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


# --- tables --------------------------------------------------------------------------------------------------------------


HEADINGS = ("ms/image", "× timm", "CPU ms", "× timm", "GFLOP", "× timm", "extra MB", "× timm", "merging")
LABELS = {TIMM: "timm, unpatched", FPET: "fpet, bdm_merge", TOME: "ToMe's matching"}


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same setting together, the latest of each implementation and execution."""
    groups: dict[tuple, dict[tuple, Row]] = {}
    for row in rows:
        setting = tuple(row[k] for k in ("device", "model", "layer", "batch", "dtype", "mode", "threads"))
        groups.setdefault(setting, {})[row["implementation"], row["execution"]] = row
    return [list(group.values()) for group in groups.values()]


def table(group: list[Row]) -> str:
    """One setting as text."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else f"{value:{form}}"

    first = group[0]
    left = next((r["tokens_left"] for r in group if r["tokens_left"]), None)
    what = "forward" if first["mode"] == "inference" else f"step with AdaptFormer, {HIDDEN} hidden units"
    lines = [
        f"{first['timm_name']}, {first['image_size']} pixels · batch {first['batch']} · {first['dtype']} · {first['mode']} "
        f"({what}) · {first['device']}",
        f"  merging in block {first['layer']}: {first['tokens']} tokens → {left}; SDPA on all sides; medians of "
        f"{first['rounds']} rounds",
    ]
    names = [f"{LABELS[r['implementation']]}, {r['execution']}" for r in group]
    width = max(map(len, names))
    lines.append("  " + " " * width + "".join(f"{h:>10}" for h in HEADINGS))
    for name, r in zip(names, group, strict=True):
        share = r["merging_share"]
        cells = (
            number(r["ms_per_image"], ".3g" if r["ms_per_image"] < 100 else ".0f"), number(r["time_ratio"], ".3f"),
            number(r.get("processor_ms_per_image"), ".3g"), number(r.get("processor_time_ratio"), ".3f"),
            number(r["gflops_per_image"], ".1f"), number(r["flop_ratio"], ".3f"), number(r["peak_extra_mb"], ".0f"),
            number(r["memory_ratio"], ".2f"), "–" if share is None else f"{100 * share:.2f} %",
        )  # fmt: skip
        lines.append(f"  {name:<{width}}" + "".join(f"{c:>10}" for c in cells))
    return "\n".join(lines)


# --- command line --------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add("--models", default="vitb16", help=f"comma-separated from {', '.join(MODELS)}; all; default vitb16")
    add("--batch", default="16", help="comma-separated; default 16")
    add("--dtype", help=f"comma-separated from {', '.join(DTYPES)}; default float32 on the CPU, bfloat16 elsewhere")
    add("--mode", default=",".join(MODES), help="inference, training, or both (default)")
    add("--execution", default="eager", help="eager (default), compiled, or both: eager,compiled")
    add("--implementations", help="comma-separated from timm, fpet, tome; all; default: all, in training timm and fpet")
    add("--layer", type=int, help="0-based block that merges; default: the middle one")
    add("--threads", type=int, help="CPU threads; default torch's")
    add("--budget", type=float, default=DEFAULT_BUDGET,
        help=f"seconds of timing in all, default {DEFAULT_BUDGET:g}, but at least {timing.MIN_ROUNDS} rounds each")  # fmt: skip
    add("--out", help="JSON lines are appended here; none: nowhere; default benchmarks/results/model_latency-DEVICE.jsonl")
    add("--note", help="what else a reader should know, kept in every row: say that the machine was shared")
    add("--show", metavar="FILE", help="measure nothing: tables of the rows in FILE")
    options = parser.parse_args(argv)

    def chosen(text: str, known: Iterable[str], what: str) -> list[str]:
        names = [n for n in text.replace(" ", "").split(",") if n]
        if not names or any(n not in known for n in names):
            parser.error(f"--{what}: expected names out of {', '.join(known)}, got {text!r}")
        return names

    public = [n for n in MODELS if n != "tiny"]
    options.models = public if options.models == "all" else chosen(options.models, MODELS, "models")
    options.mode = chosen(options.mode, MODES, "mode")
    options.execution = chosen(options.execution, EXECUTIONS, "execution")
    if options.implementations is not None:
        text = ",".join(IMPLEMENTATIONS) if options.implementations == "all" else options.implementations
        options.implementations = chosen(text, IMPLEMENTATIONS, "implementations")
    try:
        options.device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {options.device.type!r}: this benchmark can't time others")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False here")
    options.dtype = chosen(options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16"), DTYPES, "dtype")
    try:
        batch = [int(b) for b in options.batch.split(",")]
    except ValueError:
        batch = []
    if not batch or min(batch) < 1:
        parser.error(f"--batch: expected positive integers separated by commas, got {options.batch!r}")
    options.batch = batch
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected a positive integer, got {options.threads}")
    return options


def write(rows: list[Row], out: str | None, device: torch.device) -> Path | None:
    """Appends ``rows`` as JSON lines; returns where."""
    if out == "none" or not rows:
        return None
    path = Path(out) if out else RESULTS / f"model_latency-{device.type}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.show:
        rows = [json.loads(line) for line in Path(options.show).read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [r for r in rows if r["benchmark"] == "model_latency"]
        if not rows:
            print(f"{options.show} holds no rows of this benchmark", file=sys.stderr)
            return 2
        print("\n\n".join(map(table, grouped(rows))))
        return 0

    started = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if backends.select(torch.empty(1, 1, 1, device=options.device), None) == "reference":
        print(f"!! No fused backend runs on {options.device}; fpet merges in plain PyTorch:", file=sys.stderr)
        print(fpet_kernels.explain(), file=sys.stderr)
    command = shlex.join(["python", "benchmarks/model_latency.py", *(sys.argv[1:] if argv is None else argv)])
    context = {**timing.provenance(options.device, command), "note": options.note}
    if context["dirty"]:
        print("note: the working tree has changes that are not committed; the rows say so", file=sys.stderr)
    # torch.compile's remarks on wording and tuning are not about this measurement.
    warnings.filterwarnings("ignore", module=r"torch\.(_inductor|_dynamo|_functorch|utils|sparse)")

    work = itertools.product(options.models, options.batch, options.dtype, options.mode)
    settings = [Setting(m, b, d, mode) for m, b, d, mode in work]
    options.settings = len(settings)
    rows: list[Row] = []
    steps = [1 + len(options.implementations or DEFAULT_IMPLEMENTATIONS[s.mode]) for s in settings]
    tqdm = cases.require("tqdm").tqdm
    with tqdm(total=sum(steps), file=sys.stderr, leave=False, bar_format="{l_bar}{bar:20}| {elapsed}") as bar:
        bench = Bench(options, bar)
        for done, setting in enumerate(settings, 1):
            found = [{**row, **context} for row in bench.run(setting)]
            for group in grouped(found):
                bar.write(table(group) + "\n")
            rows += found
            bar.update(sum(steps[:done]) - bar.n)
    written = write(rows, options.out, options.device)

    machine = context["gpu"] or f"{context['cpu']}, {context['threads']} threads, load {context['load_average']} at the start"
    print(f"{machine} · torch {context['torch']} · timm {context['timm']} · {time.perf_counter() - started:.0f} s")
    for line in bench.left_out:
        print(f"left out: {line}")
    if written:
        print(f"{len(rows)} rows appended to {written}")
    for failure in bench.failures:
        print(failure, file=sys.stderr)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
