"""What programs do is pinned: a change that makes a kernel wait more often, move more bytes or issue more instructions shows."""

from __future__ import annotations

import pytest

from .counts import CASE, count
from .test_kernels import every, pytestmark  # noqa: F401  (the marks hold here too)

# Of ViT-B/16 in bfloat16, refined, in a batch of 64, per program: instructions, barriers and round trips, the most of what Triton
# 3.6 and 3.8 make; KiB loaded and stored.
PINNED = {
    "sm90": {
        "merge_short": (10_400, 70, 26, 457.8, 75.4),
        "prepare_backward": (1_000, 12, 6, 35.3, 12.0),
        "pair_pass": (4_000, 45, 20, 222.8, 24.7),
        "refined_gradient": (1_050, 20, 13, 34.9, 3.8),
        "weight_partials": (1_350, 13, 2, 31.1, 16.0),
        "reduce_partials": (160, 6, 1, 3.2, 0.2),
    },
}


@every
@pytest.mark.parametrize("target", PINNED)
def test_counts(target):
    found = count(CASE, target)
    assert [kernel.kernel for kernel in found] == list(PINNED[target])
    for kernel in found:
        instructions, barriers, round_trips, loaded, stored = PINNED[target][kernel.kernel]
        assert kernel.instructions <= 1.05 * instructions, kernel
        assert kernel.barriers <= barriers and kernel.round_trips <= round_trips, kernel
        assert kernel.loaded <= 1024 * (loaded + 0.05) and kernel.stored <= 1024 * (stored + 0.05), kernel
