"""Writes the layout that the package ``kernels`` loads (get_kernel, get_local_kernel): ``make hub``.

One folder per build variant: the C++ kernels for the CPU under torch's stable ABI; and, without native code, the same package
for GPUs, where it runs in Triton, and for other CPUs. The operators get a namespace made of the sources' hash, so that two
versions, or one of them and an installed fpet_kernels, can live in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fpet_kernels"
ABI = "torch-stable-abi210"
NOARCH = {"torch-cuda": "cuda", "torch-rocm": "rocm", "torch-cpu": "cpu"}
# Where Python names the namespace.
NAMES = re.compile(r"(?<=torch\.ops\.)fpet\b|(?<=[\"'`])fpet(?=::)|(?<=Library\([\"'])fpet\b")


def namespace(version: str) -> str:
    """Of these very sources: letters, digits, underscores."""
    digest = hashlib.sha256()
    for path in sorted((*PACKAGE.rglob("*.py"), *(p for p in (ROOT / "csrc").rglob("*") if p.is_file()))):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"fpet_{re.sub(r'[^0-9]+', '_', version)}_{digest.hexdigest()[:8]}"


def native_library(operators: str) -> Path:
    """The CPU library of this tree linked under another namespace, in the folder where it was compiled."""
    record = json.loads((PACKAGE / "_build_info.json").read_text())
    if not record.get("native"):
        raise SystemExit(f"hub: expected a native library in this tree: make setup; {record.get('reason')}")
    folder = ROOT / record["folder"]
    for command in ((f"-DFPET_NAMESPACE={operators}", str(folder)), ("--build", str(folder), "--target", "fpet_hub_ops")):
        subprocess.run(("cmake", *command), check=True, stdout=subprocess.DEVNULL)
    return folder / "libfpet_hub_ops.so"


def write(folder: Path, operators: str, backend: str, library: Path | None) -> None:
    """One variant: the package with its operators renamed, the library, metadata."""
    for path in sorted((*PACKAGE.rglob("*.py"), PACKAGE / "py.typed")):
        target = folder / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(NAMES.sub(operators, path.read_text(encoding="utf-8")), encoding="utf-8")
    if library is not None:
        shutil.copy2(library, folder / "libfpet_ops.so")
        shutil.copy2(PACKAGE / "_build_info.json", folder)
    metadata = {
        "id": f"{operators}_{backend}" + ("" if library is None else "_native"), "name": "fpet-kernels", "version": 1,
        "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="folder to write; default build/hub")
    options = parser.parse_args(argv)
    version = re.search(r'"(.+)"', (PACKAGE / "version.py").read_text())
    assert version is not None
    operators = namespace(version[1])
    library = native_library(operators)
    build = options.out / "build"
    shutil.rmtree(build, ignore_errors=True)
    machine = platform.machine().lower()
    write(build / f"{ABI}-cpu-{machine}-{platform.system().lower()}", operators, "cpu", library)
    for variant, backend in NOARCH.items():
        write(build / variant, operators, backend, None)
    for variant in sorted(build.iterdir()):
        size = sum(p.stat().st_size for p in variant.rglob("*") if p.is_file())
        print(f"{size / 1e6:7.2f} MB  {variant.relative_to(options.out)}")
    print(f"operators: torch.ops.{operators}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
