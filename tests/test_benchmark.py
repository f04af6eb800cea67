"""The kernel benchmark: right baselines, a gate that lets nothing wrong through, rows that say where they are from."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fpet_kernels import Merged, backends
from fpet_kernels.reference import bdm_merge_reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NEEDED = ("timm", "sklearn", "PIL", "tqdm", "matplotlib")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing or not BENCHMARKS.is_dir():
    why = f"not installed: {', '.join(missing)} (extra 'bench')" if missing else "no benchmarks folder beside tests"
    pytest.skip(why, allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
import kernel_vs_ref  # noqa: E402
import lost_tokens  # noqa: E402
from harness import cases, gate, timing  # noqa: E402
from kernel import formulations, implementations, report  # noqa: E402

CPU = torch.device("cpu")
TINY = cases.CASES["tiny"]


@pytest.fixture(scope="module")
def base():
    return cases.features(cases.seeded_vit(TINY), cases.crops(cases.photograph(), 2, TINY.image_size))


def problem_of(base, dtype=torch.float32, *, batch=4, backward=True, **options):
    problem = cases.make_problem(TINY, base, batch, dtype, CPU, **options)
    problem.requires_grad_(backward)
    return problem


def reference_call(problem):
    return lambda: bdm_merge_reference(
        problem.x, problem.key, split=TINY.split, num_prefix_tokens=TINY.num_prefix_tokens, w_down=problem.w_down,
        w_up=problem.w_up,
    )[:4]  # fmt: skip


# --- input -------------------------------------------------------------------------------------------------------------


def test_input_is_real_strided_and_different_in_every_image(base):
    x, qkv = base
    problem = problem_of(base)
    assert problem.distinct == 2 and not torch.equal(problem.x[0], problem.x[1])
    assert torch.equal(problem.x[0], problem.x[2])
    assert problem.key.shape == (4, TINY.heads, TINY.num_tokens, TINY.channels)
    assert problem.key.stride(2) == 3 * TINY.dim  # in place in the fused qkv output
    heads = qkv[0, :, TINY.dim : 2 * TINY.dim].reshape(TINY.num_tokens, TINY.heads, TINY.channels)
    assert torch.equal(problem.key[0, 1], heads[:, 1])

    model = cases.seeded_vit(TINY)
    block, image = model.blocks[-1], cases.crops(cases.photograph(), 1, TINY.image_size)
    with torch.no_grad():
        before = model.blocks[:-1](model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image)))))
        behind_attention = before + block.ls1(block.attn(block.norm1(before)))
    torch.testing.assert_close(x[:1], behind_attention)


def test_bytes_of_an_averaged_key():
    case = cases.CASES["vitb16_224"]
    merged, n, d, c = case.num_merged, case.num_tokens, case.dim, case.channels
    assert (merged, n, d, c) == (99, 197, 768, 64)
    x, y = torch.empty(1, n, d, dtype=torch.bfloat16), torch.empty(1, merged, d, dtype=torch.bfloat16)
    weights = torch.empty(32, c), torch.empty(c, 32)
    problem = cases.Problem(case, x, torch.empty(1, n, c, dtype=torch.bfloat16), *weights, y, torch.empty(1, merged, 1), 1)
    assert problem.bytes_moved(True, False) / 1e6 == pytest.approx(0.48, abs=0.005)
    rows, integers = d * 2, 4 * merged + 8 * 98
    alone = rows * (merged + n) + integers  # the tokens' gradient and dx, sizes and match
    with_weights = (
        alone + rows * (98 + 98) + 12 * 98 + n * c * 2
    )  # the sources' x, the destinations' tokens, the rest of the match, key
    assert problem.bytes_moved(False, True) == with_weights
    assert problem.bytes_moved(True, True) == problem.bytes_moved(True, False) + with_weights
    plain = cases.Problem(case, x, problem.key, None, None, y, torch.empty(1, merged, 1), 1)
    assert plain.bytes_moved(False, True) == alone
    heads = cases.Problem(case, x, torch.empty(1, 12, n, c, dtype=torch.bfloat16), *weights, y, torch.empty(1, merged, 1), 1)
    handed = heads.bytes_moved(True, True) - heads.bytes_moved(True, False)
    assert heads.bytes_moved(False, True) - handed == n * c * (12 * 2 - 4), (
        "the backward's own forward hands it the mean in float32"
    )


# --- baselines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [True, False])
def test_paper_formulation_is_the_reference_under_the_threshold_rule(base, refine):
    problem = problem_of(base, torch.float64, refine=refine)
    function, args = formulations.paper_of(problem)
    tokens, size = function(*args)
    grads = gate.gradients(tokens, size, problem)
    expected, expected_size, *_ = bdm_merge_reference(
        problem.x, problem.key, split=TINY.split, num_prefix_tokens=1, w_down=problem.w_down, w_up=problem.w_up,
        rule="threshold",
    )  # fmt: skip
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(size, expected_size, rtol=0, atol=1e-12)
    for got, want in zip(grads, gate.gradients(expected, expected_size, problem), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", formulations.BEST_VARIANTS)
def test_indexed_formulation_passes_the_gate(base, variant, dtype, refine, backward):
    problem = problem_of(base, dtype, backward=backward, refine=refine)
    function, args = formulations.Indexed(variant).of(problem)
    verdict = gate.examine(lambda: function(*args), gate.Examiner(problem, backward), twice=False)
    assert verdict.right, verdict.complaint()


# --- gate --------------------------------------------------------------------------------------------------------------


def test_formulas_with_given_decisions_are_the_reference(base):
    problem = problem_of(base, torch.float64)
    given = gate.reference_answer(problem, True)
    again = gate.with_decisions(problem, given.match, given.second, True)
    for got, want in zip((again.tokens, again.size, *again.grads), (given.tokens, given.size, *given.grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gate_lets_the_reference_and_every_backend_pass(base, dtype):
    problem = problem_of(base, dtype)
    examiner = gate.Examiner(problem, True)
    verdict = gate.examine(reference_call(problem), examiner)
    assert verdict.right, verdict.complaint()
    name = backends.select(problem.x, None)
    verdict = gate.examine(implementations.backend_calls(name, problem)[1], examiner)
    assert verdict.right, f"{name}: {verdict.complaint()}"


def _other_match(given):
    match = given.match.clone()
    match[0, 0] = TINY.num_prefix_tokens + (match[0, 0] - TINY.num_prefix_tokens + 7) % TINY.split.b.numel()
    return given._replace(match=match)


def _with_grad(given, index, change):
    grads = list(given.grads)
    grads[index] = change(grads[index])
    return given._replace(grads=tuple(grads))


def _one_image(tensor):
    changed = tensor.clone()
    changed[-1] += 1e-6  # a repeat of image 1, which stays as it is
    return changed


WRONG = {
    "match": _other_match,
    "match outside": lambda g: g._replace(match=g.match - TINY.num_prefix_tokens - 1),
    "second": lambda g: g._replace(second=g.match),
    "tokens": lambda g: g._replace(tokens=g.tokens * (1 + 2e-6)),
    "size": lambda g: g._replace(size=g.size + 1e-5),
    "d x": lambda g: _with_grad(g, 0, lambda t: t * (1 + 5e-6)),
    "d w_down": lambda g: _with_grad(g, 1, lambda t: t * (1 + 5e-6)),
    "d w_up": lambda g: _with_grad(g, 2, lambda t: t * torch.nan),
    "place in the batch": lambda g: g._replace(tokens=_one_image(g.tokens)),
}


@pytest.mark.parametrize("what", WRONG)
def test_gate_refuses(base, what):
    problem = problem_of(base)
    examiner = gate.Examiner(problem, True)
    given = gate.answer(reference_call(problem), problem, True)
    assert examiner.examine(given, given).right
    wrong = WRONG[what](given)
    verdict = examiner.examine(wrong, wrong)
    assert not verdict.right
    assert what in verdict.complaint()


def test_gate_refuses_what_is_not_reproducible(base):
    problem = problem_of(base)
    given = gate.answer(reference_call(problem), problem, True)
    again = _with_grad(given, 1, lambda t: torch.nextafter(t, torch.full_like(t, torch.inf)))
    assert "second run differs" in gate.Examiner(problem, True).examine(given, again).complaint()


# --- the command --------------------------------------------------------------------------------------------------------


PROVENANCE = (
    "commit", "dirty", "date", "command", "cpu", "cores", "threads", "isa", "gpu", "driver", "torch", "triton", "timm",
    "python", "malloc", "key", "refinement", "peak_extra_mb",
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the command on the tiny case without compiling; returns (exit status, rows)."""
    monkeypatch.setattr(kernel_vs_ref, "compile_whole", lambda call: call)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)

    def run(*more):
        out = tmp_path / "rows.jsonl"
        status = kernel_vs_ref.main(["--cases", "tiny", "--batch", "2", "--budget", "0.1", "--out", str(out), *more])
        return status, [json.loads(line) for line in (out.read_text() if out.exists() else "").splitlines()]

    return run


def test_rows_say_what_was_measured_where(quick, capsys, tmp_path):
    picture = tmp_path / "bars.png"
    status, rows = quick("--dtype", "bfloat16", "--plot", str(picture))
    assert status == 0
    fused = backends.select(torch.empty(1, 1, 1), None)
    names = {fused, "reference", "paper", "paper_compiled", *(f"indexed_{v}" for v in formulations.BEST_VARIANTS)}
    assert {(r["implementation"], r["mode"], r["dtype"]) for r in rows} == {
        (n, m, "bfloat16") for n in names for m in kernel_vs_ref.MODES
    }
    for row in rows:
        assert set(PROVENANCE) <= set(row)
        assert row["torch"] == torch.__version__ and row["threads"] == torch.get_num_threads()
        assert row["ms_per_image"] > 0 and row["copy_gb_per_s"] > 0
        assert row["share_of_copy"] == pytest.approx(row["floor_ms_per_image"] / row["ms_per_image"])
        paper = next(r for r in rows if (r["implementation"], r["mode"]) == ("paper", row["mode"]))
        assert row["speedup_over_paper"] == pytest.approx(paper["ms_per_image"] / row["ms_per_image"])
    printed = capsys.readouterr().out
    assert report.label(fused) in printed and "× best PyTorch" in printed
    assert picture.stat().st_size > 0

    assert kernel_vs_ref.main(["--show", str(tmp_path / "rows.jsonl")]) == 0
    assert capsys.readouterr().out.count("tiny · batch 2") == 2


def fused_here() -> str:
    name = backends.select(torch.empty(1, 1, 1), None)
    if name == "reference":
        pytest.skip("no fused backend runs here")
    return name


@pytest.mark.parametrize("refinement", [True, False])
def test_the_backward_alone(quick, refinement):
    """Only fused backends, on the results of a forward; its bytes are what forward+backward moves more than forward.

    A forward of its own hands the mean key over; the backward alone has to read the key of every head.
    """
    name = fused_here()
    more = [] if refinement else ["--no-refinement"]
    status, rows = quick("--mode", "forward,forward+backward,backward", *more)
    assert status == 0
    assert {r["implementation"] for r in rows if r["mode"] == "backward"} == {name}
    moved = {r["mode"]: r["bytes_per_image"] for r in rows if r["implementation"] == name}
    tiny = cases.CASES["tiny"]
    heads = 4 * tiny.num_tokens * (tiny.dim - tiny.dim // tiny.heads) if refinement else 0
    assert moved["backward"] - heads == moved["forward+backward"] - moved["forward"] > 0


def test_a_wrong_backward_alone_is_refused(quick, monkeypatch, capsys):
    name = fused_here()
    right = backends.backward_op

    def wrong(which):
        return lambda *args: tuple(t * 1.001 for t in right(which)(*args))

    monkeypatch.setattr(backends, "backward_op", wrong)
    status, rows = quick("--mode", "backward")
    assert status == 1 and rows == []
    assert f"WRONG: backend {name!r}" in capsys.readouterr().err


def test_a_backend_that_breaks_leaves_the_others(quick, monkeypatch, capsys):
    name = fused_here()
    right = kernel_vs_ref.backend_calls

    def broken(which, problem):
        if which == name:
            raise RuntimeError("an illegal memory access was encountered\nmore")
        return right(which, problem)

    monkeypatch.setattr(kernel_vs_ref, "backend_calls", broken)
    status, rows = quick("--mode", "forward")
    assert status == 1
    assert "an illegal memory access was encountered" in capsys.readouterr().err
    assert {"reference", "paper"} <= {r["implementation"] for r in rows} and name not in {r["implementation"] for r in rows}


def test_a_gpu_is_timed_twice(quick, monkeypatch, capsys):
    """As CUDA graphs, without those that can't be captured, and call by call; each with its ratio to the floor."""
    start = kernel_vs_ref.Bench.__init__

    def on_gpu(self, *args):
        start(self, *args)
        self.kinds = ("graph", "plain")

    def capture(call):
        captured.append(call)
        if len(captured) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return call

    captured: list = []
    monkeypatch.setattr(kernel_vs_ref.Bench, "__init__", on_gpu)
    monkeypatch.setattr(timing, "capture", capture)
    measure = timing.measure
    monkeypatch.setattr(timing, "measure", lambda *a, graph, **k: measure(*a, **k))
    status, rows = quick("--mode", "forward")
    assert status == 0
    graph, plain = ({r["implementation"] for r in rows if r["timing"] == kind} for kind in ("graph", "plain"))
    assert len(captured) == len(plain) and len(plain - graph) == 1
    assert "as a CUDA graph: operation not permitted" in capsys.readouterr().out
    group = [{**r, "device": "cuda"} for r in rows if r["timing"] == "graph"]
    lines = report.table(group).splitlines()
    assert "graph timing, cold L2" in lines[0] and report.OVER_FLOOR in lines[2]
    assert report.number(group[0]["ms_per_image"] / group[0]["floor_ms_per_image"]) in lines[3]


@pytest.mark.parametrize("graph", [True, False])
def test_a_sample_on_a_gpu_starts_with_a_cold_cache(graph, monkeypatch):
    """Read through something large, and only for plain calls let the device come to rest before the call is made."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, _end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: log.append("rest"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(L2_cache_size=1 << 20))
    total = torch.sum
    monkeypatch.setattr(torch, "sum", lambda t, **k: (log.append("flush"), total(t, **k))[1])
    take = timing._cuda_sampler({"it": lambda: log.append("call")}, CPU, graph)
    assert take("it", 2) == pytest.approx(3e-3)
    assert log == ["flush", *([] if graph else ["rest"]), "event", "call", "call", "event", "rest"]


def test_every_fused_backend_of_a_gpu_is_measured(monkeypatch):
    missing: dict[str, str] = {}
    monkeypatch.setattr(backends, "refuses", lambda name, _x: missing.get(name))
    fused = [name for name in backends.ORDER if name not in ("cpu", "reference")]
    assert len(fused) >= 2
    assert kernel_vs_ref.choose_backends(None, torch.device("meta")) == ([*fused, "reference"], [])
    missing[fused[0]] = "its library was not built"
    names, complaints = kernel_vs_ref.choose_backends(None, torch.device("meta"))
    assert names == [*fused[1:], "reference"]
    assert len(complaints) == 1 and fused[0] in complaints[0] and "its library was not built" in complaints[0]


def test_no_speed_for_a_wrong_backend(quick, capsys, monkeypatch):
    right = implementations.bdm_merge

    def wrong(x, key, **options):
        tokens, size, match = right(x, key, **options)
        return Merged(tokens * 1.001, size, match)

    monkeypatch.setattr(implementations, "bdm_merge", wrong)
    status, rows = quick("--mode", "forward", "--backends", "reference")
    captured = capsys.readouterr()
    assert status != 0
    assert "WRONG: backend 'reference'" in captured.out + captured.err and "tokens: error" in captured.err
    assert "reference" not in {r["implementation"] for r in rows}
    assert report.label("reference") not in captured.out.replace("WRONG: backend", "")


def test_a_missing_cpu_backend_is_reported_with_its_reason(monkeypatch):
    monkeypatch.setattr(backends, "_NATIVE", backends.Status(False, "no library in this test", "build one"))
    names, complaints = kernel_vs_ref.choose_backends(None, CPU)
    assert names == ["reference"]
    assert "no library in this test" in complaints[0] and "build one" in complaints[0]
    with pytest.raises(SystemExit, match="no library in this test"):
        kernel_vs_ref.choose_backends("cpu", CPU)


WRONG_ARGUMENTS = {
    "--cases": "vitb", "--mode": "sideways", "--dtype": "int8", "--batch": "0", "--threads": "0", "--device": "moon",
}  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), WRONG_ARGUMENTS.items())
def test_wrong_arguments_are_named(argument, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        kernel_vs_ref.parse([argument, value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert argument in message and value in message


def test_an_unknown_backend_is_named():
    with pytest.raises(SystemExit, match="'warp'"):
        kernel_vs_ref.choose_backends("warp", CPU)


def test_host_overhead_measures_every_backend():
    rows = kernel_vs_ref.overhead(["reference"], CPU, 0.01)
    assert {r["implementation"] for r in rows} > {"reference: bdm_merge", "torch.add, for scale"}
    assert all(r["us_per_call"] > 0 for r in rows)


def test_peak_memory_sees_what_a_call_allocates():
    found = timing.peak_extra_bytes(lambda: torch.ones(8 << 20), CPU)
    if found is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 30e6 < found < 60e6


def test_result_bytes_are_those_of_the_results(base):
    problem = problem_of(base)
    given = gate.reference_answer(problem, True)
    results = (given.tokens, given.size, given.match, *given.grads)
    assert problem.result_bytes(True) == sum(t.numel() * t.element_size() for t in results)


def test_the_threshold_rule_loses_tokens_and_bdm_merge_does_not():
    model = cases.seeded_vit(TINY)
    flat = lost_tokens.images(TINY.image_size)["flat"]
    published, ours = lost_tokens.lost(TINY, model, flat, torch.bfloat16)
    assert published > 0 and ours == 0


def test_missing_package_names_the_fix():
    with pytest.raises(SystemExit, match="pip install no-such-package"):
        cases.require("no_such_module", "no-such-package")


def test_a_case_that_does_not_fit_is_left_out(monkeypatch):
    setting = kernel_vs_ref.Setting(cases.CASES["vitl16_1024"], 256, "float32", "forward")
    monkeypatch.setattr(timing, "available_bytes", lambda _device: 1 << 30)
    bench = kernel_vs_ref.Bench(
        SimpleNamespace(device=CPU, batch=[256], minutes=None, timing=["plain"], baselines=[]), ["reference"]
    )
    bench.bar = SimpleNamespace(set_description=print)
    assert bench.run(setting) == []
    assert "does not fit" in bench.left_out[0]


def test_features_are_computed_when_a_batch_needs_them_and_once(monkeypatch):
    options = SimpleNamespace(device=CPU, batch=[1, 4], minutes=None, timing=["plain"], baselines=[])
    bench = kernel_vs_ref.Bench(options, ["reference"])
    built = []
    monkeypatch.setattr(cases, "seeded_vit", lambda case, build=cases.seeded_vit: (built.append(case), build(case))[1])
    one = bench.features(TINY, 1)
    two = bench.features(TINY, 4)
    assert [t.shape[0] for t in (*one, *two)] == [1, 1, TINY.distinct, TINY.distinct] and len(built) == 2
    assert all(torch.equal(a, b[:1]) for a, b in zip(one, two, strict=True))
    assert bench.features(TINY, 2) is two and len(built) == 2
