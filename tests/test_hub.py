"""The layout for the Hub: variants that ``kernels`` chooses and loads, operators under a name of their own, the results the same."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpet_kernels import native

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {f"torch-stable-abi210-cpu-{platform.machine().lower()}-linux", "torch-cpu", "torch-cuda", "torch-rocm"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "tools" / "hub.py").is_file()
    or not (ROOT / native.build_record().get("folder", "-")).is_dir()
    or shutil.which("cmake") is None,
    reason="no source tree with a compiled library, or no cmake",
)

BY_KERNELS = """
from kernels import get_local_kernel
hub = get_local_kernel(Path(sys.argv[1]), backend="cpu", trust_remote_code=True)
"""
BY_HAND = """
spec = importlib.util.spec_from_file_location("fpet_of_the_hub", Path(sys.argv[1]) / "build" / sys.argv[2] / "__init__.py")
hub = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = hub
spec.loader.exec_module(hub)
"""
USE = """
alone = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fpet::")]
import fpet_kernels
inputs = torch.randn(2, 17, 8, requires_grad=True), torch.randn(2, 17, 4)
results = []
for package in (hub, fpet_kernels):
    tokens, size, match = package.bdm_merge(*inputs, grid_size=(4, 4))
    results.append((tokens, size, match, *torch.autograd.grad(tokens.square().sum(), inputs[0])))
same = all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(*results)) and torch.equal(results[0][2], results[1][2])
compiled = torch.compile(lambda x, key: hub.bdm_merge(x, key, grid_size=(4, 4)).tokens, fullgraph=True, backend="aot_eager")
backends = sys.modules[f"{hub.__name__}.backends"]
print(json.dumps({
    "alone": alone, "same": same, "compiled": torch.equal(compiled(*inputs), results[0][0]), "file": hub.__file__,
    "cpu": backends.status("cpu").available, "namespaces": sorted({n.split("::")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fpet")}),
}))
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "tools" / "hub.py", "--out", out], check=True, capture_output=True, text=True)
    return out


def loaded(how: str, *arguments: object) -> dict:
    code = "import importlib.util, json, sys, torch\nfrom pathlib import Path\n" + how + USE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.alone
def test_every_variant_has_its_own_operators(layout: Path) -> None:
    assert {path.name for path in (layout / "build").iterdir()} == VARIANTS
    for variant in VARIANTS:
        facts = json.loads((layout / "build" / variant / "metadata.json").read_text())
        assert re.fullmatch(r"[a-z]+", facts["backend"]["type"]) and facts["name"] == "fpet-kernels"
        text = "".join(path.read_text() for path in (layout / "build" / variant).rglob("*.py"))
        assert not re.search(r"torch\.ops\.fpet\b|[\"']fpet::|Library\([\"']fpet[\"']", text)
    for variant in sorted(name for name in VARIANTS if "cpu" in name):
        found = loaded(BY_HAND, layout, variant)
        assert found["alone"] == [] and found["same"] and found["compiled"], found
        assert len(found["namespaces"]) == 2 and found["cpu"] == variant.startswith("torch-stable-abi"), found


@pytest.mark.alone
@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="the package kernels is not installed")
def test_kernels_loads_the_native_variant(layout: Path) -> None:
    found = loaded(BY_KERNELS, layout)
    assert found["alone"] == [] and found["same"] and found["cpu"], found
    assert "torch-stable-abi210" in found["file"]
