"""Warp instructions that the kernels of short grids issue for one image, without a GPU.

The kernels are compiled with FPET_COUNT, which leaves the numbers of csrc/cuda/places.cuh in their machine code; the emulator
counts how often the warps of one image pass each place (csrc/tests/count_passes.cpp: ViT-B/16 at 224 pixels, 12 heads, refined,
bfloat16). An instruction counts as often as the last place before it is passed, divided by the copies of that place that
unrolling made. So what is issued on tensor cores and by ldmatrix is exact, and compared with what the emulator counts; sums of
all instructions are from above, since rare ways (strides, other dtypes) count as if they were taken. Needs nvcc, cuobjdump (the
toolkit's or that of Triton's package) and the folder of a CMake build with FPET_BUILD_TESTS.

    cmake --build BUILD --target count_passes && python benchmarks/count_instructions.py --build BUILD
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("forward_short", "backward_short")
KERNELS = {  # as introspection lists them: what c++filt makes of the compiled one, without namespaces
    "merge_short<split bf16 keys, bf16>": "merge_short<Typed<bf16, bf16>, f16, true, 2>",
    "merge_short<split float keys, bf16>": "merge_short<Typed<float, bf16>, f16, true, 2>",
    "image_gradient<bf16>": "image_gradient<bf16>",
}
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)\s*(?P<rest>[^;]*);")
STREAMED = ("steps", "step_products", "step_rows")  # of image_gradient: all of D goes through these


@dataclass
class Place:
    """What the machine code holds of one place: copies, and behind them instructions by kind, and the bytes they may move."""

    copies: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)


def width(name: str) -> int:
    """Bytes a lane moves."""
    return next((bits // 8 for bits in (128, 64) if f".{bits}" in name), 2 if ".U16" in name else 1 if ".U8" in name else 4)


def places_of(lines: Iterable[str]) -> dict[int, Place]:
    """Places in the machine code of one kernel, as cuobjdump -sass prints it."""
    found: dict[int, Place] = collections.defaultdict(Place)
    place = 1
    for line in lines:
        match = INSTRUCTION.match(line)
        if not match:
            continue
        name = match["name"]
        if name == "PMTRIG":
            place = int(match["rest"].strip(), 16)
            found[place].copies += 1
            continue
        if name == "NOP":
            continue
        counts = found[place].counts
        counts["instructions"] += 1
        counts["tensor cores"] += name.startswith(("HMMA", "HGMMA"))
        counts["ldmatrix"] += name.startswith("LDSM")
        counts["shuffles"] += name.startswith("SHFL")
        if name.startswith(("LDG", "STG")):
            counts["copies" if name.startswith("LDGSTS") else "loads" if name.startswith("LDG") else "stores"] += 32 * width(
                name
            )
    return dict(found)


def kernels_of(sass: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(mangled name, lines) of each kernel."""
    name, lines = "", []
    for line in sass:
        if match := re.match(r"\s*Function :? ?([\w.$]+)", line):
            if name:
                yield name, lines
            name, lines = match[1], []
        lines.append(line)
    if name:
        yield name, lines


def demangled(names: Iterable[str]) -> list[str]:
    """Readable names, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    clean = (re.sub(r"\(anonymous namespace\)::|fpet::cuda::|^void ", "", line) for line in done.stdout.splitlines())
    return [line.partition("(")[0] for line in clean]


def names_of_places() -> dict[int, str]:
    """The enumerators of places.cuh, by number."""
    text = (ROOT / "csrc/cuda/places.cuh").read_text()
    body = re.sub(r"//.*", "", text[text.index("enum Place") :].partition("{")[2].partition("}")[0])
    return {number: name.partition("=")[0].strip() for number, name in enumerate(filter(str.strip, body.split(",")), 1)}


def dynamic(places: dict[int, Place], passes: dict[int, int]) -> dict[int, collections.Counter[str]]:
    """What one image issues at each place: static counts times passes, over the copies."""
    out = {}
    for number, place in places.items():
        share = passes.get(number, 0) / max(place.copies, 1)
        out[number] = collections.Counter({kind: round(count * share) for kind, count in place.counts.items()})
    return out


def compile_counted(folder: Path) -> dict[str, list[str]]:
    """Readable name -> machine code, of the kernels of short grids for sm_90a."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    spec = importlib.util.find_spec("triton")
    carried = [Path(p) / "backends/nvidia/bin" for p in (spec.submodule_search_locations or ())] if spec else []
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, carried)])
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None or not shutil.which(nvcc):
        raise SystemExit(
            "count_instructions needs nvcc (or CUDACXX) and cuobjdump, which comes with the CUDA toolkit or with triton"
        )
    code = {}
    for name in SOURCES:
        cubin = folder / f"{name}.cubin"
        if not cubin.exists():
            options = [
                "-std=c++17",
                "-O3",
                "-DNDEBUG",
                "-DFPET_COUNT",
                "--generate-code=arch=compute_90a,code=[sm_90a]",
                "-cubin",
            ]
            include = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cuda'}"]
            subprocess.run([nvcc, *options, *include, "-o", cubin, ROOT / f"csrc/cuda/{name}.cu"], check=True)
        done = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True)
        found = list(kernels_of(done.stdout.splitlines()))
        code |= dict(zip(demangled(name for name, _ in found), (lines for _, lines in found), strict=True))
    return code


def report(launch: dict, places: dict[int, Place]) -> list[str]:
    """The table of one kernel."""
    names = names_of_places()
    found = dynamic(places, {int(k): v for k, v in launch["passes"].items()})
    total: collections.Counter[str] = collections.Counter()
    lines = [f"{launch['kernel']}: {sum(p.counts['instructions'] for p in places.values())} instructions of machine code"]
    lines.append(
        f"  {'place':<22}{'passes':>8}{'instructions':>14}{'tensor cores':>14}{'ldmatrix':>10}  KB loaded a pass of a warp"
    )
    for number in sorted(found):
        counts, passes = found[number], int(launch["passes"].get(str(number), 0))
        total += counts
        if passes and counts["instructions"]:
            place = places[number]
            flight = (place.counts["loads"] + place.counts["copies"]) / max(place.copies, 1) / 1024
            shown = f"{flight:10.1f}" if flight >= 1 else ""
            figures = f"{passes:>8}{counts['instructions']:>14}{counts['tensor cores']:>14}{counts['ldmatrix']:>10}"
            lines.append(f"  {names[number]:<22}{figures}{shown}")
    streamed = sum(counts["instructions"] for number, counts in found.items() if names[number] in STREAMED)
    units = f"{total['tensor cores']} on tensor cores, {total['ldmatrix']} ldmatrix"
    lines.append(f"  in all {total['instructions']} warp instructions, {units}")
    if streamed:
        lines.append(f"  of them {streamed} stream D, and {total['instructions'] - streamed} are the key path and all else")
    events = launch["events"]
    read = 16 * events.get("load16", 0) + events.get("copied bytes", 0)
    lines.append(
        f"  emulator: {read / 1e3:.0f} KB read 16 bytes at a time; machine code: at most {total['stores'] / 1e3:.0f} KB stored"
    )
    return lines


def differences(launch: dict, places: dict[int, Place]) -> dict[str, tuple[int, int]]:
    """Kinds whose sum is not what the emulator counted, so that some loop lacks a place: kind -> (sum, emulated)."""
    total: collections.Counter[str] = collections.Counter()
    for counts in dynamic(places, {int(k): v for k, v in launch["passes"].items()}).values():
        total += counts
    events = launch["events"]
    emulated = {
        "tensor cores": sum(count for name, count in events.items() if name.startswith("mma_")),
        "ldmatrix": sum(count for name, count in events.items() if name.startswith("ldmatrix")),
    }
    return {kind: (total[kind], count) for kind, count in emulated.items() if total[kind] != count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="CMake's folder, with count_passes built")
    parser.add_argument("--keep", type=Path, help="folder of the compiled kernels, taken from there if they are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        code = compile_counted(folder)
    wrong = 0
    for keys in ("heads", "mean"):
        done = subprocess.run([options.build / "count_passes", keys], capture_output=True, text=True, check=True)
        print(f"--- keys: {'of 12 heads' if keys == 'heads' else 'the float32 mean that the forward kept'}")
        for launch in json.loads(done.stdout):
            if launch["kernel"] not in KERNELS:
                continue
            places = places_of(code[KERNELS[launch["kernel"]]])
            print("\n".join(report(launch, places)))
            for kind, (counted, emulated) in differences(launch, places).items():
                print(f"  !! {kind}: {counted} by places, {emulated} emulated: some loop has no place of its own")
                wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
