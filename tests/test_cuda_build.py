"""What nvcc made of the CUDA kernels, for every architecture in the library and without a GPU: registers, spills, shared memory,
matrix instructions and 16-byte loads in the machine code, as cuobjdump prints it.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fpet_kernels import backends

LIBRARY = backends.library_path("libfpet_cuda_ops.so")
ROOT = Path(__file__).resolve().parents[1]

# Bytes of shared memory that a block can ask for (CUDA C++ programming guide, technical specifications by compute capability).
SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10, 121: 99 << 10}  # fmt: skip

# A kernel that matches or differentiates scores of 16-bit keys, and one that only moves rows.
MATRIX = re.compile(r"merge_short<|match_tiles|pair_tiles<|image_gradient")
VECTORS = re.compile(
    r"merge_short<|match_tiles|merge_lists<|pair_tiles<|prepare_keys<|spread<|key_gradient<|average_heads<|image_gradient"
)
# Kernels that short grids go through, the tiled ones where keys are wide or scores float64: everything is kept in registers. Not
# merge_lists, of long grids and of unmerge's gradient: in float32 an address is set aside on some architectures.
SHORT = {
    "merge_short", "image_gradient", "spread", "sum_weights", "prepare_keys", "match_wide", "pair_tiles", "pair_wide", "key_gradient",
    "average_heads", "copy_rows",
}  # fmt: skip
# Where a multiprocessor has less memory than the listed launch takes, the launcher takes one stage of so many bytes less.
STAGE = {"pair_tiles": 24 << 10}


@dataclass
class Code:
    """One kernel for one architecture."""

    instructions: collections.Counter = field(default_factory=collections.Counter)
    registers: int = 0
    stack: int = 0
    shared: int = 0

    def count(self, *prefixes: str, having: str = "") -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes) and having in name)


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(location) / "backends/nvidia/bin" for location in (spec.submodule_search_locations or ())] if spec else []
    return shutil.which(
        "cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, folders)])
    )


def loudly_skip(why: str) -> None:
    warnings.warn(f"NOT CHECKED: the machine code of the CUDA kernels: {why}", stacklevel=2)
    pytest.skip(why)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    if not LIBRARY.exists():
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if nvcc and backends._CUDA.reason != "FPET_DISABLE_NATIVE is set" and backends.torch.version.cuda:
            pytest.fail(f"{nvcc} is here, but {LIBRARY.name} is not: build it (make setup, or setup.py build_ext --inplace)")
        loudly_skip(f"{backends._CUDA.reason}; nvcc: {nvcc or 'none'}")
    found = find_cuobjdump()
    if found is None:
        loudly_skip("neither the CUDA toolkit's cuobjdump nor Triton's package is here")
    return str(found)


def demangled(names: list[str]) -> dict[str, str]:
    """Readable names where c++filt is (with g++, always): merge_short<bf16, false, 2>."""
    if not shutil.which("c++filt"):
        pytest.fail("c++filt is missing, which comes with every C++ compiler")
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    clean = (
        re.sub(r"\(anonymous namespace\)::|fpet::cuda::|^void ", "", line).partition("(")[0]
        for line in done.stdout.splitlines()
    )
    return dict(zip(names, clean, strict=True))


@pytest.fixture(scope="module")
def code(cuobjdump: str) -> dict[tuple[str, str], Code]:
    """(architecture, kernel) -> its code."""
    found: dict[tuple[str, str], Code] = collections.defaultdict(Code)
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    usage = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    for option in ("-sass", "-res-usage"):
        arch = name = ""
        with subprocess.Popen([cuobjdump, option, LIBRARY], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if m := instruction.match(line):
                    found[arch, name].instructions[m[1]] += 1
                elif m := re.match(r"arch = (\w+)", line):
                    arch = m[1]
                elif m := re.match(r"\s*Function :? ?([\w.$]+)", line):
                    name = m[1]
                elif name and (m := usage.search(line)):
                    code = found[arch, name]
                    code.registers, code.stack, code.shared = map(int, m.groups())
        assert process.returncode == 0, f"{cuobjdump} {option} failed"
    names = demangled(sorted({name for _, name in found}))
    kernels = {(arch, names[name]): code for (arch, name), code in found.items() if code.registers}
    assert kernels, f"{cuobjdump} found no kernels in {LIBRARY}"
    return kernels


def built_for() -> tuple[set[str], set[str]]:
    """Architectures of machine code, and of PTX, that the build recorded: names as cuobjdump's."""
    real, virtual = set(), set()
    for target in backends._ask_cuda("fpet_cuda_build")["architectures"].split():
        number, _, kind = target.partition("-")
        real |= {f"sm_{number}"} if kind != "virtual" else set()
        virtual |= {f"sm_{number}"} if kind != "real" else set()
    return real, virtual


def listed(kind: str, cuobjdump: str) -> set[str]:
    done = subprocess.run([cuobjdump, kind, LIBRARY], capture_output=True, text=True, check=True)
    return set(re.findall(r"\.(sm_\w+)\.\w+$", done.stdout, re.MULTILINE))


def test_architectures(cuobjdump, code):
    """What the library says it was compiled for is in it, with every kernel for each."""
    real, virtual = built_for()
    assert listed("-lelf", cuobjdump) == real
    assert listed("-lptx", cuobjdump) == virtual
    by_arch = collections.defaultdict(set)
    for arch, name in code:
        by_arch[arch].add(name)
    assert set(by_arch) == real
    assert len(set(map(frozenset, by_arch.values()))) == 1, "some architecture lacks a kernel"


def test_every_kernel_is_listed_for_introspection(code):
    """The doctor's list names every kernel that was compiled, each instance of a template by a name of its own, and no other."""
    listed = [kernel["name"] for kernel in backends._ask_cuda("fpet_cuda_kernels", -1)["kernels"]]
    assert len(set(listed)) == len(listed)
    compiled = {name for _, name in code}
    by_template = [collections.Counter(name.partition("<")[0] for name in names) for names in (listed, compiled)]
    assert by_template[0] == by_template[1]


def test_the_guard_of_a_device_is_torchs(code):
    """One of our own would make a context on the device it goes back to."""
    assert b"aoti_torch_create_device_guard" in LIBRARY.read_bytes()
    for source in (*(ROOT / "csrc/cuda").iterdir(), ROOT / "csrc/bindings/cuda_ops.cpp"):
        assert "cudaSetDevice(" not in source.read_text(), source.name


def test_resources(code):
    """A block's registers and shared memory fit each architecture it was compiled for."""
    launches = collections.defaultdict(list)
    for kernel in backends._ask_cuda("fpet_cuda_kernels", -1)["kernels"]:
        launches[kernel["name"].partition("<")[0]].append(kernel)
    for (arch, name), kernel in code.items():
        typical = launches[name.partition("<")[0]]
        number = int(re.sub(r"\D", "", arch))
        limit = SHARED[number] + (
            1024 if number >= 90 else 0
        )  # from sm_90 on cuobjdump counts the system's kilobyte as the block's
        registers = -(-kernel.registers // 8) * 8  # given out by eights
        assert registers * max(k["threads"] for k in typical) <= 1 << 16, f"{arch} {name}: too many registers for a launch"
        smallest = min(k["dynamic_shared"] for k in typical) - STAGE.get(name.partition("<")[0], 0)
        assert smallest + kernel.shared <= limit, f"{arch} {name}: shared memory"


def test_spills(code):
    """Short grids: nothing. Long grids: a quarter of a kilobyte a thread; more is an array that was meant for registers."""
    assert {name.partition("<")[0] for _, name in code} >= SHORT
    for key, kernel in code.items():
        local = kernel.count("STL", "LDL")
        assert not local or key[1].partition("<")[0] not in SHORT, f"{key}: {local} instructions touch local memory"
        assert kernel.stack <= 256, f"{key}: {kernel.stack} bytes of stack"


def test_matrix_instructions(code):
    """Scores of 16-bit and float32 problems come from tensor cores, never from the scalar units by a compiler's accident."""
    found = {key: kernel for key, kernel in code.items() if MATRIX.match(key[1])}
    assert {name.partition("<")[0] for _, name in found} == {"merge_short", "match_tiles", "pair_tiles", "image_gradient"}
    for key, kernel in found.items():
        assert kernel.count("HMMA", "HGMMA", "UTCHMMA"), f"{key}: no matrix instruction"


def test_loads_of_16_bytes(code):
    """Rows of tokens and keys are read 16 bytes at a time, by a load or an asynchronous copy."""
    found = {key: kernel for key, kernel in code.items() if VECTORS.match(key[1])}
    assert len({name.partition("<")[0] for _, name in found}) == 9
    for key, kernel in found.items():
        assert kernel.count("LDG", "LDGSTS", having="128") or kernel.count("UBLKCP"), f"{key}: no 16-byte load"


def test_no_float_atomics(code):
    """Sums in no fixed order would not be the same from run to run."""
    for key, kernel in code.items():
        for name in kernel.instructions:
            assert not re.match(r"(ATOM|ATOMG|ATOMS|RED|REDG|REDUX)\..*(F16|F32|F64|BF16)", name), f"{key}: {name}"
