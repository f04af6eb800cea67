"""Building and installing: sdist, wheel, no compiler, switches, and where torch is looked for."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fpet_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
NO_COMPILER = "/nowhere/c++"
LEFT_BEHIND = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "_build_info.json", "results")

missing = [name for name in ("setuptools", "pip") if importlib.util.find_spec(name) is None]
missing += [name for name in ("cmake", "ninja") if shutil.which(name) is None and importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"building needs {', '.join(missing)}")


def run(*command: object, cwd: Path, ok: bool = True, **environment: str) -> str:
    """stdout and stderr of a command, run with none of the caller's build switches; CUDA kernels only on request."""
    switches = ("FPET_", "CXX", "CMAKE_", "PYTHONPATH", "CUDA", "TORCH_CUDA_ARCH_LIST")
    env = {k: v for k, v in os.environ.items() if not k.startswith(switches)} | {"FPET_CUDA": "0"} | environment
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def doctor(site: Path, cwd: Path) -> dict:
    """What ``python -m fpet_kernels --json`` says of the package installed in ``site``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FPET_")} | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-m", "fpet_kernels", "--json"], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert done.returncode == facts["status"]
    assert Path(facts["fpet_kernels"]["location"]) == site / "fpet_kernels"
    return facts


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, with nothing built and nothing hidden."""
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=LEFT_BEHIND))


@pytest.mark.alone
def test_sdist_builds_a_wheel_that_works(tree: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})", cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    packed = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    needed = {
        str(p.relative_to(tree))
        for folder in ("benchmarks", "csrc", "docs", "fpet_kernels", "python", "tests")
        for p in (tree / folder).rglob("*")
        if p.is_file()
    }
    needed |= {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "build_backend.py", "pyproject.toml", "setup.py"}
    assert needed <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc")) or name.startswith("build/")]

    # Debug compiles faster, and what is checked is the packaging; -v: pip shows nothing of a build that succeeds.
    fast = {"FPET_NATIVE": "1", "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug", "FPET_TORCH_DIR": str(TORCH)}
    run(
        sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, source,
        cwd=tmp_path, **fast,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    names = {p.name for p in (site / "fpet_kernels").iterdir()}
    assert {"libfpet_ops.so", "py.typed", "_build_info.json"} <= names
    assert not (site / "csrc").exists() and not (site / "build_backend.py").exists()
    assert re.search(r"-py3-none-linux_\w+\.whl", wheel.name), "tied to a Python"
    (metadata,) = site.glob("*.dist-info/METADATA")
    requirements = re.findall(r"^Requires-Dist: (\S+)(.*)$", metadata.read_text(), re.MULTILINE)
    assert [name for name, marker in requirements if "extra" not in marker] == ["torch>=2.10"]

    facts = doctor(site, tmp_path)
    assert facts["chosen"]["cpu"] == "cpu" and facts["backends"]["cpu"]["self_test"]["cpu"]["ok"]
    assert facts["build"]["recorded"]["native"] and facts["build"]["recorded"]["torch"] == torch.__version__
    assert facts["build"]["library"]["cpu_isa_in_use"] in facts["build"]["library"]["cpu_isas_compiled"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(NO_COMPILER, r"no C\+\+ compiler was found"), ("false", "cmake.* failed with status 1")],
    ids=["none", "broken"],
)
def test_install_without_a_compiler_succeeds_and_says_so(tree: Path, tmp_path: Path, compiler: str, reason: str) -> None:
    site = tmp_path / "site"
    said = run(
        sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", site, tree,
        cwd=tmp_path, CXX=compiler,
    )  # fmt: skip
    assert "the pure-PyTorch path" in said and re.search(reason, said)
    assert "py3-none-any.whl" in said
    assert not list(site.rglob("*.so"))
    facts = doctor(site, tmp_path)
    assert facts["chosen"]["cpu"] == "reference" and facts["status"] == 1
    assert re.search(reason, facts["build"]["recorded"]["reason"])
    assert not facts["backends"]["cpu"]["available"] and facts["backends"]["reference"]["self_test"]["cpu"]["ok"]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"FPET_NATIVE": "0", "FPET_CUDA": "1", "CUDACXX": "/nowhere/nvcc"}, "FPET_CUDA=1, .*no nvcc was found.*/nowhere/nvcc"),
        ({"FPET_CUDA": "yes"}, "FPET_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"FPET_NATIVE": "1", "CXX": NO_COMPILER}, "FPET_NATIVE=1, .* no C\\+\\+ compiler was found"),
        (
            {"FPET_NATIVE": "1", "FPET_TORCH_DIR": "/nowhere"},
            "FPET_TORCH_DIR: expected the folder of torch >= 2.10, got '/nowhere'",
        ),
    ],
    ids=["no nvcc", "bad switch", "no compiler", "no torch"],
)
def test_a_demand_that_cannot_be_met_fails_loudly(tree: Path, switches: dict[str, str], message: str) -> None:
    said = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, ok=False, **switches)
    assert re.search(message, said.splitlines()[-1])


def test_switching_native_code_off_removes_what_an_earlier_build_left(tree: Path) -> None:
    package = tree / "fpet_kernels"
    stale = [package / name for name in ("libfpet_ops.so", "libfpet_cuda_ops.so")]
    for path in stale:
        path.touch()
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, FPET_NATIVE="0", FPET_CUDA="auto")
    assert not any(path.exists() for path in stale)
    record = json.loads((package / "_build_info.json").read_text())
    assert "FPET_NATIVE=0" in record["reason"] and "FPET_NATIVE=0" in record["cuda"]["reason"]


def left_behind(tree: Path, name: str = "libfpet_ops.so", sources: str | None = None) -> Path:
    """What an earlier build of these sources, or of the ones given, left in a tree."""
    setup = "import sys; sys.argv[1:] = ['--version']; import setup; print(setup.fingerprint())"
    sources = sources or run(sys.executable, "-c", setup, cwd=tree).splitlines()[-1]
    facts = {"sources": sources, "compiler": "c++ of then", "torch": "2.10.0"}
    record = {"native": True, **facts, "cuda": {"built": True, **facts}}
    (tree / "fpet_kernels" / "_build_info.json").write_text(json.dumps(record))
    library = tree / "fpet_kernels" / name
    library.write_text("built earlier")
    return library


@pytest.mark.parametrize("record", ["whole", "damaged", "none"])
def test_a_build_that_fails_deletes_no_working_library(tree: Path, tmp_path: Path, record: str) -> None:
    """In the tree it stays; what is installed from the tree has it; both say so."""
    library = left_behind(tree)
    if record != "whole":
        (tree / "fpet_kernels" / "_build_info.json").write_text("{" if record == "damaged" else "[]")
    said = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, CXX="false")
    assert "libfpet_ops.so of an earlier build is kept, since this one failed: cmake" in said
    assert library.read_text() == "built earlier"
    run(sys.executable, "setup.py", "-q", "build", "--build-lib", tmp_path / "lib", cwd=tree, CXX=NO_COMPILER)
    assert (tmp_path / "lib" / "fpet_kernels" / "libfpet_ops.so").read_text() == "built earlier"
    facts = json.loads((tmp_path / "lib" / "fpet_kernels" / "_build_info.json").read_text())
    assert facts["native"] and "no C++ compiler was found" in facts["kept"]
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, ok=False, CXX=NO_COMPILER, FPET_NATIVE="1")
    assert library.exists()


def test_a_library_of_other_sources_goes_where_none_can_be_built(tree: Path) -> None:
    library = left_behind(tree, sources="others")
    said = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, CXX="false")
    assert "the native C++ library was NOT built" in said and not library.exists()
    record = json.loads((tree / "fpet_kernels" / "_build_info.json").read_text())
    assert record["failed"] and not record["native"]


def test_a_failed_build_is_told_at_import(tree: Path) -> None:
    """pip shows nothing of an install that succeeds; where no build was tried, nothing was expected and nothing is said."""
    for compiler, told in (("false", True), (NO_COMPILER, False)):
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, CXX=compiler)
        said = run(sys.executable, "-c", "import fpet_kernels", cwd=tree)
        assert ("UserWarning: the native library could not be built when fpet_kernels was installed: cmake" in said) == told, (
            said
        )


@pytest.mark.parametrize("moved", ["tree", "build folder"])
def test_a_built_checkout_that_was_moved_builds_again(tree: Path, moved: str) -> None:
    """CMake's cache names the folder it was made in, and refuses another."""
    fast = {
        "FPET_NATIVE": "1",
        "CMAKE_ARGS": "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=any -DCMAKE_CXX_FLAGS_RELEASE=-O0",
    }
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **fast)
    if moved == "tree":
        tree = tree.rename(tree.with_name("elsewhere"))
    else:
        (cache,) = (tree / "build").glob("*/CMakeCache.txt")
        cache.write_text(cache.read_text().replace(str(tree), "/elsewhere"))
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **fast)
    assert (tree / "fpet_kernels" / "libfpet_ops.so").stat().st_size > 100_000


def test_a_tree_that_can_not_be_written_to(tree: Path, tmp_path: Path) -> None:
    """A wheel is built from a copy, with the libraries of an earlier build where they can't be compiled; the tree stays as it is."""
    left_behind(tree)
    before = sorted(str(path) for path in tree.rglob("*"))
    code = (
        "import os, build_backend; real = os.access\n"  # root may write anywhere
        f"os.access = lambda path, mode: mode != os.W_OK or not str(path).startswith({str(tree)!r}) and real(path, mode)\n"
        f"print(build_backend.build_wheel({str(tmp_path)!r}), os.getcwd())"
    )
    said = run(sys.executable, "-B", "-c", code, cwd=tree, CXX=NO_COMPILER)
    assert said.splitlines()[-1].endswith(str(tree))
    with zipfile.ZipFile(*tmp_path.glob("*.whl")) as wheel:
        assert wheel.read("fpet_kernels/libfpet_ops.so") == b"built earlier"
    assert sorted(str(path) for path in tree.rglob("*")) == before


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_has_the_libraries(tree: Path, tmp_path: Path, mode: str) -> None:
    """In strict mode setuptools links every file by itself, and must be told of the libraries."""
    shutil.copy(backends.library_path(), left_behind(tree))
    site = tmp_path / "site"
    run(
        sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", site,
        "--config-settings", f"editable_mode={mode}", "-e", tree, cwd=tmp_path, CXX=NO_COMPILER,
    )  # fmt: skip
    code = f"import site; site.addsitedir({str(site)!r}); import fpet_kernels as f; print(f.__file__); print(f.explain())"
    said = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (str(tree / "build") in said.splitlines()[0]) == (mode == "strict"), said
    assert "native C++ kernels" in said, said


def fake_nvcc(folder: Path, version: str) -> str:
    """A compiler that has a version and can't compile."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n[ \"$1\" = --version ]\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("12.3.107", r"expected nvcc 12\.4 or later, got V12\.3\.107"), ("13.0.88", "cmake.* failed with status 1")],
    ids=["old", "broken"],
)
def test_cuda_that_cannot_be_compiled_leaves_the_rest_and_says_so(
    tree: Path, tmp_path: Path, version: str, reason: str
) -> None:
    """Unless it is demanded. A library of other sources goes."""
    left_behind(tree, "libfpet_cuda_ops.so", sources="others")
    with_cuda = str(tmp_path / "torch")  # a torch with CUDA, as far as a build can tell
    Path(with_cuda).mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '13.0'\n")
    switches = {"CUDACXX": fake_nvcc(tmp_path, version), "FPET_TORCH_DIR": with_cuda}
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    said = run(*build, cwd=tree, FPET_CUDA="auto", CXX="false", **switches)  # the CPU library fails at once, to be quick
    assert re.search(f"the library of CUDA kernels was NOT built. Reason: {reason}", said), said
    assert re.search(reason, json.loads((tree / "fpet_kernels" / "_build_info.json").read_text())["cuda"]["reason"])
    assert not (tree / "fpet_kernels" / "libfpet_cuda_ops.so").exists()
    said = run(*build, cwd=tree, ok=False, FPET_NATIVE="0", FPET_CUDA="1", CXX="false", **switches)
    assert re.search(f"FPET_CUDA=1, and it can't be built: {reason}", said)


def test_cuda_is_left_out_for_a_torch_without_it(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    switches = {"FPET_TORCH_DIR": str(tmp_path / "torch"), "CUDACXX": fake_nvcc(tmp_path, "13.0.88"), "CXX": "false"}
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, FPET_CUDA="auto", **switches)
    record = json.loads((tree / "fpet_kernels" / "_build_info.json").read_text())
    assert "torch 2.13.0+cpu is built without CUDA" in record["cuda"]["reason"]


@pytest.mark.alone
def test_a_library_in_use_is_replaced_not_overwritten(tree: Path, tmp_path: Path) -> None:
    """A process that has the old one mapped keeps it, whole: the new one is another file under the same name."""
    library = tree / "fpet_kernels" / "libfpet_ops.so"
    library.write_text("the old library")
    in_use = library.open()
    kept = tmp_path / "kept.so"
    os.link(library, kept)
    # One instruction set is enough here.
    fast = "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=any"
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, FPET_NATIVE="1", CMAKE_ARGS=fast)
    assert library.stat().st_size > 100_000 and not library.samefile(kept)
    assert kept.read_text() == in_use.read() == "the old library"
    assert not list(library.parent.glob(".*.new"))


CONSUMER = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(fpet REQUIRED CONFIG)
find_package(Threads REQUIRED)
add_executable(merge merge.cpp)
target_link_libraries(merge PRIVATE fpet::kernels Threads::Threads)
"""


@pytest.mark.alone
def test_a_program_finds_the_installed_kernels(tmp_path: Path) -> None:
    """find_package(fpet) from a prefix that was moved: headers, the library and its dependencies, nothing of this source tree."""
    record = json.loads(backends.library_path("_build_info.json").read_text()) if backends.library_path().exists() else {}
    folder = ROOT / record.get("folder", "-")
    if not (folder / "CMakeCache.txt").exists():
        pytest.skip("the native library was not compiled in this tree")
    run("cmake", "--install", folder, "--component", "cpp", "--prefix", tmp_path / "first", cwd=tmp_path)
    prefix = (tmp_path / "first").rename(tmp_path / "prefix")
    said = [path.read_text() for path in prefix.rglob("*.cmake")]
    assert said and not any(str(ROOT) in text for text in said)
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(CONSUMER)
    shutil.copy(ROOT / "csrc" / "examples" / "merge.cpp", consumer)
    run("cmake", "-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={prefix}", cwd=tmp_path)
    run("cmake", "--build", consumer / "build", cwd=tmp_path)
    assert "tokens" in run(consumer / "build" / "merge", cwd=tmp_path)


def ask_backend(expression: str, tmp_path: Path, setup: str = "", **environment: str) -> object:
    """Evaluates an expression over build_backend in an isolated build: like pip's, it hides site-packages and nothing else."""
    overlay = tmp_path / "overlay"
    overlay.mkdir(exist_ok=True)
    installed = Path(importlib.metadata.distribution("setuptools").locate_file(""))
    for path in (installed / "setuptools", *installed.glob("setuptools-*.dist-info")):
        if not (overlay / path.name).exists():
            (overlay / path.name).symlink_to(path)
    (tmp_path / "setup.py").write_text("from setuptools import setup; setup(packages=[])")
    code = (
        f"import sys; sys.path[:] = [{str(ROOT)!r}, {str(overlay)!r}] + [p for p in sys.path if not p.endswith('-packages')]\n"
        f"import build_backend; from pathlib import Path\n{setup}\nprint(repr({expression}))"
    )
    return ast.literal_eval(run(sys.executable, "-c", code, cwd=tmp_path, **environment).splitlines()[-1])


REQUIRES = "build_backend.get_requires_for_build_wheel() + build_backend.get_requires_for_build_editable()"


def test_an_isolated_build_finds_the_torch_of_the_environment(tmp_path: Path) -> None:
    assert ask_backend("str(build_backend.find_torch())", tmp_path) == str(TORCH)
    assert ask_backend(REQUIRES, tmp_path) == []


def test_torch_is_a_build_requirement_only_where_it_is_missing_and_of_use(tmp_path: Path) -> None:
    directory, compiler = tmp_path / "site" / "torch", tmp_path / "g++"
    compiler.touch(mode=0o755)
    nothing_else = f"build_backend._site_packages = lambda: iter([Path({str(directory.parent)!r})])"

    def required(**environment: str) -> object:
        return ask_backend(REQUIRES, tmp_path, nothing_else, **{"CXX": str(compiler), **environment})

    assert required() == ["torch>=2.10", "torch>=2.10"]
    assert required(FPET_NATIVE="0") == []
    assert required(CXX=NO_COMPILER) == []
    directory.mkdir(parents=True)
    (directory / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    assert required() == ["torch>=2.10", "torch>=2.10"]
    (directory / "version.py").write_text("__version__ = '2.10.0+cpu'\n")
    assert required() == []


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PATH"])
def test_the_torch_of_the_calling_environment_is_found(tmp_path: Path, variable: str) -> None:
    """Front ends that isolate in an environment of their own leave the caller's in these."""
    directory = tmp_path / "lib" / "python3.99" / "site-packages"
    directory.mkdir(parents=True)
    value = str(tmp_path / "bin") if variable == "PATH" else str(tmp_path)
    assert ask_backend(f"Path({str(directory)!r}) in build_backend._site_packages()", tmp_path, **{variable: value})


def test_find_compiler(tmp_path: Path) -> None:
    def found(**environment: str) -> object:
        return ask_backend("build_backend.find_compiler()", tmp_path, **{"PATH": str(tmp_path / "bin"), **environment})

    assert found() is None
    (tmp_path / "bin").mkdir()
    for name in ("clang++", "g++", "ccache"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    assert found() == ["g++"]
    assert found(CXX="ccache clang++") == ["ccache", "clang++"]
    assert found(CXX=NO_COMPILER) is None


def test_find_nvcc(tmp_path: Path) -> None:
    def found(**environment: str) -> object:
        # Not the one that may be in /usr/local/cuda here.
        hidden = "which = build_backend.shutil.which\nbuild_backend.shutil.which = lambda name: None if 'local' in name else which(name)"
        return ask_backend("build_backend.find_nvcc()", tmp_path, hidden, **{"PATH": str(tmp_path / "path"), **environment})

    assert found() is None
    for folder in ("path", "home/bin"):
        (tmp_path / folder).mkdir(parents=True)
    in_home, on_path = tmp_path / "home" / "bin" / "nvcc", tmp_path / "path" / "nvcc"
    in_home.touch(mode=0o755)
    assert found() is None
    assert found(CUDA_HOME=str(tmp_path / "home")) == found(CUDACXX=str(in_home)) == str(in_home)
    on_path.touch(mode=0o755)
    assert found(CUDA_HOME=str(tmp_path / "home")) == str(on_path)
    assert found(CUDACXX="/nowhere/nvcc") is None
