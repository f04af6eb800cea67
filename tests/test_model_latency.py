"""The benchmark of whole models: right baselines, the same weights on all sides, a gate, and rows that say where they are from."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NEEDED = ("timm", "sklearn", "PIL", "tqdm", "safetensors")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing or not BENCHMARKS.is_dir():
    why = f"not installed: {', '.join(missing)} (extras 'fpet', 'bench')" if missing else "no benchmarks folder beside tests"
    pytest.skip(why, allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
import fpet  # noqa: E402
import model_latency as bench  # noqa: E402
from fpet_kernels import Split  # noqa: E402
from harness import timing  # noqa: E402
from model import implementations as models  # noqa: E402
from model import report, tome  # noqa: E402

CPU = torch.device("cpu")
INFERENCE, TRAINING = (models.Setting("tiny", 2, "float32", mode) for mode in models.MODES)
LAYER = models.MODELS["tiny"].layer


def base_of(setting):
    return models.seeded(models.MODELS["tiny"], setting, CPU)


@pytest.fixture
def images():
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


# --- ToMe-style merging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patches", "prefix"), [(6, 1), (9, 5), (100, 2), (7, 0)])
@pytest.mark.parametrize("sized", [False, True])
def test_tome_step_merges_every_even_patch_into_the_most_similar_odd_one(patches, prefix, sized):
    generator = torch.Generator().manual_seed(patches)
    x = torch.randn(2, prefix + patches, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 3, prefix + patches, 4, generator=generator, dtype=torch.float64)
    size = torch.rand(2, prefix + patches, 1, generator=generator, dtype=torch.float64) + 0.5 if sized else None
    if sized:
        size[:, :prefix] = 1
    split = Split(patches, torch.arange(0, patches, 2), torch.arange(1, patches, 2))
    found = tome.ToMeStep(split, size).merge(x, key, None)
    for image in range(2):
        weight = torch.ones(prefix + patches) if size is None else size[image, :, 0]
        groups = {j: [j] for j in [*range(prefix), *range(prefix + 1, prefix + patches, 2)]}
        places = list(groups)
        for rank, i in enumerate(range(prefix, prefix + patches, 2)):
            ki = key[image, :, i].mean(0)
            best = max(
                range(prefix + 1, prefix + patches, 2), key=lambda j: F.cosine_similarity(ki, key[image, :, j].mean(0), 0)
            )
            groups[best].append(i)
            assert places[found.match[image, rank]] == best
        for place, members in enumerate(groups.values()):
            total = sum(weight[m] for m in members)
            torch.testing.assert_close(found.size[image, place, 0].double(), total.double())
            torch.testing.assert_close(found.tokens[image, place], sum(weight[m] * x[image, m] for m in members) / total)


def test_tome_goes_through_the_same_patch_and_changes_the_matching_alone(images):
    base = base_of(INFERENCE)
    ours, theirs = (models.implementation(name, base, LAYER) for name in (models.FPET, models.TOME))
    mine, other = fpet.merged_features(ours, images), fpet.merged_features(theirs, images)
    assert mine.tokens.shape == other.tokens.shape == (2, 51, 64)
    assert torch.equal(other.size.sum(1), torch.full((2, 1), 101.0))
    assert not torch.equal(mine.size, other.size)
    assert getattr(theirs.blocks[LAYER], "refinement", None) is None
    with torch.no_grad(), fpet.merged(theirs, layer=None):
        torch.testing.assert_close(theirs(images), base(images))


# --- what is compared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [INFERENCE, TRAINING], ids=lambda s: s.mode)
def test_all_implementations_have_the_same_weights(setting):
    base = base_of(setting)
    trained = {}
    for name in models.IMPLEMENTATIONS:
        model = models.implementation(name, base, LAYER)
        mine = dict(model.named_parameters())
        assert all(mine[k] is p for k, p in base.named_parameters())
        assert model.training == setting.training
        trained[name] = {k for k, p in mine.items() if p.requires_grad}
    if not setting.training:
        assert trained == {name: set() for name in models.IMPLEMENTATIONS}
        return
    assert trained[models.TIMM] == trained[models.TOME]
    assert {k for k in trained[models.TIMM] if "head" not in k} == {k for k in mine if "adapter_mlp" in k}
    learned = trained[models.FPET] - trained[models.TIMM]
    assert learned and all(k.startswith(f"blocks.{LAYER}.refinement.") for k in learned)


def test_plain_attention_is_refused(monkeypatch):
    base = base_of(INFERENCE)
    base.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn"):
        models.implementation(models.TIMM, base, LAYER)


def test_a_training_step_trains(images):
    labels = torch.tensor([3, 5])
    for name in models.IMPLEMENTATIONS:
        model = models.implementation(name, base_of(TRAINING), LAYER)
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        train = models.step(model, model, images, labels, TRAINING)
        train()
        train()  # the second factor of a product that starts at zero
        changed = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
        assert changed == {k for k, p in model.named_parameters() if p.requires_grad}, name
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("setting", [INFERENCE, TRAINING], ids=lambda s: s.mode)
@pytest.mark.parametrize("name", [models.FPET, models.TOME])
def test_merging_alone_is_what_the_block_does(name, setting, images):
    model = models.implementation(name, base_of(setting), LAYER)
    kind = type(model.blocks[LAYER])
    step, x, key = models.captured(model, LAYER, images, setting)
    assert isinstance(step, tome.ToMeStep) == (name == models.TOME)
    assert x.shape == (2, 101, 64) and key.shape == (2, 2, 101, 32) and key.stride(2) == 3 * 64
    assert type(model.blocks[LAYER]) is kind and not model.blocks[LAYER]._forward_pre_hooks
    if not setting.training:  # where dropout makes every forward another one
        merged = step.merge(x, key, getattr(model.blocks[LAYER], "refinement", None))
        assert torch.equal(merged.size, fpet.merged_features(model, images).size)
    call, tokens = models.merging_call(model, LAYER, images, setting, compiled=False)
    assert tokens == (101, 51)
    out = call()
    if setting.training:
        assert out[0].shape == x.shape and len(out) == (3 if name == models.FPET else 1)
        assert all(grad is not None and grad.isfinite().all() for grad in out)


def test_flops_are_those_of_the_model(images):
    base = base_of(INFERENCE)
    counts = {n: models.flops(models.implementation(n, base, LAYER), images, None, INFERENCE) for n in models.IMPLEMENTATIONS}
    n, d, hidden, depth = 101, 64, 192, 6

    def block(tokens, mlp_tokens):
        return 2 * (tokens * d * 4 * d + 2 * tokens * tokens * d) + 2 * mlp_tokens * 2 * d * hidden

    outside = 2 * 100 * 3 * 256 * d + 2 * d * models.CLASSES
    assert counts[models.TIMM] == depth * block(n, n) + outside
    merged = 3 * block(n, n) + block(n, 51) + 2 * block(51, 51) + outside
    assert counts[models.FPET] == pytest.approx(merged, rel=0.02)  # and merging itself
    assert counts[models.FPET] > merged
    assert counts[models.TOME] == merged + 2 * 50 * 50 * 32
    trained = models.flops(models.implementation(models.TIMM, base_of(TRAINING), LAYER), images, torch.tensor([0, 1]), TRAINING)
    assert 1.5 < trained / counts[models.TIMM] < 2.5  # no gradients of the backbone's weights


def test_ratios_are_paired_by_round():
    slow_round = timing.Samples(1, [1.0, 10.0, 1.0]), timing.Samples(1, [2.0, 20.0, 2.5])
    assert bench.quotient(*slow_round) == 0.5
    assert bench.quotient(slow_round[0], None) is None


def test_processor_time_is_that_of_the_same_rounds():
    runner = bench.Bench(SimpleNamespace(device=CPU, batch=[1], minutes=None))
    runner._processor = {"a": [100.0, 100.0, 1.0, 3.0, 5.0, 7.0]}
    found = runner.processor("a", timing.Samples(2, [0.1, 0.2]))
    assert found.calls == 2 and found.seconds == [2.0, 6.0]
    assert runner.processor("b", timing.Samples(1, [0.1])) is None and runner.processor("a", None) is None


# --- the gate ------------------------------------------------------------------------------------------------------------


def judged(name, base, images, change):
    model = models.implementation(name, base, LAYER)
    change(model)
    return models.complaint(name, model, base, LAYER, images, INFERENCE)


def test_gate_passes_what_is_right_and_leaves_it_alone(images):
    for setting in (INFERENCE, TRAINING):
        base = base_of(setting)
        for name in models.IMPLEMENTATIONS:
            model = models.implementation(name, base, LAYER)
            refinement = getattr(model.blocks[LAYER], "refinement", None)
            assert models.complaint(name, model, base, LAYER, images, setting) is None
            assert model.training == base.training == setting.training
            assert getattr(model.blocks[LAYER], "refinement", None) is refinement
            assert name == models.TIMM or model.fpet_config.layers == (LAYER,)


def test_gate_finds_other_logits_lost_tokens_and_other_matches(images, monkeypatch):
    base = base_of(INFERENCE)

    def other_weights(model):
        model.head = torch.nn.Linear(64, models.CLASSES)

    assert "logits differ" in judged(models.FPET, base, images, other_weights)
    right = tome.MergeStep.merge

    def lose(self, x, key, refinement):
        merged = right(self, x, key, refinement)
        return merged._replace(size=merged.size * 0.5)

    def mismatch(self, x, key, refinement):
        merged = right(self, x, key, refinement)
        if self.backend == "reference":
            return merged
        match = torch.where(merged.match == 1, 2, 1)
        return merged._replace(match=match)

    with monkeypatch.context() as patch:
        patch.setattr(tome.MergeStep, "merge", lose)
        assert "sizes sum to" in judged(models.FPET, base, images, lambda model: None)
    with monkeypatch.context() as patch:
        patch.setattr(tome.MergeStep, "merge", mismatch)
        assert "merged elsewhere" in judged(models.FPET, base, images, lambda model: None)


# --- the command -----------------------------------------------------------------------------------------------------------


def run(tmp_path, *arguments):
    out = tmp_path / "rows.jsonl"
    status = bench.main(["--models", "tiny", "--batch", "2", "--budget", "0.01", "--out", str(out), *arguments])
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return run(folder, "--implementations", "all", "--note", "a test"), folder / "rows.jsonl"


def test_rows_hold_figures_and_where_they_are_from(measured):
    (status, rows), _ = measured
    assert status == 0
    assert [(r["mode"], r["implementation"]) for r in rows] == [(m, i) for m in models.MODES for i in models.IMPLEMENTATIONS]
    for row in rows:
        merges = row["implementation"] != models.TIMM
        assert row["benchmark"] == "model_latency" and row["execution"] == "eager" and row["sdpa"] is True
        assert row["ms_per_image"] > 0 and row["rounds"] >= timing.MIN_ROUNDS
        assert row["ms_per_image_min"] <= row["ms_per_image_p10"] <= row["ms_per_image"] <= row["ms_per_image_p90"]
        assert (row["tokens"], row["tokens_left"]) == (101, 51 if merges else None)
        assert row["time_ratio"] > 0 and row["processor_time_ratio"] > 0 and row["processor_ms_per_image"] > 0
        assert row["flop_ratio"] == (pytest.approx(0.8, abs=0.05) if merges else 1)
        assert (row["merging_share"] is None) == (not merges)
        if merges:
            assert 0 < row["merging_share"] < 1 and row["merging_ms_per_image"] < row["ms_per_image"]
        assert {"commit", "dirty", "command", "cpu", "threads", "torch", "timm", "date"} <= row.keys()
        assert row["note"] == "a test"
    assert all(r["processor_time_ratio"] == 1 for r in rows if r["implementation"] == models.TIMM)
    for mode in models.MODES:
        timm_row = next(r for r in rows if r["mode"] == mode)
        assert timm_row["time_ratio"] == timm_row["flop_ratio"] == 1


def test_tables_of_rows_measured_before(measured, capsys):
    (_, rows), path = measured
    assert bench.main(["--show", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("test_vit, 160 pixels · batch 2 · float32") == 2
    assert said.count("merging in block 3: 101 tokens → 51") == 2
    assert f"{rows[1]['time_ratio']:.3f}" in said and f"{100 * rows[1]['merging_share']:.2f} %" in said
    path.with_name("empty.jsonl").write_text(json.dumps({"benchmark": "kernel_vs_ref"}) + "\n")
    assert bench.main(["--show", str(path.with_name("empty.jsonl"))]) == 2


def test_default_implementations_and_other_options(tmp_path):
    status, rows = run(tmp_path, "--mode", "training", "--dtype", "bfloat16", "--layer", "1")
    assert status == 0
    assert [r["implementation"] for r in rows] == [models.TIMM, models.FPET]
    assert {r["layer"] for r in rows} == {1} and {r["dtype"] for r in rows} == {"bfloat16"}
    assert (
        bench.main(
            ["--models", "tiny", "--mode", "inference", "--implementations", "fpet", "--budget", "0.01", "--out", "none"]
        )
        == 0
    )


def test_loss_of_two_heads_is_their_mean():
    labels = torch.tensor([0, 1])
    first, second = torch.randn(2, 5), torch.randn(2, 5)
    expected = (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) / 2
    torch.testing.assert_close(models.loss_of((first, second), labels), expected)


def test_what_is_wrong_gets_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "complaint", lambda name, *_: "all is lost" if name == models.FPET else None)
    status, rows = run(tmp_path, "--mode", "inference")
    captured = capsys.readouterr()
    assert status == 1 and "WRONG: fpet on tiny, batch 2, float32, inference: all is lost" in captured.err
    assert [r["implementation"] for r in rows] == [models.TIMM, models.TOME]


def test_without_timm_there_are_times_and_no_ratios(tmp_path):
    _, rows = run(tmp_path, "--mode", "inference", "--implementations", "fpet")
    assert rows[0]["time_ratio"] is None and rows[0]["flop_ratio"] is None and rows[0]["ms_per_image"] > 0
    assert "–" in report.table(rows)


def test_what_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    right = models.step

    def step(model, run, images, labels, setting):
        if hasattr(model, "fpet_config"):
            return lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no room for it"))
        return right(model, run, images, labels, setting)

    monkeypatch.setattr(bench, "step", step)
    status, rows = run(tmp_path, "--mode", "inference")
    assert status == 0 and [r["implementation"] for r in rows] == [models.TIMM]
    assert "left out: tiny, batch 2, float32, inference: fpet, eager: no room for it" in capsys.readouterr().out


def test_large_batches_repeat_their_images():
    runner = bench.Bench(SimpleNamespace(device=CPU, batch=[20], minutes=None))
    images = runner.images(32, 20)
    assert images.shape == (20, 3, 32, 32) and torch.equal(images[0], images[16]) and not torch.equal(images[0], images[1])


WRONG_ARGUMENTS = {
    "--models": "vitb", "--mode": "backward", "--dtype": "int8", "--batch": "0", "--threads": "0", "--device": "moon",
    "--execution": "lazy", "--implementations": "pitome",
}  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), WRONG_ARGUMENTS.items())
def test_wrong_arguments_are_named(argument, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse([argument, value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert argument in message and value in message
