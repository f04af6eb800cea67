"""What the CUDA backend promises beyond the contract that every backend is tested for (all tests that ask for ``backend``).

On a GPU where one is; under FPET_EMULATED_CUDA also on CPU tensors, over kernels compiled for the host.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fpet_kernels import alternating, backends, bdm_merge, reference
from support import DTYPES, backward_op_args, check, full_problem, op_args, random_problem, run

ROOT = Path(__file__).resolve().parents[1]


def on_a_gpu(test):
    """Runs where a GPU is; FPET_ONLY_ON keeps it."""
    missing = not torch.cuda.is_available() or backends.refuses("cuda", torch.empty(1, 1, 1, device="cuda")) is not None
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="no GPU that the CUDA library runs on")(test))


on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")


def operators(device: str):
    return torch.ops.fpet if device == "cuda" else torch.ops.fpet_emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_grid_of_the_paper(dtype, cuda, device):
    """14 × 14 patches, keys of 64 channels, refined: the short path, and for float64 the long one."""
    dim = 768 if device == "cuda" else 40
    check(random_problem((14, 14), batch=1, dim=dim, channels=64, hidden=32, heads=2, dtype=dtype, device=device), cuda)


@pytest.mark.parametrize(("grid", "channels"), [((20, 20), 32), ((7, 9), 136), ((16, 17), 8)], ids=["long", "wide", "between"])
def test_long_grids_and_wide_keys(grid, channels, cuda, device):
    for dtype in (torch.float32, torch.bfloat16):
        check(full_problem(grid=grid, batch=1, dim=24, channels=channels, dtype=dtype, device=device), cuda)


SHORT = {
    "odd grid without prefix": dict(grid=(5, 7), prefix=0),
    "five prefix tokens, dot": dict(grid=(6, 6), prefix=5, similarity="dot"),
    "listed split": dict(split=alternating(30), channels=40),
    "key_delta alone": dict(hidden=0, heads=0, detach_key=True),
    "attached heads alone": dict(hidden=0, delta=False, heads=3, channels=64),
    "attached keys as they are": dict(hidden=0, delta=False, heads=0, similarity="dot"),
    "refinement alone": dict(heads=0, delta=False, detach_key=True, hidden=32, mask=False, size=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("options", SHORT.values(), ids=SHORT)
def test_short_grids(options, dtype, cuda, device):
    """One launch forward, one backward, for every branch of the key path; six images, more than the emulator has multiprocessors."""
    check(full_problem(**{**dict(batch=6, dim=40, channels=24, dtype=dtype, device=device), **options}), cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("listed", [False, True], ids=["grid", "lists"])
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_unmerge(dim, listed, dtype, cuda, device):
    """A gather, so bit for bit; its gradient, sums in order of position, within the rounding of one sum."""
    problem = random_problem((5, 7), dim=dim, prefix=2, dtype=dtype, device=device)
    where = (*(index.to(device) for index in (problem.split.a, problem.split.b)), 0, 0, 2) if listed else (None, None, 5, 7, 2)
    tokens, _, match = bdm_merge(problem.x, problem.key, grid_size=(5, 7), num_prefix_tokens=2)
    merged = operators(device).bdm_unmerge(tokens, match, *where)
    assert torch.equal(merged, reference.bdm_unmerge_reference(tokens, match, split=problem.split, num_prefix_tokens=2))
    grad = torch.randn(merged.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    got = operators(device).bdm_unmerge_backward(grad, match, *where)
    leaf = tokens.double().requires_grad_()
    wide = reference.bdm_unmerge_reference(leaf, match, split=problem.split, num_prefix_tokens=2)
    (want,) = torch.autograd.grad(wide, leaf, grad.double())
    sums = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps / 2 + sums, atol=4 * sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_average_heads(dtype, cuda, device):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 3, 7, 19, 24, generator=generator).to(device, dtype)  # a key sliced out of a qkv buffer
    key = fused[:, 1].permute(0, 1, 2, 3)
    for wide in (False, True):
        got = operators(device).average_heads(key, wide)
        precise = wide or dtype == torch.float64
        assert got.dtype == (torch.float64 if precise else torch.float32) and got.is_contiguous()
        want = key.double().mean(1)
        torch.testing.assert_close(got.double(), want, rtol=1e-14 if precise else 1e-6, atol=1e-14 if precise else 1e-6)


def test_operators_check_their_arguments(cuda, device):
    problem = random_problem(device=device)
    forward = backends.forward_op(cuda)
    with pytest.raises(RuntimeError, match=r"key: expected size 21 in dimension 1, got 20"):
        forward(problem.x, problem.key[:, 1:], *op_args(problem)[2:])
    with pytest.raises(RuntimeError, match=r"size: expected 3 dimensions, got 2"):
        forward(problem.x, problem.key, torch.ones(2, 21, device=device), *op_args(problem)[3:])
    a, b = alternating(20).on(torch.device(device))
    with pytest.raises(RuntimeError, match=r"split_a, split_b: expected contiguous 1-D int64"):
        forward(*op_args(problem)[:7], a.int(), b.int(), 0, 0, 1, 1.0, True)


def test_empty_batch_and_no_sources(cuda, device):
    """Weight gradients of nothing are zero, not uninitialised; everything may be a destination."""
    problem = full_problem(batch=0, device=device)
    grads = run(problem, cuda)
    assert grads["tokens"].shape[0] == 0 and not grads["grad_w_down"].any() and not grads["grad_w_up"].any()


# --- the binding over kernels that fail -----------------------------------------------------------------------------------

FAILING = """
#include "fpet/bdm_cuda.h"
namespace fpet {
const char* cuda_refuses(const Problem& p) { return p.dim == 13 ? "thirteen features" : nullptr; }
size_t cuda_forward_workspace(const Problem&) { return 100; }
size_t cuda_backward_workspace(const Problem&, const BackwardOutputs&) { return 0; }
CudaStatus cuda_forward(const Problem&, const ForwardOutputs&, void* workspace, cudaStream_t) {
  return {cudaErrorInvalidConfiguration, reinterpret_cast<uintptr_t>(workspace) % 256 ? "misaligned" : "merge_short<bf16, 64>"};
}
CudaStatus cuda_backward(const Problem&, const BackwardInputs&, const BackwardOutputs&, void* workspace, cudaStream_t) {
  return {cudaErrorInvalidValue, workspace ? "not null" : "key_gradient<float>"};
}
CudaStatus cuda_average_heads(const Problem&, void*, cudaStream_t) { return {cudaErrorInvalidValue, "average_heads"}; }
CudaStatus cuda_unmerge(const UnmergeProblem&, cudaStream_t) { return {cudaErrorInvalidValue, "copy_rows"}; }
size_t cuda_unmerge_backward_workspace(const UnmergeProblem&) { return 1; }
CudaStatus cuda_unmerge_backward(const UnmergeProblem&, void*, cudaStream_t) { return {cudaErrorInvalidValue, "merge_lists"}; }
CudaKernelFacts cuda_kernel_facts(int) { return {}; }
}
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorInvalidValue ? "invalid \\"value\\"" : "too many threads"; }
"""
CALL = """
import sys, torch, support
from fpet_kernels import backends, bdm_merge, bdm_unmerge
support.emulate_cuda(sys.argv[1])
x = torch.ones(1, 5, 4)
match, o = torch.ones(1, 2, dtype=torch.int64), torch.ops.fpet_emulated
fine = torch.ops.fpet.bdm_forward(x, x, *[None] * 7, 2, 2, 1, 1.0, True)
for call in (
    lambda: bdm_merge(x, x, grid_size=(2, 2), backend="cuda"),
    lambda: o.bdm_backward(x[:, :3], None, x, x, *[None] * 5, *fine, None, None, 2, 2, 1, 1.0, True, True, *[False] * 4),
    lambda: o.average_heads(x[None], False),
    lambda: o.bdm_unmerge(x[:, :3], match, None, None, 2, 2, 1),
    lambda: o.bdm_unmerge_backward(x, match, None, None, 2, 2, 1),
    lambda: bdm_merge(torch.ones(1, 5, 13), x, grid_size=(2, 2), backend="cuda"),
):
    try:
        call()
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


def test_a_failed_launch_is_an_error_that_names_the_kernel(tmp_path):
    compiler = pytest.importorskip("build_backend").find_compiler()  # absent where the tests have been copied away
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch_folder = Path(torch.__file__).parent
    (tmp_path / "failing.cpp").write_text(FAILING)
    library = tmp_path / "failing.so"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-DFPET_EMULATE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    folders = ["csrc/tests/emulator", "csrc/include", "csrc/bindings"]
    sources = [tmp_path / "failing.cpp", ROOT / "csrc/bindings/cuda_ops.cpp"]
    subprocess.run(
        [*compiler, *flags, *(f"-I{ROOT / f}" for f in folders), "-isystem", torch_folder / "include", *sources, "-o", library,
         f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], check=True,
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CALL, library], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line.rpartition("cuda_ops.cpp:")[2].partition(", ")[2] for line in done.stdout.splitlines()]
    assert said == [
        "CUDA kernel merge_short<bf16, 64> could not be launched: too many threads",
        *(
            f'CUDA kernel {name} could not be launched: invalid "value"'
            for name in ("key_gradient<float>", "average_heads", "copy_rows", "merge_lists")
        ),
        "the CUDA kernels don't take this problem: thirteen features",
    ], done.stdout + shlex.join(map(str, sources))


# --- on a GPU ------------------------------------------------------------------------------------------------------------


def both_ways(problem):
    forward = backends.forward_op("cuda")(*op_args(problem))
    return (*forward, *backends.backward_op("cuda")(*backward_op_args(problem, forward)))


@on_a_gpu
@pytest.mark.parametrize("grid", [(14, 14), (30, 30)], ids=["short", "long"])
def test_cuda_graph(grid):
    """Captured and replayed on other values, it computes what a call computes."""
    problem, other = (full_problem(grid=grid, dim=64, device="cuda", dtype=torch.bfloat16, seed=s) for s in (0, 1))
    want = both_ways(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_ways(problem)  # what is set up at a first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both_ways(problem)
    for old, new in zip(
        (*op_args(problem)[:7], problem.grad_tokens, problem.grad_size),
        (*op_args(other)[:7], other.grad_tokens, other.grad_size),
        strict=True,
    ):
        old.copy_(new)
    graph.replay()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


FIRST_CALL = """
import torch
from support import full_problem
from test_cuda import both_ways
problems = [full_problem(grid=(side, side), dim=64, device="cuda", dtype=torch.bfloat16) for side in (14, 30)]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = [t for problem in problems for t in both_ways(problem)]
graph.replay()
want = [t for problem in problems for t in both_ways(problem)]
assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
"""


@on_a_gpu
def test_the_first_call_ever_can_be_captured():
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@on_a_gpu
def test_threads_with_different_shapes():
    """What one launch is allowed to take of shared memory, no other thread's launch changes."""
    problems = [full_problem(grid=(side, side), dim=64, device="cuda", dtype=torch.bfloat16) for side in (5, 9, 14, 20)]
    want = [both_ways(problem) for problem in problems]

    def work(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                got = both_ways(problems[index])
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(g, w) for g, w in zip(got, want[index], strict=True))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(problems)) as pool:
        assert all(pool.map(work, range(len(problems))))


@on_a_gpu
def test_runs_on_the_current_stream_and_waits_for_nothing():
    """Work queued before on the same stream is seen; the host is never made to wait."""
    problem = full_problem(grid=(14, 14), dim=64, device="cuda")
    want = both_ways(problem)
    torch.cuda.synchronize()
    stream, source = torch.cuda.Stream(), problem.x.clone()
    with torch.cuda.stream(stream):
        problem.x.zero_()
        torch.cuda._sleep(int(1e8))
        problem.x.copy_(source)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = both_ways(problem)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query(), "the host waited for the stream"
    stream.synchronize()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@on_a_gpu
def test_hostile_indices_stay_in_bounds():
    """Lists and matches on a GPU can't be checked by the host: whatever is in them, the context lives on."""
    problem = random_problem((5, 7), dim=16, device="cuda")
    args = op_args(problem)
    for bad in (-1, 10**6, 2**40, -(2**62)):
        a, b = (torch.full((n,), bad, device="cuda") for n in (18, 17))
        backends.forward_op("cuda")(*args[:7], a, b, 0, 0, *args[11:])
        forward = list(backends.forward_op("cuda")(*args))
        forward[2] = forward[3] = torch.full_like(forward[2], bad)
        backends.backward_op("cuda")(*backward_op_args(problem, tuple(forward)))
        match = torch.full((2, 18), bad, device="cuda")
        torch.ops.fpet.bdm_unmerge(problem.grad_tokens, match, None, None, 5, 7, 1)
        torch.ops.fpet.bdm_unmerge_backward(problem.x, match, None, None, 5, 7, 1)
        torch.cuda.synchronize()
    check(problem, "cuda")


@on_a_gpu
def test_a_tensor_elsewhere_is_an_error():
    problem = random_problem(device="cuda")
    for position in (0, 1):
        args = list(op_args(problem))
        args[position] = args[position].cpu()
        with pytest.raises(RuntimeError, match=r"(x: expected a CUDA tensor|key: expected a tensor on cuda:0)"):
            torch.ops.fpet.bdm_forward(*args)


@pytest.mark.gpu
@on_two_gpus
def test_the_device_of_the_tensors_is_used_not_the_current_one():
    problem = full_problem(device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(problem, "cuda")
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@on_two_gpus
def test_no_context_on_the_gpu_that_is_not_used():
    script = """
import torch
from support import full_problem
from test_cuda import both_ways
both_ways(full_problem(device="cuda:1"))
torch.cuda.synchronize(1)
assert not torch._C._cuda_hasPrimaryContext(0) and torch._C._cuda_hasPrimaryContext(1)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
