"""Programs recorded from the operators: exported and trained, traced to TorchScript, compiled ahead of time, run without this package."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fpet_kernels import (
    Split,
    alternating,
    backends,
    bdm_merge,
    bdm_unmerge,
    checkerboard,
    checkerboard_3d,
    ops,
    second_checkerboard,
)
from test_compile import Block, gradients

native = pytest.mark.skipif(not backends.status("cpu").available, reason="there is no native library here")


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("detach_key", [True, False], ids=["detached", "attached"])
def test_an_exported_program_trains(detach_key, strict, backend, device, max_tokens):
    """Every gradient of the module it was exported from, before and after a file; batches of other sizes too."""
    if max_tokens < 100:
        pytest.skip("an interpreted kernel can't be exported")
    model, x = Block(backend=backend, detach_key=detach_key).to(device), torch.randn(3, 21, 8, device=device)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        for inputs in (x, torch.cat((x, x))):
            for (name, _), got, want in zip(
                [("x", x), *model.named_parameters()], gradients(exported, inputs), gradients(model, inputs), strict=True
            ):
                torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


def test_what_a_compiler_gets(device):
    """One operator with its derivative in a program to train, the plain operators below autograd in one to run."""
    program = torch.export.export(Block().to(device), (torch.randn(3, 21, 8, device=device),))

    def called(program: torch.export.ExportedProgram) -> set[str]:
        return {str(node.target) for node in program.graph.nodes if "fpet" in str(node.target)}

    if backends.select(torch.ones(1, device=device), None) in ("cpu", "cuda"):
        assert called(program) == {"fpet.merge.default", "fpet.unmerge.default"}
        with torch.no_grad():
            assert called(program.run_decompositions()) == {"fpet.bdm_forward.default", "fpet.bdm_unmerge.default"}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_trace(grad, backend, device, max_tokens):
    """torch.jit.trace of merging and unmerging, saved and loaded: batches of other sizes, and gradients."""
    if max_tokens < 100:
        pytest.skip("tracing into the interpreter")
    model, x = Block(backend=backend).to(device), torch.randn(3, 21, 8, device=device)
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for inputs in (x, torch.cat((x, x))) if backend != "reference" else (x,):
        torch.testing.assert_close(traced(inputs), model(inputs))
        for got, want in zip(gradients(traced, inputs), gradients(model, inputs), strict=True):
            torch.testing.assert_close(got, want)


WITHOUT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, want = torch.load(sys.argv[2])
kind, path = sys.argv[3:]
run = torch.jit.load(path) if kind == "traced" else torch._inductor.aoti_load_package(path)
for got, expected in zip(run(x), want):
    torch.testing.assert_close(got, expected)
assert not [name for name in sys.modules if name.startswith("fpet")]
"""


@native
@pytest.mark.parametrize("kind", ["traced", "compiled ahead of time"])
def test_runs_without_this_package(kind, tmp_path):
    """A process that has loaded the native library alone, as a C++ program does, finds schemas and kernels."""
    model, x = Block().eval(), torch.randn(3, 21, 8)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "data.pt")
        if kind == "traced":
            path = tmp_path / "model.pt"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.save(torch.jit.trace(model, (x,)), path)
        else:
            path = torch._inductor.aoti_compile_and_package(
                torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
            )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, backends.library_path(), tmp_path / "data.pt", kind, path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


@native
def test_both_languages_define_the_same_schemas():
    """csrc/bindings/arguments.h and fpet_kernels/ops.py; tags too."""
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); assert 'fpet_kernels' not in sys.modules\n"
        "print(*sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith('fpet::')), sep='\\n')\n"
        "print(torch.ops.fpet.merge.default.tags)"
    )
    done = subprocess.run([sys.executable, "-c", script, backends.library_path()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *schemas, tags = done.stdout.splitlines()
    assert schemas == sorted(str(torch._C.parse_schema(f"fpet::{name}{schema}")) for name, schema in ops.SCHEMAS.items())
    assert "pt2_compliant_tag" in tags or torch.__version__ < "2.12"


# --- splits ----------------------------------------------------------------------------------------------------------

EVEN, ODD = list(range(0, 20, 2)), list(range(1, 20, 2))
MAKERS = {
    "alternating": lambda: alternating(20),
    "checkerboard": lambda: checkerboard(4, 5),
    "second": lambda: second_checkerboard(8, 5),
    "3d": lambda: checkerboard_3d(1, 4, 5),
    "lists": lambda: Split(20, EVEN, ODD),
}


def there_and_back(x: Tensor, split: Split, backend: str | None = None) -> Tensor:
    merged = bdm_merge(x, x, split=split, backend=backend)
    return bdm_unmerge(merged.tokens, merged.match, split=split, backend="reference" if backend == "reference" else None)


@pytest.mark.parametrize("name", MAKERS)
def test_a_split_made_while_compiling(name):
    """In one graph, as a constant."""
    torch._dynamo.reset()
    x = torch.randn(2, 21, 8)
    f = torch.compile(lambda x: there_and_back(x, MAKERS[name]()), backend="aot_eager", fullgraph=True)
    assert torch.equal(f(x), there_and_back(x, MAKERS[name]()))


def test_a_split_of_a_length_that_changes():
    torch._dynamo.reset()
    f = torch.compile(lambda x: there_and_back(x, alternating(x.shape[1] - 1)), backend="aot_eager", fullgraph=True)
    for n in (21, 31, 41):
        x = torch.randn(2, n, 8)
        assert torch.equal(f(x), there_and_back(x, alternating(n - 1)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["alternating", "lists"])
def test_a_split_under_make_fx(name, mode, backend, device, max_tokens):
    if max_tokens < 100:
        pytest.skip("an interpreted kernel can't be traced")
    x, split = torch.randn(2, 21, 8), MAKERS[name]()
    graph = make_fx(lambda x: there_and_back(x, split, backend), tracing_mode=mode)(x)
    other = torch.randn(2, 21, 8)
    assert torch.equal(graph(other), there_and_back(other, split, backend))


@pytest.mark.parametrize("name", MAKERS)
def test_a_split_among_fake_tensors(name, backend, device):
    """Inside their mode, outside it, on a device that is not here; and what was cached stays real."""
    split = MAKERS[name]()
    with FakeTensorMode() as mode:
        assert there_and_back(torch.empty(2, 21, 8), split, backend).shape == (2, 21, 8)
        assert there_and_back(torch.empty(2, 21, 8, device="cuda"), split, "reference").device.type == "cuda"
        assert there_and_back(torch.empty(2, 21, 8), MAKERS[name](), backend).shape == (2, 21, 8)
    if backend != "reference":
        assert there_and_back(mode.from_tensor(torch.empty(2, 21, 8)), split, backend).shape == (2, 21, 8)
    assert type(split.a) is Tensor and all(type(t) is Tensor for t in split.on(torch.device("cpu"))) and not split._by_device


class Net(nn.Module):
    """A split as an attribute of a module that is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.last = alternating(20), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(there_and_back(x, self.split)), x


def test_a_split_in_an_exported_program():
    model, x = Net(), torch.randn(2, 21, 8)
    program = torch.export.export(model, (x,)).module()
    for got, want in zip(gradients(program, x), gradients(model, x), strict=True):
        torch.testing.assert_close(got, want)
