"""The operators inside PyTorch: opcheck, compile, export, autocast, torch.func, DDP, FLOP counts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fpet_kernels import KeyRefinement, Split, bdm_merge, bdm_unmerge, checkerboard
from support import LEAVES, Problem, backward_op_args, full_problem, merge, op_args, random_problem, run

DEVICE_KERNELS = pytest.mark.parametrize("listed", [False, True], ids=["grid", "lists"])


class Block(nn.Module):
    """Tokens and keys projected from the input, a learned refinement, merging, something after it, and unmerging."""

    def __init__(
        self,
        grid: tuple[int, int] = (4, 5),
        dim: int = 8,
        heads: int = 2,
        backend: str | None = None,
        split: Split | None = None,
        detach_key: bool = True,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.w_down, self.w_up = nn.Parameter(torch.randn(3, dim // heads)), nn.Parameter(torch.randn(dim // heads, 3))
        self.grid, self.heads, self.backend, self.split, self.detach_key = grid, heads, backend, split, detach_key

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, n, dim = x.shape
        _, key, value = self.qkv(x).view(batch, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind()
        x = x + value.transpose(1, 2).reshape(batch, n, dim)
        where = {"grid_size": self.grid} if self.split is None else {"split": self.split}
        refinement = KeyRefinement(self.w_down, self.w_up, 0.5)
        tokens, size, match = bdm_merge(
            x, key, **where, refinement=refinement, detach_key=self.detach_key, backend=self.backend
        )
        return bdm_unmerge(tokens + self.mlp(tokens), match, **where), size


def loss(model: nn.Module, x: Tensor) -> Tensor:
    out, size = model(x)
    return out.square().sum() + size.log().sum()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    loss(model, x).backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def small(device: str, **options) -> Problem:
    return full_problem(**{**dict(grid=(2, 3), dim=4, channels=3, heads=2, hidden=2, device=device), **options})


@DEVICE_KERNELS
def test_opcheck_of_merge(listed, device):
    """Schema, aliasing, fake tensors, static and symbolic shapes, of every operator as registered for this device."""
    for problem in (
        small(device),
        random_problem((2, 3), dim=4, channels=3, device=device),
        small(device, dtype=torch.bfloat16, heads=0, mask=False, similarity="dot"),
    ):
        problem = replace(problem, grid_size=None) if listed else problem
        torch.library.opcheck(torch.ops.fpet.bdm_forward.default, op_args(problem))
        outputs = torch.ops.fpet.bdm_forward(*op_args(problem))
        weights = problem.w_down is not None
        for needs in (
            (True, True, weights, True, True),
            (True, False, False, False, False),
            (False, False, weights, False, False),
        ):
            torch.library.opcheck(torch.ops.fpet.bdm_backward.default, backward_op_args(problem, outputs, needs))
        absent = replace(problem, grad_size=None)
        torch.library.opcheck(
            torch.ops.fpet.bdm_backward.default, backward_op_args(absent, outputs, (True, True, False, True, True))
        )


@DEVICE_KERNELS
def test_opcheck_of_unmerge(listed, device):
    a, b = checkerboard(2, 3).on(torch.device(device))
    split = (a, b, 0, 0) if listed else (None, None, 2, 3)
    match = torch.tensor([[1, 3, 2], [2, 2, 2]], device=device)
    torch.library.opcheck(torch.ops.fpet.bdm_unmerge.default, (torch.randn(2, 4, 5, device=device), match, *split, 1))
    torch.library.opcheck(torch.ops.fpet.bdm_unmerge_backward.default, (torch.randn(2, 7, 5, device=device), match, *split, 1))


@pytest.mark.parametrize("wide", [False, True])
def test_opcheck_of_average_heads(wide, device):
    for dtype in (torch.float32, torch.bfloat16):
        key = torch.randn(2, 5, 3, 4, device=device, dtype=dtype).transpose(1, 2)  # (B, heads, N, C), a view
        torch.library.opcheck(torch.ops.fpet.average_heads.default, (key, wide))
        mean = torch.ops.fpet.average_heads(key, wide)
        assert mean.dtype == (torch.float64 if wide else torch.float32)
        torch.testing.assert_close(mean, key.double().mean(1).to(mean.dtype))


def test_every_operator_is_checked():
    """A new operator in the namespace needs its opcheck above."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fpet::")}
    triton = {"fpet::bdm_forward_triton", "fpet::bdm_backward_triton"}  # registered once something has called them
    assert names - triton == {
        "fpet::average_heads", "fpet::bdm_forward", "fpet::bdm_backward", "fpet::bdm_unmerge", "fpet::bdm_unmerge_backward",
        "fpet::merge", "fpet::merge_backward", "fpet::unmerge", "fpet::unmerge_backward",
    }  # fmt: skip


@pytest.mark.parametrize("listed", [False, True], ids=["grid", "split, attached key"])
def test_compile(listed, backend, device, max_tokens):
    """One graph, no break, the gradients of eager mode; batch sizes after the first without another compilation."""
    if max_tokens < 100:
        pytest.skip("an interpreted kernel can't be compiled")
    split = Split(20, *checkerboard(4, 5).on(torch.device("cpu"))) if listed else None
    model = Block(backend=backend, split=split, detach_key=not listed).to(device)
    x = torch.randn(3, 21, 8, device=device)
    want = gradients(model, x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 2, 6):
        inputs = torch.cat((x, x))[:batch]
        for got, expected in zip(gradients(compiled, inputs), gradients(model, inputs), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for three batch sizes"
    torch._dynamo.reset()
    static = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, expected in zip(gradients(static, x), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_inductor(device):
    """The compiler that users get."""
    torch._dynamo.reset()
    model = Block().to(device)
    x = torch.randn(3, 21, 8, device=device)
    for got, expected in zip(gradients(torch.compile(model, fullgraph=True), x), gradients(model, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(strict, dynamic, backend, device, max_tokens):
    if max_tokens < 100:
        pytest.skip("an interpreted kernel can't be exported")
    model = Block(backend=backend).to(device).eval()
    x = torch.randn(3, 21, 8, device=device)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=512)}} if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    for inputs in (x, torch.cat((x, x))) if dynamic else (x,):
        for got, expected in zip(program.module()(inputs), model(inputs), strict=True):
            torch.testing.assert_close(got, expected)


def test_exported_program_survives_a_file(tmp_path, device):
    """Saved, loaded in a process that has only imported fpet_kernels, and run."""
    model = Block().to(device).eval()
    x = torch.randn(2, 21, 8, device=device)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save((x, model(x)), tmp_path / "data.pt")
    script = """
import sys, torch, fpet_kernels
x, want = torch.load(sys.argv[2])
for got, expected in zip(torch.export.load(sys.argv[1]).module()(x), want):
    torch.testing.assert_close(got, expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt2", tmp_path / "data.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_changes_nothing_inside(dtype, backend, device):
    """The operator takes what it is given and computes in float32, whatever autocast says."""
    problem = full_problem(grid=(6, 7), size=True, device=device)
    problem.key, problem.key_delta = problem.key.to(dtype), problem.key_delta.to(dtype)
    want = run(problem, backend)
    got = run(problem, backend, around_forward=lambda: torch.autocast(device, dtype=dtype))
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    if backend != "reference":  # whose backward is autograd's, and follows autocast if it is called under it
        with torch.autocast(device, dtype=dtype):
            got = run(problem, backend)
        for name, value in want.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def test_autocast_of_a_block(device):
    """A float32 residual stream and a bfloat16 key, as a model under autocast makes them; sizes stay float32."""
    model, x = Block().to(device), torch.randn(2, 21, 8, device=device)
    seen = {}
    hook = model.mlp.register_forward_pre_hook(lambda _, args: seen.update(dtype=args[0].dtype))
    with torch.autocast(device, dtype=torch.bfloat16):
        _, size = model(x)
        loss(model, x).backward()
    hook.remove()
    assert seen["dtype"] == torch.float32 and size.dtype == torch.float32
    assert model.w_down.grad.dtype == torch.float32 and model.w_down.grad.isfinite().all()
    assert torch.equal(size.sum((1, 2)), torch.full((2,), 21.0, device=device))


def test_functional_call(backend, device):
    model, x = Block(backend=backend).to(device), torch.randn(2, 21, 8, device=device)
    state = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    out, size = torch.func.functional_call(model, state, (x,))
    model.load_state_dict(state)
    want, want_size = model(x)
    torch.testing.assert_close((out, size), (want, want_size), rtol=0, atol=0)


def test_func_grad(backend, device):
    """torch.func.grad and value_and_grad over parameters, as meta-learning and influence functions use them."""
    model, x = Block(backend=backend).to(device), torch.randn(2, 21, 8, device=device)
    state = {name: p.detach() for name, p in model.named_parameters()}

    def objective(state: dict[str, Tensor], x: Tensor) -> Tensor:
        out, size = torch.func.functional_call(model, state, (x,))
        return out.square().sum() + size.log().sum()

    grads, value = torch.func.grad_and_value(objective)(state, x)
    grad_x = torch.func.grad(objective, argnums=1)(state, x)
    torch.testing.assert_close(value, loss(model, x).detach())
    leaf = x.clone().requires_grad_()
    loss(model, leaf).backward()
    torch.testing.assert_close(grad_x, leaf.grad)
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grads[name], want, msg=lambda m, n=name: f"{n}: {m}")


def test_func_grad_of_an_attached_key(backend, device):
    """Differentiated by torch.func while weights require gradients of their own, outside the transform."""
    problem = full_problem(dtype=torch.float64, device=device)
    weights = {name: getattr(problem, name).requires_grad_() for name in ("w_down", "w_up")}

    def objective(key: Tensor) -> Tensor:
        tokens, size, _ = merge(replace(problem, key=key, **weights), backend)
        return (tokens * problem.grad_tokens).sum() + (size * problem.grad_size).sum()

    torch.testing.assert_close(torch.func.grad(objective)(problem.key), run(problem, backend, ("key",))["grad_key"])


def test_checkpointing(backend, device):
    """Recomputation in the backward, with tokens and sizes travelling as values."""
    from torch.utils.checkpoint import checkpoint

    problem = full_problem(dtype=torch.float64, device=device)
    want = run(problem, backend)
    leaves = [getattr(problem, n).detach().requires_grad_() for n in LEAVES]

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(merge(replace(problem, **dict(zip(LEAVES, values, strict=True))), backend))

    for reentrant in (False, True):
        tokens, size, _ = checkpoint(forward, *leaves, use_reentrant=reentrant)
        grads = torch.autograd.grad if not reentrant else None
        if grads:
            found = grads((tokens, size), leaves, (problem.grad_tokens, problem.grad_size))
        else:
            torch.autograd.backward((tokens, size), (problem.grad_tokens, problem.grad_size))
            found = [leaf.grad for leaf in leaves]
        for name, grad in zip(LEAVES, found, strict=True):
            assert torch.equal(grad, want[f"grad_{name}"]), name


def test_meta_tensors():
    """Shapes and dtypes without data, as fake tensors and meta models ask for them."""
    for dtype in (torch.float64, torch.bfloat16):
        problem = full_problem(dtype=dtype)
        meta = problem.map(lambda t: t.to("meta"))
        for got, want in zip(
            torch.ops.fpet.bdm_forward(*op_args(meta)), torch.ops.fpet.bdm_forward(*op_args(problem)), strict=True
        ):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_flops(device):
    """Multiply and add count as two. B = 2 images of 4 × 5 patches and a class token, D = 12, C = 8, h = 6, two heads."""
    problem = full_problem(device=device)
    pairs, linear = 2 * 2 * 10 * 10, 2 * 2 * 20 * 8 * 6
    with FlopCounterMode(display=False) as counter:
        outputs = torch.ops.fpet.bdm_forward(*op_args(problem))
    assert counter.get_total_flops() == pairs * 8 + 2 * linear
    for needs, expected in (
        ((True, True, False, False, False), 0),  # a gather
        ((False, False, False, True, False), pairs * (12 + 3 * 8) + 2 * linear),
        ((False, False, True, False, False), pairs * (12 + 3 * 8) + 5 * linear),
        ((True, True, True, True, True), pairs * (12 + 3 * 8) + 6 * linear),
    ):
        with FlopCounterMode(display=False) as counter:
            torch.ops.fpet.bdm_backward(*backward_op_args(problem, outputs, needs))
        assert counter.get_total_flops() == expected, needs
    plain = random_problem(device=device)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fpet.bdm_forward(*op_args(replace(plain, grid_size=None)))
    assert counter.get_total_flops() == pairs * 8


def test_flops_of_a_model(fused, device, max_tokens):
    """What a counter around forward and backward of the public function sees."""
    if max_tokens < 100:
        pytest.skip("the interpreter runs PyTorch operators of its own")
    problem = full_problem(device=device)
    with FlopCounterMode(display=False) as counter:
        run(problem, fused)
    pairs, linear = 2 * 2 * 10 * 10, 2 * 2 * 20 * 8 * 6  # as above: forward, then backward with every gradient
    assert counter.get_total_flops() == pairs * 8 + 2 * linear + pairs * (12 + 3 * 8) + 6 * linear


DDP = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from test_compile import Block, loss

rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x = torch.randn(4, 21, 8, generator=torch.Generator().manual_seed(3))
whole = Block(backend=backend)
loss(whole, x).backward()
model = DistributedDataParallel(Block(backend=backend), find_unused_parameters=False)
for _ in range(2):  # a second step meets the reducer's rebuilt buckets
    model.zero_grad()
    loss(model, x[rank::2]).backward()
for (name, got), want in zip(model.module.named_parameters(), whole.parameters()):
    torch.testing.assert_close(got.grad, want.grad / 2, msg=lambda m: name + ": " + m)  # DDP averages over ranks
dist.destroy_process_group()
os._exit(0)  # a thread of gloo's that outlives the interpreter would abort the process
"""


@pytest.mark.alone
def test_ddp(backend, device, max_tokens, tmp_path):
    """Two processes over gloo: the gradients of half the batch each, averaged, are half those of the whole."""
    if device != "cpu" or max_tokens < 100:
        pytest.skip("two processes on CPU kernels")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path / "store"), backend], cwd=Path(__file__).parent,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        ) for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output


def test_threads_call_at_once(fused, device):
    """Several Python threads in the operator at the same time, as a data-parallel server has them."""
    from concurrent.futures import ThreadPoolExecutor

    problems = [full_problem(grid=(6, 7), seed=seed, device=device) for seed in range(8)]
    want = [run(p, fused) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda p: run(p, fused), problems * 4), want * 4, strict=True):
            for name, value in expected.items():
                assert torch.equal(got[name], value), name
