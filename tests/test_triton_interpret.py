"""Every branch of the Triton kernels on small problems: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen when Triton is imported: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpret.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fpet_kernels import Split, alternating, backends, bdm_merge, checkerboard, second_checkerboard
from support import (
    INPUTS,
    Problem,
    assert_near_ties_only,
    backward_op_args,
    check,
    exact,
    full_problem,
    merge,
    op_args,
    random_problem,
    reference_op,
    run,
    sweep,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSED = backends.refuses("triton", torch.empty(1, 1, 1, device=DEVICE))
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=f"no GPU, and TRITON_INTERPRET=1 was not set: {REFUSED}")

if REFUSED is None:
    from fpet_kernels.triton import configs, ops

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.fixture
def tiled(monkeypatch):
    """Sends short problems to the tiled kernels, in tiles small enough that several pass by."""
    monkeypatch.setattr(configs, "short_class", lambda *_: None)
    small = configs.Tiles(32, 32, 32, 32, 4, 1, rows=32)
    table = replace(configs.TABLES["other"], tiles=small, tiles_double=replace(small, block_a=16, block_b=16, block_c=16))
    monkeypatch.setitem(configs.TABLES, "small", table)
    with configs.pretend("small"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """Notes which kernels ran."""
    names = []
    launch = ops._Launch.__call__
    monkeypatch.setattr(ops._Launch, "__call__", lambda self, *t: (names.append(self.kernel.fn.__name__), launch(self, *t)))
    return names


def on(problem: Problem) -> Problem:
    return problem.on(DEVICE)


@pytest.mark.parametrize("path", [sweep(p, id=p.stem) if "14x14" in p.stem else pytest.param(p, id=p.stem) for p in GOLDEN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_golden(path, dtype):
    """The authors' code: float64 within 1e-11, float32 within the rounding of float32."""
    with np.load(path) as data:
        arrays = {name: torch.from_numpy(data[name]).to(DEVICE) for name in data.files if name != "meta"}
        meta = json.loads(str(data["meta"]))
    given = {n: arrays[n] for n in ("size", "w_down", "w_up") if n in arrays}
    problem = Problem(
        x=arrays["x"], key=arrays["key"], split=checkerboard(meta["side"], meta["side"]), grid_size=(meta["side"],) * 2,
        num_prefix_tokens=meta["prefix"], similarity=meta["similarity"], grad_tokens=arrays["grad_out"],
        grad_size=arrays["grad_size_out"], key_delta=torch.zeros_like(arrays["key"]), **given,
    ).to(dtype)  # fmt: skip
    got = run(problem, "triton")
    assert torch.equal(got.pop("match"), arrays["match"].long())
    theirs = {"tokens": "out", "size": "size_out", "grad_key_delta": "grad_key_refined"}
    for name, value in got.items():
        want = arrays[theirs.get(name, name)]
        error = float((value.double() - want).abs().max() / want.abs().max())
        assert error < (1e-11 if dtype == torch.float64 else 1e-6), f"{name}: {error:.3g}"


SHORT = {
    "plain": dict(),
    "heads": dict(heads=3),
    "refined": dict(hidden=5, mask=True, scale=0.3),
    "delta": dict(delta=True, size=True),
    "dot": dict(similarity="dot", delta=True),
    "dot, key attached": dict(similarity="dot", detach_key=False),
    "key attached": dict(detach_key=False, heads=2, size=True),
    "everything": dict(hidden=6, heads=2, size=True, mask=True, delta=True, detach_key=False),
    "no prefix": dict(prefix=0, hidden=4),
    "many prefix tokens": dict(prefix=19, delta=True),
    "odd grid": dict(grid=(5, 3), size=True, hidden=3),
    "one row": dict(grid=(1, 7), delta=True),
    "one column": dict(grid=(6, 1), hidden=17, channels=20),
    "listed": dict(split=second_checkerboard(6, 5), hidden=4),
    "listed, uneven": dict(split=Split(9, [0, 4], [1, 2, 3, 5, 6, 7, 8]), delta=True),
    "one channel": dict(channels=1, dim=1, delta=True),
    "several columns of tiles": dict(dim=70, size=True),
    "two blocks of sources": dict(split=alternating(140), batch=1, dim=6, channels=4, delta=True),
    "two blocks of sources, everything": dict(
        split=alternating(140),
        batch=2,
        dim=6,
        channels=4,
        hidden=3,
        heads=2,
        size=True,
        mask=True,
        delta=True,
        prefix=5,
        detach_key=False,
    ),
}


# What a dtype changes, it changes in these; the interpreter is slow.
IN_EVERY_DTYPE = ("refined", "everything", "two blocks of sources, everything")


def cases(table, *dtypes):
    """The cases of a table in float32, of some also in the other types."""
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            (pytest.param if dtype == torch.float32 or case in IN_EVERY_DTYPE else sweep)(
                case, dtype, id=f"{case}-{str(dtype)[6:]}"
            )
            for case in table
            for dtype in dtypes
        ],
    )


@cases(SHORT, torch.float32, torch.bfloat16, torch.float16)
def test_short(case, dtype, launched):
    options = dict(SHORT[case])
    if "two blocks of sources" in case and dtype == torch.float16:
        pytest.skip("the other types cover it, and the interpreter is slow")
    problem = random_problem(**options, dtype=dtype)
    check(on(problem), "triton")
    key_path = {"w_down", "key_delta", "key"} & set(problem.leaves)
    backward = ["prepare_backward", "pair_pass", "refined_gradient"] if key_path else ["spread_gradient"]
    backward += ["attached_gradient"] * ("w_down" in problem.leaves and "key" in problem.leaves)
    backward += ["weight_partials", "reduce_partials"] * ("w_down" in problem.leaves)
    steps = launched.count("pair_pass")
    assert launched[: 1 + len(backward)] == ["merge_short", *backward], f"{steps} pair passes"


LONG = {
    "refined": dict(grid=(7, 10), hidden=40, mask=True, scale=0.3, channels=36, dim=40),
    "listed, sizes, heads": dict(split=alternating(71), heads=2, size=True, delta=True),
    "everything": dict(grid=(7, 10), hidden=6, heads=2, size=True, mask=True, delta=True, detach_key=False),
    "dot": dict(grid=(3, 5), similarity="dot", detach_key=False, prefix=0),
    "raw key": dict(grid=(7, 10), detach_key=False),
}


@cases(LONG, torch.float32, torch.bfloat16, torch.float64)
def test_long(case, dtype, tiled):
    problem = random_problem(**LONG[case], batch=1, dtype=dtype)
    if dtype == torch.float64:
        problem = replace(random_problem(**{**LONG[case], "grid": (3, 5), "split": None}, batch=1, dtype=dtype))
    check(on(problem), "triton")


@pytest.mark.parametrize(
    ("shape", "long"),
    [(dict(split=alternating(40)), False), (dict(split=alternating(520)), True), (dict(channels=130), True),
     (dict(hidden=65), True)],
    ids=["short", "many tokens", "many channels", "many hidden units"],
)  # fmt: skip
def test_which_kernels(shape, long, launched):
    """Up to 256 sources and destinations, 128 channels and 64 hidden units in one launch, anything else in tiles."""
    with torch.no_grad():
        problem = on(random_problem(**{"batch": 1, "dim": 4, "channels": 4, **shape}))
        merge(problem, "triton")
    assert ("match_tiles" in launched) == long and ("merge_short" in launched) == (not long)
    if not long:
        assert launched == ["merge_short"], "a short forward is one launch"


@pytest.mark.parametrize("ordered", [True, False])
def test_blocks_of_sources_need_ordered_memory(ordered, launched, monkeypatch):
    """One block keeps its match in registers; several hand it on through memory, where barriers order that."""
    monkeypatch.setitem(configs.TABLES, "tried", replace(configs.table(DEVICE, 0), ordered=ordered))
    with configs.pretend("tried"), torch.no_grad():
        merge(on(random_problem(split=alternating(60), batch=1, dim=4, channels=4)), "triton")
        assert launched == ["merge_short"]
        merge(on(random_problem(split=alternating(300), batch=1, dim=4, channels=4)), "triton")
    assert launched[1] == ("merge_short" if ordered else "prepare_keys")


@pytest.mark.parametrize("case", ["everything", "plain"])
def test_without_parts_of_float32(case, launched, monkeypatch):
    """float32 products as multiply-adds: the other value of a table's ``split_float32``."""
    monkeypatch.setitem(configs.TABLES, "tried", replace(configs.table(DEVICE, 0), split_float32=False))
    with configs.pretend("tried"):
        check(on(random_problem(**SHORT[case])), "triton")
    assert "merge_short" in launched


def test_gather_only(launched):
    """No gradient to the key path, no work on it."""
    run(on(random_problem(size=True)), "triton", ("x", "size"))
    assert launched == ["merge_short", "spread_gradient"]


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_only_what_is_asked_for(long, request):
    if long:
        request.getfixturevalue("tiled")
    problem = on(full_problem(grid=(3, 4)))
    forward = ops.forward(*op_args(problem))
    everything = ops.backward(*backward_op_args(problem, forward))
    for needs in ((1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0,) * 5):
        some = ops.backward(*backward_op_args(problem, forward, tuple(map(bool, needs))))
        wanted = (needs[0], needs[1], needs[2], needs[2], needs[3], needs[4])
        for asked, all_of_it, this in zip(wanted, everything, some, strict=True):
            if asked:
                torch.testing.assert_close(this, all_of_it, rtol=1e-5, atol=1e-6, msg=lambda m, needs=needs: f"{needs}: {m}")
            else:
                assert this.numel() == 0, needs


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_mixed_types(long, request):
    """float32 tokens, bfloat16 key, float16 size, float32 weights, bool mask: what autocast makes of a model."""
    if long:
        request.getfixturevalue("tiled")
    problem = full_problem()
    problem = replace(
        problem,
        key=problem.key.bfloat16(),
        size=problem.size.half(),
        key_delta=problem.key_delta.bfloat16(),
        dropout_mask=problem.dropout_mask > 0,
    )
    got = run(on(problem), "triton", ("x", "size", "w_down", "w_up", "key_delta"))
    _, second = reference_op(on(problem))[2:4]
    want = exact(on(replace(problem, dropout_mask=problem.dropout_mask.float())), got["match"], second, ("x", "size", "w_down", "w_up", "key_delta"))  # fmt: skip
    for name, truth in want.items():
        assert got[name].dtype == {"grad_size": torch.float16, "grad_key_delta": torch.bfloat16}.get(name, torch.float32)
        limit = 4 * torch.finfo(got[name].dtype).eps if got[name].dtype != torch.float32 else 1e-5
        assert float((got[name].double() - truth).abs().max() / truth.abs().max()) < limit, name


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_strides(long, request):
    """Everything sliced out of something larger, transposed or expanded: read in place, the result the same."""
    if long:
        request.getfixturevalue("tiled")
    dense = on(full_problem(grid=(3, 4)))

    def scatter(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan") if t.is_floating_point() else 1)
        view = wide[..., 1 : 2 * t.shape[-1] : 2]
        view.copy_(t)
        flipped = torch.empty(view.shape[::-1], dtype=t.dtype, device=t.device).permute(*range(t.dim() - 1, -1, -1))
        return flipped.copy_(t) if t.dim() == 3 else view

    apart = dense.map(scatter)
    assert not apart.x.is_contiguous() and not apart.key.is_contiguous()
    want = run(dense, "triton")
    for name, value in run(apart, "triton").items():
        assert torch.equal(value, want[name]), name
    constant = replace(dense, grad_tokens=dense.grad_tokens.new_full((1, 1, 1), 0.5).expand_as(dense.grad_tokens))
    again = replace(dense, grad_tokens=constant.grad_tokens.contiguous())
    want = run(again, "triton")
    for name, value in run(constant, "triton").items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_ranking(long, request):
    """Ties go to the lowest index, NaN and what is not there rank lowest, and every source finds a destination."""
    if long:
        request.getfixturevalue("tiled")
    flat = random_problem(grid=(7, 10) if long else (4, 5), batch=1, dim=3)
    rows = {
        "flat": flat.key.new_ones(flat.key.shape),
        "zero": torch.zeros_like(flat.key),
        "nan": torch.full_like(flat.key, float("nan")),
        "huge": flat.key * 1e30,
        "one good destination": torch.full_like(flat.key, float("nan")),
    }
    good = int(flat.split.b[3]) + 1
    rows["one good destination"][:, flat.split.a + 1] = 1.0
    rows["one good destination"][:, good] = 1.0
    for name, key in rows.items():
        for similarity in ("cosine", "dot"):
            problem = on(replace(flat, key=key, similarity=similarity))
            _, size, match, second, _ = ops.forward(*op_args(problem))
            assert size.sum() == problem.x.shape[1], f"{name}: tokens were lost"
            assert ((match >= 1) & (match < size.shape[1]) & (second >= 1) & (second < size.shape[1])).all(), name
            assert (match != second).all(), name
            if name in ("flat", "zero", "nan"):
                assert (match == 1).all() and (second == 2).all(), name
            if name == "one good destination":
                assert (match == 4).all() and (second == 1).all(), name


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_poison(long, request, monkeypatch):
    """Every element of every output is written."""
    if long:
        request.getfixturevalue("tiled")
    problem = on(full_problem(grid=(3, 5), prefix=2))
    plain = replace(problem, w_down=None, w_up=None, dropout_mask=None)

    def results(p: Problem) -> list[torch.Tensor]:
        forward = ops.forward(*op_args(p))
        needs = (True, True, p.w_down is not None, True, True)
        return [*forward, *ops.backward(*backward_op_args(p, forward, needs))]

    clean = [results(problem), results(plain)]
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        made = new_empty(self, *args, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**31))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for want, p in zip(clean, (problem, plain), strict=True):
        for got, truth in zip(results(p), want, strict=True):
            assert torch.equal(got, truth)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_independent_of_the_batch(long, request):
    """One image gives bitwise the same alone, in company, and run again; the launch differs (parts of D per image)."""
    if long:
        request.getfixturevalue("tiled")
    problem = full_problem(batch=3, dim=70, dtype=torch.bfloat16)
    wanted = ("x", "size", "key_delta", "key")
    with configs.pretend("small" if long else "other"):
        together = run(on(problem), "triton", wanted)
        again = run(on(problem), "triton")
        alone = run(on(problem.map(lambda t: t if t.dim() == 2 else t[1:2])), "triton", wanted)
    for name, value in alone.items():
        assert torch.equal(value[0], together[name][1]), name
        assert torch.equal(together[name], again[name]), name


def test_parts_of_an_image():
    """How an image's columns are shared out changes nothing: one program, or one for every tile."""
    problem = on(random_problem(dim=150, size=True, delta=True))
    found = []
    for programs in (1, 5, 1000):
        table = replace(configs.table(DEVICE, 0), multiprocessors=programs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(configs.TABLES, "tried", table)
            with configs.pretend("tried"):
                found.append(ops.forward(*op_args(problem)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty(batch):
    """No image, and a split without sources."""
    problem = on(random_problem(batch=batch, delta=True, hidden=3, split=Split(6, [], range(6)) if batch else None))
    got = run(problem, "triton")
    assert got["tokens"].shape == (batch, problem.num_prefix_tokens + problem.split.b.numel(), problem.x.shape[2])
    if batch:
        assert torch.equal(got["tokens"], problem.x)
        torch.testing.assert_close(got["grad_x"], problem.grad_tokens)
    assert not got["grad_w_up"].any() and not got["grad_key_delta"].any()


def test_scores_have_float32_accuracy():
    """Splitting a float32 product into bfloat16 parts keeps float32's accuracy; tf32 or two parts would not."""
    errors = {}
    problem = on(random_problem((6, 6), batch=2, dim=4, channels=64, delta=True))
    truth = exact_mid(problem)
    errors["triton"] = (ops.forward(*op_args(problem))[4].double() - truth).abs().max()
    errors["plain"] = (reference_op(problem)[4].double() - truth).abs().max()
    assert errors["triton"] <= 2 * errors["plain"] + 2.0**-24, errors


def exact_mid(problem: Problem) -> torch.Tensor:
    return reference_op(problem.double())[4]


def test_scale_keeps_its_digits():
    """A Python float reaches a float64 kernel whole, though launches round scalars to float32."""
    problem = on(random_problem(dtype=torch.float64, hidden=4, scale=0.1))
    torch.testing.assert_close(ops.forward(*op_args(problem))[4], reference_op(problem)[4], rtol=1e-14, atol=1e-14)


def test_near_ties():
    """Keys a few roundings apart: whatever is taken, no better score was left."""
    problem = random_problem((6, 6), batch=2, dim=3, channels=5)
    base = problem.key[:, :1]
    problem = on(replace(problem, key=base + 1e-6 * problem.key))
    forward = ops.forward(*op_args(problem))
    assert_near_ties_only(problem, forward[2], forward[3])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    """One graph, no breaks, same numbers."""
    problem = on(full_problem())
    split = problem.split

    def step(x, key, size, w_down, w_up, delta):
        from fpet_kernels import KeyRefinement

        tokens, merged, _ = bdm_merge(
            x, key, split=split, size=size, refinement=KeyRefinement(w_down, w_up, 0.5), key_delta=delta, backend="triton"
        )
        return tokens.square().sum() + merged.log().sum()

    def gradients(f):
        leaves = [
            t.clone().requires_grad_()
            for t in (problem.x, problem.key, problem.size, problem.w_down, problem.w_up, problem.key_delta)
        ]
        return torch.autograd.grad(f(*leaves), [leaf for i, leaf in enumerate(leaves) if i != 1])

    backend = "inductor" if DEVICE == "cuda" else "aot_eager"  # nothing to compile for in the interpreter
    compiled = gradients(torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend))
    for got, want in zip(compiled, gradients(step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_operators_pass_opcheck():
    problem = on(full_problem(grid=(3, 4)))
    forward = ops.forward(*op_args(problem))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fpet.bdm_forward_triton.default, op_args(problem), test_utils=tests)
    torch.library.opcheck(torch.ops.fpet.bdm_backward_triton.default, backward_op_args(problem, forward), test_utils=tests)


def test_counted():
    """The FLOP counter sees the same work as in the CPU's operators."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = on(random_problem(hidden=4))
    with FlopCounterMode(display=False) as counter:
        ops.forward(*op_args(problem))
    pairs = problem.split.a.numel() * problem.split.b.numel()
    rows = problem.split.num_tokens
    batch, channels = problem.x.shape[0], problem.key.shape[2]
    assert counter.get_total_flops() == 2 * batch * channels * (pairs + 2 * rows * 4)


@pytest.mark.parametrize("grid", [(14, 14), (40, 40)], ids=["short", "long"])
def test_capturable(grid):
    """A CUDA graph can be captured, of both directions: nothing synchronises. Replayed on other inputs it gives their results."""
    if DEVICE != "cuda":
        pytest.skip("needs a GPU")
    first, other = (on(full_problem(grid=grid, dim=64, channels=64, dtype=torch.bfloat16, seed=seed)) for seed in (0, 1))

    def both(problem: Problem) -> tuple:
        forward = ops.forward(*op_args(problem))
        return *forward, *ops.backward(*backward_op_args(problem, forward))

    want = [both(p) for p in (first, other)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both(first)
    for problem, expected in zip((first, other), want, strict=True):
        for name in (*INPUTS, "grad_tokens", "grad_size"):
            getattr(first, name).copy_(getattr(problem, name))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tuner_tells_right_from_wrong(monkeypatch):
    """The gate in front of the tuner's timings: the frozen configuration passes, other results do not."""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    if not benchmarks.is_dir():
        pytest.skip("no benchmarks folder beside tests")
    monkeypatch.syspath_prepend(str(benchmarks))
    import tune
    from fpet_kernels.triton import report

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(L2_cache_size=1))
    case = report.Case("tiny", (5, 6), 1, 24, 16, torch.bfloat16, torch.bfloat16, heads=2, hidden=4, batch=3)
    trial = tune.Trial(case, torch.device(DEVICE))
    assert trial.wrong(True, True) is None
    trial.calls(True, True)()
    forward, backward = ops.forward, ops.backward
    monkeypatch.setattr(ops, "forward", lambda *a: (forward(*a)[0] * 1.5, *forward(*a)[1:]))
    assert trial.wrong(True, False) == "tokens differ"
    monkeypatch.setattr(ops, "backward", lambda *a: tuple(t * 1.1 for t in backward(*a)))
    assert trial.wrong(False, True) == "gradients differ"
