"""How much faster an exported model is with merging: ``python benchmarks/exported_latency.py``.

The same ViT with seeded random weights is exported twice, as ``fpet export`` does it: as it is, and with half of its patches
merged by a refined matching in its middle block. Each file is compared with its eager model before it is timed. The files
take turns in one run; the ratio is the median over rounds of the quotient of two times of one round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

try:
    import timm
    import torch

    import fpet
except ImportError as missing:
    raise SystemExit(f"fpet is not installed here ({missing}): pip install -e '.[fpet,bench]'") from missing

from fpet.deploy.exporting import FORMATS, export, runner
from fpet.measure.timing import quotient, take_turns
from harness import cases, rows
from harness.run import context

BENCHMARK = "exported_latency"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name (default: %(default)s)")
    parser.add_argument("--format", default="onnx", choices=tuple(FORMATS), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing (default: %(default)s)")
    parser.add_argument("--out", help='file of the rows; "none" writes none (default: benchmarks/results)')
    options = parser.parse_args(argv)
    options.device = torch.device("cpu")

    torch.manual_seed(0)
    plain = timm.create_model(options.model, num_classes=1000).eval()
    layer, size = len(plain.blocks) // 2, plain.patch_embed.img_size[0]
    images = cases.crops(cases.photograph(), max(4, options.batch), size)
    calls, errors = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, where in (("plain", None), ("merged", layer)):
            model = fpet.apply(plain, layer=where, refinement=where is not None)
            path = Path(folder) / name / FORMATS[options.format][0]
            errors[name] = export(model, path, format=options.format, images=images).error
            run = runner(path, options.format)
            calls[name] = lambda run=run: run(images[: options.batch])
        taken = take_turns(calls, options.device, options.budget)
    ratio = quotient(taken["merged"], taken["plain"])
    told = context(options, BENCHMARK, argv)
    found = [
        {
            **told, "benchmark": BENCHMARK, "model": options.model, "format": options.format, "batch": options.batch,
            "implementation": name, "layer": None if name == "plain" else layer, "rounds": len(seconds),
            "ms_per_image": 1e3 * sorted(seconds)[len(seconds) // 2] / options.batch, "threads": torch.get_num_threads(),
            "ratio": ratio if name == "merged" else 1.0, "error": errors[name],
        }
        for name, seconds in taken.items()
    ]  # fmt: skip
    for row in found:
        print(
            f"{row['model']}, {row['format']}, batch {row['batch']}: {row['implementation']:<7} "
            f"{row['ms_per_image']:8.2f} ms/image, {row['ratio']:.3f} × plain, {row['rounds']} rounds, error {row['error']:.1e}"
        )
    rows.write(found, BENCHMARK, options.out, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
