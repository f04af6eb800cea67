"""How many tokens the published rule ``σ(s − m) > 0.5`` deletes: ``python benchmarks/lost_tokens.py``.

Where the two best scores of a source round to the same value, their mean m equals both, no σ(s − m) exceeds one half, and
the source is matched with nothing: its token is gone. Half precision makes that common; here it is counted on the keys that
a ViT under autocast computes for a noise image, a flat image and a photograph. ``bdm_merge`` gets the same keys: whatever the
dtype, every source must arrive somewhere.
"""

from __future__ import annotations

import argparse
import sys

try:
    import torch

    import fpet_kernels
except ImportError as missing:
    raise SystemExit(f"fpet_kernels is not installed here ({missing}): make bench, or pip install -e '.[bench]'") from missing

from torch import Tensor

from fpet_kernels import bdm_merge
from fpet_kernels.reference import bdm_merge_reference
from harness import cases

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def images(size: int) -> dict[str, Tensor]:
    """name → (1, 3, size, size) in [−1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return {
        "noise": torch.rand(1, 3, size, size, generator=generator) * 2 - 1,
        "flat": torch.full((1, 3, size, size), 0.5),
        "photograph": cases.crops(cases.photograph(), 1, size),
    }


def lost(case: cases.Case, model: torch.nn.Module, image: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens lost by the published rule, and by ``bdm_merge``, on the keys of ``model`` under autocast to ``dtype``."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        x, qkv = cases.features(model, image)
    key, p = cases.key_of_qkv(qkv, case.heads), case.num_prefix_tokens
    match = bdm_merge_reference(x, key, split=case.split, num_prefix_tokens=p, rule="threshold", dtype=dtype)[2]
    merged = bdm_merge(x, key, grid_size=case.grid, num_prefix_tokens=p)
    return int((match < 0).sum()), round(case.num_tokens - merged.size.double().sum().item())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, case in cases.CASES.items() if case.num_tokens < 1000]
    parser.add_argument("--case", default="vitb16_224", choices=known, help="which ViT; default vitb16_224")
    options = parser.parse_args(argv)
    case = cases.CASES[options.case]
    model = cases.seeded_vit(case)
    sources = case.split.a.numel()
    print(
        f"{case.model} (seeded random weights), block {case.layer}, {sources} source tokens, backend "
        f"{fpet_kernels.backends.select(torch.empty(1, 1, 1), None)!r}"
    )
    print(f"{'image':<12}{'keys and scores':<18}{'lost by σ(s − m) > 0.5':>24}{'lost by bdm_merge':>20}")
    broken = 0
    for name, image in images(case.image_size).items():
        for dtype in DTYPES:
            published, ours = lost(case, model, image, dtype)
            broken += ours
            print(f"{name:<12}{str(dtype).removeprefix('torch.'):<18}{published:>18} of {sources}{ours:>20}")
    if broken:
        print(f"bdm_merge lost {broken} tokens: that is a defect", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
