"""Arguments as users have them: NumPy's numbers, results that were saved, tensors of layouts that no kernel reads."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from fpet_kernels import KeyRefinement, Merged, bdm_merge, bdm_unmerge


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 21, 8, generator=g), torch.randn(2, 21, 4, generator=g)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_numbers_of_numpy(backend: str | None) -> None:
    x, key = inputs()
    weights = torch.ones(3, 4), torch.ones(4, 3)
    expected = bdm_merge(
        x, key, grid_size=(4, 5), num_prefix_tokens=1, refinement=KeyRefinement(*weights, 0.5), backend=backend
    )
    for integer in (np.int64, np.int32, np.uint8):
        found = bdm_merge(
            x, key, grid_size=(integer(4), integer(5)), num_prefix_tokens=integer(1),
            refinement=KeyRefinement(*weights, np.float32(0.5)), backend=backend,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        back = bdm_unmerge(found.tokens, found.match, grid_size=np.array([4, 5]), num_prefix_tokens=integer(1), backend=backend)
        assert torch.equal(back, bdm_unmerge(expected.tokens, expected.match, grid_size=(4, 5), backend=backend))


def test_a_result_loads_with_weights_only() -> None:
    x, key = inputs()
    merged = bdm_merge(x, key, grid_size=(4, 5))
    file = io.BytesIO()
    torch.save(merged, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert isinstance(found, Merged) and all(torch.equal(a, b) for a, b in zip(found, merged, strict=True))


@pytest.mark.parametrize("which", ["x", "key"])
@pytest.mark.parametrize(
    "odd",
    [
        lambda t: torch.nested.nested_tensor(list(t)),
        lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
        lambda t: t.to_sparse(),
        lambda t: t.to_mkldnn(),
    ],
    ids=["nested", "jagged", "sparse", "mkldnn"],
)
def test_layouts_that_no_kernel_reads_are_refused_by_name(odd: object, which: str) -> None:
    x, key = inputs()
    given = {"x": x, "key": key}
    given[which] = odd(given[which])  # type: ignore[operator]
    with pytest.raises(TypeError, match=f"^{which}: "):
        bdm_merge(**given, grid_size=(4, 5))
