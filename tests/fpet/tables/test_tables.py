"""``fpet tables``: measured and published numbers apart, costs that can be worked out by hand, rows, and refusals before any work."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

NEEDED = ("timm", "tqdm", "safetensors")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"not installed: {', '.join(missing)} (extra 'fpet')", allow_module_level=True)

import fpet  # noqa: E402
from fpet import cli  # noqa: E402
from fpet.adapters import METHODS  # noqa: E402
from fpet.adapters.folding import folds  # noqa: E402
from fpet.layers.modules import PETModule  # noqa: E402
from fpet.measure import timing  # noqa: E402
from fpet.measure.memory import reserved_memory, step_memory  # noqa: E402
from fpet.tables import collect, measure, published, render  # noqa: E402
from fpet.tables import command as tables  # noqa: E402
from fpet.tables.measure import Variant  # noqa: E402
from fpet.tables.published import Published  # noqa: E402
from fpet.train.config import REDUCTIONS  # noqa: E402
from fpet_kernels.provenance import provenance  # noqa: E402
from tables_support import columns, ran  # noqa: E402

CPU = torch.device("cpu")
PLAIN, MERGED = Variant("tiny", "adaptformer", "none"), Variant("tiny", "adaptformer", "fpet", 3)
# Numbers that no measurement comes to, as published ones of the tiny model.
SENTINELS = {"accuracy": 987654.0, "time_ms": 876543.0, "gmac": 765432.0, "memory_gb": 654321.0}


@pytest.fixture(autouse=True)
def published_sentinels(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {name: Published(value, "nowhere") for name, value in SENTINELS.items()}
    for variant in (PLAIN, MERGED):
        key = (variant.model, variant.method, variant.reduction, variant.layer)
        factor = 1 if variant is PLAIN else 0.5
        monkeypatch.setitem(published.PUBLISHED, key, {n: p._replace(value=p.value * factor) for n, p in numbers.items()})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]], Path]:
    """One run of Tables 1 and 4 on the tiny model; without published numbers, which its rows keep too."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    arguments = ("--tables", "1,4", "--models", "tiny", "--methods", "linear,adaptformer", "--batch", "1", "--budget", "0")
    status = ran(*arguments, "--clock", "cpu", "--out", str(path), "--note", "a test")
    return status, [json.loads(line) for line in path.read_text().splitlines()], path


# --- measured and published ----------------------------------------------------------------------------------------------


def fresh_row(variant: Variant, **values: float) -> dict[str, Any]:
    return {
        "benchmark": "paper_tables", "model": variant.model, "method": variant.method, "reduction": variant.reduction,
        "layer": variant.layer, "device": "cpu", "dtype": "float32", "attention": "fused", "measured": values, "ratio": {},
        "backbone_ratio": {}, "conditions": {}, "published": {},
    }  # fmt: skip


def test_columns_of_what_was_measured_hold_nothing_published() -> None:
    quantities = tables.TABLES["1"].quantities
    rows = {PLAIN: fresh_row(PLAIN, gmac=1.0), MERGED: fresh_row(MERGED, gmac=0.75, time_ms=3.0)}
    rows[MERGED]["ratio"] = {"gmac": 0.75}
    found = columns(render.variant_table([PLAIN, MERGED], quantities, rows))
    assert found["GMAC, here"] == ["1.00", "0.75"] and found["GMAC, paper"] == ["765432", "382716"]
    assert found["GMAC × plain, here"] == ["–", "0.750"] and found["GMAC × plain, paper"] == ["–", "0.500"]
    assert found["accuracy %, here"] == ["–", "–"] and found["accuracy %, paper"] == ["987654", "493827"]
    assert found["ms/image, here"] == ["–", "3.00"] and found["ms/image, paper"] == ["876543", "438272"]
    assert "†" not in found["GMAC, paper"][0]
    # Whatever was measured, and however little of it.
    for some in ({}, {"gmac": 1.0}, dict.fromkeys(quantities, 2.0)):
        text = render.variant_table([PLAIN, MERGED], quantities, {v: fresh_row(v, **some) for v in (PLAIN, MERGED)})
        for heading, cells in columns(text).items():
            if heading.endswith(", here"):
                assert not {f"{value * f:g}" for value in SENTINELS.values() for f in (1, 0.5)} & set(cells)
    assert "Not measured: accuracy %, training GB, reserved GB." in render.variant_table([PLAIN, MERGED], quantities, rows)


def test_times_say_which_machines_they_are_of() -> None:
    rows = []
    for variant, machine in ((PLAIN, "this one"), (MERGED, "that one")):
        row = fresh_row(variant, time_ms=1.0, gmac=1.0)
        rows.append({**row, "cpu": machine, "conditions": {"time_ms": {"clock": "cpu"}, "memory_gb": {"batch": 64}}})
    (found,) = render.merge_rows(rows).values()
    told = render.conditions(found, ["time_ms", "memory_gb"])
    assert told == ["ms/image: clock cpu; machine this one or that one", "training GB: batch 64"]


def test_numbers_are_written_out() -> None:
    assert [render._number(v, "#.3g") for v in (2014.0, 123.4, 0.5, None)] == ["2010", "123", "0.500", "–"]


def test_doubts_about_a_published_number_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    doubtful = {"gmac": Published(3.0, "hearsay", "it may be 4")}
    monkeypatch.setitem(published.PUBLISHED, (MERGED.model, MERGED.method, MERGED.reduction, MERGED.layer), doubtful)
    text = render.variant_table([MERGED], ["gmac"], {MERGED: fresh_row(MERGED, gmac=1.0)})
    assert columns(text)["GMAC, paper"] == ["3†"] and text.endswith("† adaptformer, fpet @3, GMAC: it may be 4.")
    assert "†" not in render.variant_table([MERGED], ["time_ms"], {MERGED: fresh_row(MERGED, time_ms=1.0)})


def test_rows_keep_published_numbers_apart(measured: Any) -> None:
    _, rows, _ = measured
    row = collect.Collector(options(), None).row(MERGED)
    assert row["published"]["gmac"] == {"value": 765432.0 / 2, "source": "nowhere", "doubt": ""}
    assert not row["measured"] and not row["ratio"]
    for row in rows:
        assert {"accuracy"}.isdisjoint(row["measured"]), "nothing was trained"


def test_what_measures_does_not_know_what_was_published() -> None:
    folder = Path(tables.__file__).parent
    for name in ("measure.py", "accuracy.py"):
        imported = [
            alias
            for node in ast.walk(ast.parse((folder / name).read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in [getattr(node, "module", None), *(a.name for a in node.names)]
        ]
        assert imported and not any("published" in (alias or "") or alias == "tables" for alias in imported)


def test_published_numbers_say_where_they_are_from() -> None:
    for (model, method, reduction, _), numbers in published.PUBLISHED.items():
        assert model in measure.MODELS and method in METHODS and reduction in REDUCTIONS
        assert numbers and all(p.source and name in render.QUANTITIES for name, p in numbers.items())
    assert published.lookup("vitb16", "ssf", "none", None)["gmac"] == Published(17.6, "Table 1")
    assert published.lookup("vitb16", "ssf", "fpet", 6) == {}
    assert published.lookup("vitb16", "adaptformer", "fpet", 6)["gmac"].value == 13.5
    assert "8.75" in published.lookup("vitb16", "vpt-deep", "none", None)["memory_gb"].doubt


@pytest.mark.parametrize("variant", [("vitb16", "bi-adaptformer", "none", None), ("vitb16", "lora", "fpet", 6)])
def test_gmac_are_those_that_were_published(variant: tuple[str, str, str, int | None]) -> None:
    assert measure.gmac(Variant(*variant)) == pytest.approx(published.lookup(*variant)["gmac"].value, rel=0.01)


# --- costs ---------------------------------------------------------------------------------------------------------------


def test_gmac_by_hand() -> None:
    n, d, hidden, depth, bottleneck = 101, 64, 192, 6, 8

    def block(tokens: int, mlp_tokens: int) -> int:
        return tokens * d * 4 * d + 2 * tokens * tokens * d + mlp_tokens * (2 * d * hidden + 2 * d * bottleneck)

    outside = 100 * 3 * 256 * d + d * measure.CLASSES
    assert measure.gmac(PLAIN) * 1e9 == depth * block(n, n) + outside
    merged = 3 * block(n, n) + block(n, 51) + 2 * block(51, 51) + outside
    assert merged < measure.gmac(MERGED) * 1e9 < 1.02 * merged  # and merging itself
    pooled = measure.gmac(Variant("tiny", "adaptformer", "avg-pool", 3)) * 1e9
    assert pooled == merged


def test_linear_methods_are_folded_for_inference_only() -> None:
    base = measure.backbone("tiny", CPU)
    for method in filter(folds, METHODS):
        variant = Variant("tiny", method, "fpet", 3)
        served = measure.build(base, variant, training=False)
        assert [n for n, m in served.named_modules() if isinstance(m, PETModule)] == ["blocks.3.refinement"] + [
            f"blocks.3.refinement.{n}" for n, m in served.blocks[3].refinement.named_modules() if n and isinstance(m, PETModule)
        ]
        shared = {p.data_ptr() for p in base.parameters()}
        assert all(p.data_ptr() in shared for n, p in served.named_parameters() if n in dict(base.named_parameters()))
        tuned = measure.build(base, variant, training=True)
        assert sum(isinstance(m, PETModule) for m in tuned.modules()) > 1
    assert measure.gmac(Variant("tiny", "lora", "none")) == measure.gmac(Variant("tiny", "none", "none"))


def test_variants_share_weights_and_leave_them_alone() -> None:
    base = measure.backbone("tiny", CPU)
    before = {n: (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in base.named_parameters()}
    images, labels = measure.inputs(160, 2, CPU)
    trained = {}
    for method in ("full", "bitfit", "adaptformer"):
        model = measure.build(base, Variant("tiny", method, "fpet", 3), training=True)
        call = measure.step_call(model, images, labels)
        mine = {n: p.detach().clone() for n, p in model.named_parameters()}
        call()
        call()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, mine[n])}
        trained[method] = {n for n, p in model.named_parameters() if p.requires_grad}
        assert changed == trained[method] and all(p.grad is None for p in model.parameters())
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        assert all(dict(model.named_parameters())[n].data_ptr() == before[n][0] for n in frozen)
    assert trained["adaptformer"] < {*trained["adaptformer"], *trained["full"]} and trained["bitfit"] < trained["full"]
    for name, p in base.named_parameters():
        assert (p.data_ptr(), p.requires_grad) == (before[name][0], before[name][2]) and torch.equal(p, before[name][1])


def test_memory_is_that_of_a_real_step() -> None:
    for variant in (PLAIN, MERGED):
        found, how = measure.training_bytes(variant, 3, CPU)
        model = measure.build(measure.backbone("tiny", CPU), variant, training=True)
        real = step_memory(model, *measure.inputs(160, 3, CPU))
        assert found == pytest.approx(real.peak, rel=0.05) and how == "storages alive at once, counted"


def test_reserved_memory_is_that_of_real_steps() -> None:
    for variant in (PLAIN, MERGED):
        found, how = measure.reserved_bytes(variant, 3, CPU)
        model = measure.build(measure.backbone("tiny", CPU), variant, training=True)
        assert found == pytest.approx(reserved_memory(model, *measure.inputs(160, 3, CPU)), rel=0.1)
        assert found > measure.training_bytes(variant, 3, CPU)[0] and how == "PyTorch's allocator, simulated"


def test_memory_of_what_needs_values_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    directly = measure.training_bytes(MERGED, 64, CPU)[0]

    def refuse(model: Any) -> Any:
        raise measure.DynamicOutputShapeException(None)

    monkeypatch.setattr(measure, "_nothing_computed", refuse)
    found, how = measure.training_bytes(MERGED, 64, CPU)
    assert found == pytest.approx(directly, rel=0.05) and how.endswith("extrapolated")
    assert measure.gmac(PLAIN) > 0


def test_attention_that_keeps_its_matrices_takes_more_memory() -> None:
    fused, plain = (measure.training_bytes(PLAIN, 8, CPU, attention)[0] for attention in ("fused", "plain"))
    assert plain > 1.05 * fused


def test_calls_take_turns_and_first_ones_do_not_count() -> None:
    made: list[str] = []
    calls = {v: (lambda name=name: made.append(name)) for v, name in ((PLAIN, "a"), (MERGED, "b"))}
    shares: list[float] = []
    found = timing.take_turns(calls, CPU, 0.0, tick=shares.append)
    assert made == ["a", "b", *("a", "b"), *("b", "a"), *("a", "b"), *("b", "a"), *("a", "b")]
    assert all(len(seconds) == timing.MIN_ROUNDS for seconds in found.values()) and shares[-1] == 1
    assert timing.quotient([1.0, 10.0, 1.0], [2.0, 20.0, 2.5]) == 0.5


def test_what_loses_tokens_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = measure.merged_features

    def lose(model: Any, images: Any) -> Any:
        found = right(model, images)
        return found._replace(size=found.size * 0.5)

    monkeypatch.setattr(measure, "merged_features", lose)
    arguments = ("--tables", "1", "--models", "tiny", "--methods", "adaptformer", "--measure", "time", "--batch", "1")
    assert ran(*arguments, "--budget", "0", "--out", "none") == 1
    said = capsys.readouterr()
    assert "WRONG" in said.err and "sizes sum to" in said.err
    assert columns(said.out)["tokens"] == ["all", "fpet @3"] and columns(said.out)["ms/image, here"][1] == "–"


# --- tables --------------------------------------------------------------------------------------------------------------


def test_tables_on_other_backbones_and_with_other_methods() -> None:
    one, three, five = (tables.TABLES[name] for name in ("1", "3", "5"))
    assert [(r.variant.method, r.variant.reduction) for r in one.rows_for(["vits16"], ["linear", "adaptformer", "bitfit"])] == [
        ("linear", "none"),
        ("bitfit", "none"),
        ("adaptformer", "none"),
        ("adaptformer", "fpet"),
    ]
    own = one.rows_for(["vitb16"], ["vpt-shallow"])
    assert [(r.variant.method, r.variant.reduction) for r in own] == [("vpt-shallow", "none"), ("vpt-shallow", "fpet")]
    assert {r.variant.layer for r in three.rows_for(["vitl16"])} == {None, 12}
    assert [r.variant.model for r in five.rows_for()] == ["vitl16", "vitl16", "deits16", "deits16"] != []
    assert five.rows_for(["vitb16"]) == []
    wanted = tables.variants_of(["1", "4"], None, ["adaptformer"])
    assert [str(v) for v in wanted] == ["ViT-B/16, adaptformer, none", "ViT-B/16, adaptformer, fpet at 6"]
    assert all({"time_ms", "gmac", "step_ms", "reserved_gb"} <= quantities for quantities in wanted.values())
    narrow = next(v for v in tables.variants_of(["A2"], None, None) if v.hidden_dim == 1)
    assert narrow.plain == narrow
    assert sum(p.numel() for n, p in measure.build(measure.backbone("tiny", torch.device("meta")), Variant("tiny", "adaptformer", "none", None, 1), training=True).named_parameters() if "adapter" in n) == 6 * 2 * 64  # fmt: skip


def test_differences_are_taken_to_the_same_method_with_every_token() -> None:
    rows = {PLAIN: fresh_row(PLAIN, accuracy=75.0, step_ms=100.0), MERGED: fresh_row(MERGED, accuracy=74.5, step_ms=80.0)}
    for row in rows.values():
        row["conditions"] = {"step_ms": {"batch": 4}}
    lines = [("plain", PLAIN, {}), ("ours", MERGED, {"delta_accuracy": Published(-0.05, "Table 3")}), ("NOAH", None, {})]
    found = columns(render.table(lines, ["delta_accuracy", "step_s"], rows))
    assert found["row"] == ["plain", "ours", "NOAH"] and found["method"] == ["adaptformer", "adaptformer", "–"]
    assert found["Δ accuracy %, here"] == ["+0.00", "-0.50", "–"] and found["Δ accuracy %, paper"] == ["–", "-0.05", "–"]
    assert found["s/iteration, here"] == ["0.400", "0.320", "–"]


def test_the_order_of_means_says_where_they_are_equal() -> None:
    group = {"a": [50.0, 51.0], "b": [51.0, 50.0], "c": [60.0], "d": [50.4]}
    rows = [
        {"model": "embedded", "task": "t", "method": "m", "reduction": name, "measured": {"accuracies": values}}
        for name, values in group.items()
    ]
    assert render.embedded_table(rows).endswith("Order of the means: c > a = b > d")


def test_rows_hold_what_was_measured_and_where_it_is_from(measured: Any) -> None:
    status, rows, _ = measured
    assert status == 0
    assert [(r["method"], r["reduction"]) for r in rows] == [
        ("linear", "none"),
        ("adaptformer", "none"),
        ("adaptformer", "fpet"),
    ]
    for row in rows:
        assert row["measured"]["time_ms"] > 0 and row["conditions"]["time_ms"]["rounds"] >= timing.MIN_ROUNDS
        assert row["conditions"]["time_ms"] | {"rounds": 0} == {"batch": 1, "rounds": 0, "clock": "cpu", "threads": torch.get_num_threads()}  # fmt: skip
        trains = row["method"] == "adaptformer"
        assert ("step_ms" in row["measured"]) == ("memory_gb" in row["measured"]) == trains
        assert row["ratio"]["gmac"] == (1 if row["reduction"] == "none" else pytest.approx(0.8, abs=0.05))
        assert row["backbone_ratio"]["time_ms"] > 0
        assert row["note"] == "a test" and row["command"].startswith("fpet tables --tables 1,4 --models tiny")
        assert {"commit", "date", "cpu", "torch", "timm", "load_average"} <= row.keys()
        assert (row["backend"] is None) == (row["reduction"] == "none")
    merged = rows[-1]
    counts = fpet.count_parameters(measure.build(measure.backbone("tiny", CPU), MERGED, training=True))
    assert merged["hidden_dim"] is None and counts.adapters > 0
    assert merged["conditions"]["memory_gb"]["batch"] == 64 and 0.5 < merged["ratio"]["memory_gb"] < 1


def test_show_makes_tables_of_rows(measured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, rows, path = measured
    later = tmp_path / "later.jsonl"
    changed = {**rows[-1], "measured": {"time_ms": 123.0}, "ratio": {"time_ms": 0.456}, "backbone_ratio": {}, "conditions": {}}
    later.write_text(path.read_text() + json.dumps(changed) + "\n")
    assert ran("--show", str(later), "--markdown", str(tmp_path / "tables.md")) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() == said
    first, fourth = (said.split(f"### Table {name}: ")[1].partition("###")[0] for name in ("1", "4"))
    assert "Table 3" not in said and "Table 5" not in said, "most of whose rows are not there"
    assert first.startswith("Comparison with state-of-the-art") and "clock cpu" in first
    found = columns(first)
    assert found["ms/image, here"][-1] == "123" and found["ms/image × plain, here"][-1] == "0.456"
    assert found["GMAC, here"][-1] == f"{rows[-1]['measured']['gmac']:.2f}" and found["GMAC, paper"][-1] == "382716"
    assert fourth.startswith("Average training time")
    assert ran("--show", str(later), "--tables", "4", "--methods", "adaptformer", "--models", "tiny,vitb16") == 0
    assert columns(capsys.readouterr().out)["tokens"] == ["all", "fpet @3"]
    (tmp_path / "other.jsonl").write_text(json.dumps({"benchmark": "kernel_vs_ref", "model": "x"}) + "\n")
    assert ran("--show", str(tmp_path / "other.jsonl")) == 0
    assert "nothing was measured" in capsys.readouterr().out


def test_picture_of_what_was_measured(measured: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, rows, path = measured
    assert ran("--show", str(path), "--plot", str(tmp_path / "figure.svg")) == 0
    drawn = (tmp_path / "figure.svg").read_text()
    assert "ms per image, measured here" in drawn and "GMAC, measured here" in drawn and "987654" not in drawn
    untimed = [{**row, "measured": {}} for row in rows]
    with pytest.raises(RuntimeError, match="--plot: expected rows with a time"):
        render.picture(render.merge_rows(untimed)["cpu", "float32", "fused"], "title", tmp_path / "none.png")


def test_batch_on_a_cpu_goes_by_the_work_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for work, images in ((1e9, 1), (61.6, 1), (17.6, 4), (4.6, 16), (0.1, 16)):
        monkeypatch.setattr(measure, "gmac", lambda variant, work=work: work)
        assert collect._batch("tiny", CPU, False) == images
    assert [collect._batch("tiny", SimpleNamespace(type="cuda"), training) for training in (False, True)] == [256, 64]


# --- refusals ------------------------------------------------------------------------------------------------------------


def options(*arguments: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    tables.add_arguments(parser)
    found = parser.parse_args(arguments)
    tables._complete(found)
    return found


WRONG = {
    "--tables": "7", "--models": "vith14", "--methods": "prefix", "--measure": "flops", "--device": "moon", "--batch": "0",
    "--threads": "many", "--budget": "-1", "--seeds": "0,0", "--attention": "sparse", "--accuracy": "guess", "--clock": "sun", "--scales": "small",
}  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), WRONG.items())
def test_wrong_arguments_are_named(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ran(argument, value)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and argument in message and value in message


TOGETHER = {
    "data without accuracy": (("--data", "."), "--accuracy data"),
    "accuracy without data": (("--accuracy", "data"), "--data DIR"),
    "no such folder": (("--accuracy", "data", "--data", "gone"), "gone"),
    "no such task": (("--accuracy", "embedded", "--tasks", "cifar"), "cifar"),
    "untuned has one task": (("--accuracy", "untuned", "--tasks", "count"), "embedded or data"),
    "tasks without accuracy": (("--tasks", "count"), "--accuracy"),
    "no such setting": (("--set", "epoch=3"), "epoch=3"),
    "no folder for the picture": (("--plot", "gone/x.png"), "gone"),
    "no folder for the tables": (("--markdown", "gone/x.md"), "gone"),
    "no rows": (("--show", "gone.jsonl"), "gone.jsonl"),
    "folder without data": (("--accuracy", "data", "--data", "."), "at least one whole task"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_options_that_do_not_go_together_are_refused_before_any_work(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "backbone", lambda *_: pytest.fail("work was done"))
    arguments, cause = TOGETHER[case]
    assert ran(*arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("fpet tables: ") and cause in message


def test_quick_is_a_selection() -> None:
    found = options("--quick")
    assert (found.models, found.methods, found.tables, found.budget) == (
        ["vits16"],
        ["adaptformer", "lora"],
        ["1", "3", "4"],
        10,
    )
    assert options("--quick", "--models", "tiny", "--tables", "3").models == ["tiny"]
    assert options("--models", "all").models == ["vits16", "vitb16", "vitl16", "deits16", "deitb16"]


def test_the_benchmark_is_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "paper_tables.py"
    if not script.is_file():
        pytest.skip("no benchmarks folder beside tests")
    spec = importlib.util.spec_from_file_location("paper_tables", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called: list[Any] = []
    monkeypatch.setattr(cli, "main", lambda argv: called.append(argv) or 0)
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--quick"])
    assert module.main() == 0 and called == [["tables", "--quick"]]


def test_rows_say_where_they_are_from(measured: tuple[int, list[dict[str, Any]], Path]) -> None:
    expected = provenance(CPU, "")
    for row in measured[1]:
        assert expected.keys() <= row.keys() and row["command"].startswith("fpet tables --tables 1,4")
        assert {name: row[name] for name in ("commit", "dirty", "torch")} == {
            n: expected[n] for n in ("commit", "dirty", "torch")
        }
