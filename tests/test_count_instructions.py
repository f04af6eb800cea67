"""The counting of warp instructions: places in machine code times passes in the emulator, and the counts that docs/cuda.md states."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks" / "count_instructions.py").exists():
    pytest.skip("benchmarks are not here", allow_module_level=True)
spec = importlib.util.spec_from_file_location("count_instructions", ROOT / "benchmarks" / "count_instructions.py")
assert spec and spec.loader
count = importlib.util.module_from_spec(spec)
sys.modules["count_instructions"] = count
spec.loader.exec_module(count)

SASS = """
\t\tFunction : _Z5first
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00 */
        /*0010*/                   PMTRIG 0x2 ;                            /* 0x00 */
        /*0020*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;        /* 0x00 */
        /*0030*/                   HMMA.16816.F32 R4, R4, R8, R4 ;         /* 0x00 */
        /*0040*/                   PMTRIG 0x2 ;                            /* 0x00 */
        /*0050*/                   LDSM.16.M88.4 R4, [R2] ;                /* 0x00 */
        /*0060*/               @P1 BRA 0x10 ;                              /* 0x00 */
        /*0070*/                   PMTRIG 0x3 ;                            /* 0x00 */
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;         /* 0x00 */
        /*0090*/                   EXIT ;                                  /* 0x00 */
        /*00a0*/                   NOP;                                    /* 0x00 */
\t\tFunction : _Z6second
        /*0000*/                   EXIT ;                                  /* 0x00 */
"""


def test_instructions_count_as_often_as_the_place_before_them():
    kernels = dict(count.kernels_of(SASS.splitlines()))
    assert list(kernels) == ["_Z5first", "_Z6second"]
    places = count.places_of(kernels["_Z5first"])
    assert {number: place.copies for number, place in places.items()} == {1: 0, 2: 2, 3: 1}
    assert places[2].counts == {
        "instructions": 4, "tensor cores": 1, "ldmatrix": 1, "loads": 512, "shuffles": 0, "copies": 0, "stores": 0,
    } or {k: v for k, v in places[2].counts.items() if v} == {"instructions": 4, "tensor cores": 1, "ldmatrix": 1, "loads": 512}  # fmt: skip
    found = count.dynamic(places, {1: 8, 2: 24, 3: 8})  # the loop was unrolled twice: 12 rounds of it
    assert (found[2]["instructions"], found[2]["tensor cores"], found[2]["loads"]) == (48, 12, 12 * 512)
    assert (found[3]["instructions"], found[3]["stores"]) == (16, 8 * 256)
    launch = {"kernel": "k", "passes": {"1": 8, "2": 24, "3": 8}, "events": {"mma_f16": 12, "ldmatrix": 12, "load16": 4}}
    assert count.differences(launch, places) == {}
    launch["events"]["mma_f16"] = 13
    assert count.differences(launch, places) == {"tensor cores": (12, 13)}, "a loop without a place of its own is noticed"
    assert any("in all" in line for line in count.report({**launch, "kernel": "k"}, places))


def test_places_are_numbered_as_the_compiler_numbers_them():
    """And each product is followed by the place of what is done with it."""
    names = count.names_of_places()
    assert names[1] == "other" and len(set(names.values())) == len(names)
    used = "".join(
        (ROOT / "csrc/cuda" / f).read_text()
        for f in ("forward_short.cu", "backward_short.cu", "keys.cuh", "mma.cuh", "tiles.cuh")
    )
    products = set(re.findall(r"multiply_wide<place::(\w+)", used))
    by_name = {name: number for number, name in names.items()}
    assert products and all(names[by_name[product] + 1] == f"{product}_done" for product in products)
    named = set(re.findall(r"place::(\w+)", used)) | {f"{product}_done" for product in products}
    assert named == set(names.values()), "a place that no kernel passes, or one that is not listed"
    assert set(count.STREAMED) <= set(names.values())


@pytest.mark.sweep  # minutes of nvcc
def test_the_counts_that_the_page_states(tmp_path):
    """Where nvcc, cuobjdump and an emulated build are: every matrix instruction accounted for, and the page's table."""
    page = (ROOT / "docs/cuda.md").read_text()
    rows = re.findall(r"^\| `([^`|]+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", page, re.MULTILINE)
    stated = {(row[0], index): [int(n.replace(",", "")) for n in row[1:]] for index, row in enumerate(rows)}
    assert {name for name, _ in stated} == set(count.KERNELS)
    builds = [path.parent for path in ROOT.glob("build/*/count_passes")]
    if not builds or not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        warnings.warn("NOT CHECKED: the counts of warp instructions: no nvcc, or no build with count_passes", stacklevel=1)
        pytest.skip("no nvcc, or no build with count_passes")
    try:
        code = count.compile_counted(tmp_path)
    except SystemExit as missing:
        pytest.skip(str(missing))
    newest = max(builds, key=lambda folder: (folder / "count_passes").stat().st_mtime)
    found = []
    for keys in ("heads", "mean"):
        done = subprocess.run([newest / "count_passes", keys], capture_output=True, text=True, check=True)
        for launch in json.loads(done.stdout):
            if launch["kernel"] not in count.KERNELS:
                continue
            places = count.places_of(code[count.KERNELS[launch["kernel"]]])
            assert not count.differences(launch, places)
            events = launch["events"]
            units = sum(n for name, n in events.items() if name.startswith("mma_"))
            read = round((16 * events.get("load16", 0) + events.get("copied bytes", 0)) / 1000)
            size = sum(place.counts["instructions"] for place in places.values())
            found.append((launch["kernel"], [size, units, events["ldmatrix"], read]))
    for (name, index), (kernel, numbers) in zip(stated, found, strict=True):
        assert name == kernel
        assert numbers[1:] == stated[name, index][1:], name
        assert numbers[0] == pytest.approx(stated[name, index][0], rel=0.1), "machine code, which depends on the compiler"
