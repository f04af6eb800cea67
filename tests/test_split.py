"""Splits: two index lists and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fpet_kernels import Split, alternating, bdm_merge, checkerboard, checkerboard_3d, second_checkerboard

GRIDS = [(14, 14), (7, 7), (2, 2), (1, 4), (9, 1), (3, 5), (37, 37), (2, 3)]


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_checkerboard(h, w):
    split = checkerboard(h, w)
    assert split.a.tolist() == [r * w + c for r in range(h) for c in range(w) if (r + c) % 2 == 0]
    assert split.b.tolist() == [r * w + c for r in range(h) for c in range(w) if (r + c) % 2 == 1]
    assert split.grid == (h, w) and split.num_tokens == h * w
    assert split.a.dtype == split.b.dtype == torch.int64


@pytest.mark.parametrize("n", [4, 5, 196, 197])
def test_alternating(n):
    split = alternating(n)
    assert split.a.tolist() == list(range(0, n, 2)) and split.b.tolist() == list(range(1, n, 2))


@pytest.mark.parametrize(("t", "h", "w"), [(1, 4, 4), (2, 3, 3), (8, 14, 14), (4, 1, 1)])
def test_checkerboard_3d(t, h, w):
    split = checkerboard_3d(t, h, w)
    assert split.a.tolist() == [
        (f * h + r) * w + c for f in range(t) for r in range(h) for c in range(w) if (f + r + c) % 2 == 0
    ]
    assert split.a.numel() + split.b.numel() == t * h * w


@pytest.mark.parametrize(("h", "w"), [(14, 14), (8, 8), (7, 7), (4, 3), (5, 6), (6, 5)])
def test_second_checkerboard(h, w):
    """Sources are the survivors of even rows; every interior one has a destination as a diagonal neighbour; a grid is left."""
    survivors = [(r, c) for r in range(h) for c in range(w) if (r + c) % 2 == 1]
    split = second_checkerboard(h, w)
    assert split.num_tokens == len(survivors) == checkerboard(h, w).b.numel()
    sources, left = [survivors[i] for i in split.a], [survivors[i] for i in split.b]
    assert all(r % 2 == 0 for r, _ in sources)
    assert left == [(r, c) for r in range(1, h, 2) for c in range(0, w, 2)]  # an ordinary grid, h // 2 by ceil(w / 2)
    for r, c in sources:
        assert any((r + dr, c + dc) in left for dr in (-1, 1) for dc in (-1, 1))


def test_merging_three_times():
    """196 → 98 → 49 → 24 tokens, each time a split of what was left."""
    x = torch.randn(2, 197, 8)
    for split in (checkerboard(14, 14), second_checkerboard(14, 14), checkerboard(7, 7)):
        x = bdm_merge(x, x, split=split).tokens
    assert x.shape == (2, 25, 8)


@pytest.mark.parametrize(
    ("n", "a", "b", "message"),
    [
        (4, [0, 1, 2], [3], "at least two destinations, got 1"),
        (4, [0], [2, 3], r"range\(4\) exactly once, got 1 \+ 2"),
        (4, [0, 1], [1, 3], r"range\(4\) exactly once"),
        (4, [0, 5], [1, 3], r"range\(4\) exactly once"),
        (4, [-1, 0], [1, 3], r"range\(4\) exactly once"),
        (4, [2, 0], [1, 3], "positions of a must be strictly increasing"),
        (4, [0, 2], [3, 1], "positions of b must be strictly increasing"),
        (4, [[0, 2]], [1, 3], "expected 1-D position lists"),
        (2, [0, 1], [], "at least two destinations, got 0"),
    ],
)
def test_errors(n, a, b, message):
    with pytest.raises(ValueError, match=f"^split: .*{message}"):
        Split(n, a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: checkerboard(1, 3), "at least two destinations, got 1 of 3"),
        (lambda: checkerboard(0, 3), "height: expected a positive integer, got 0"),
        (lambda: checkerboard(3, -1), "width: expected a positive integer, got -1"),
        (lambda: checkerboard(3.5, 2), "height: expected a positive integer, got 3.5"),
        (lambda: checkerboard(True, 8), "height: expected a positive integer, got True"),
        (lambda: alternating(3), "at least two destinations, got 1 of 3"),
        (lambda: alternating(0), "num_tokens: expected a positive integer, got 0"),
        (lambda: checkerboard_3d(0, 2, 2), "frames: expected a positive integer, got 0"),
        (lambda: second_checkerboard(2, 2), "at least two destinations, got 1"),
    ],
)
def test_maker_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_grid_that_is_not_the_lists_is_refused():
    """Kernels compute the positions from the grid instead of reading the lists, so the two must agree."""
    assert Split(6, [0, 2, 4], [1, 3, 5], grid=(2, 3)).grid == (2, 3)
    with pytest.raises(ValueError, match="grid"):
        Split(6, [0, 1, 2], [3, 4, 5], grid=(2, 3))


def test_no_source_at_all(backend, device):
    """Nothing to merge: the tokens come back."""
    x = torch.randn(2, 5, 4, device=device)
    tokens, size, match = bdm_merge(x, x, split=Split(4, [], [0, 1, 2, 3]), backend=backend)
    assert torch.equal(tokens, x) and (size == 1).all() and match.shape == (2, 0)


def test_values():
    """Equal, hashable, picklable, copyable: usable as a key and as a module's attribute."""
    split = checkerboard(3, 4)
    assert split == Split(12, split.a, split.b) and hash(split) == hash(Split(12, split.a, split.b))
    assert split != alternating(12) and split != checkerboard(4, 3) and split != "split"
    for twin in (pickle.loads(pickle.dumps(split)), copy.deepcopy(split), copy.copy(split)):
        assert twin == split and twin.grid == split.grid and torch.equal(twin.a, split.a)
    assert checkerboard(3, 4) is split, "a split of a grid is made once"
    assert repr(split) == "Split(12 tokens: 6 into 6, grid=(3, 4))"


def test_on_a_device(device):
    split = checkerboard(3, 4)
    a, b = split.on(torch.device(device))
    assert a.device.type == b.device.type == device and torch.equal(a.cpu(), split.a)
    assert split.on(torch.device(device))[0] is a, "copied to a device once"
    pickle.loads(pickle.dumps(split))


@pytest.mark.parametrize("grid", [(14, 14), (5, 3)])
def test_grid_and_lists_give_the_same(grid, backend, device, max_tokens):
    """grid_size, split=checkerboard(...) and the bare lists are three ways to say one thing."""
    if grid[0] * grid[1] + 1 > max_tokens:
        pytest.skip("too many tokens for the interpreter")
    n = grid[0] * grid[1]
    x, key = torch.randn(2, 1 + n, 24, device=device), torch.randn(2, 1 + n, 8, device=device)
    board = checkerboard(*grid)
    want = bdm_merge(x, key, grid_size=grid, backend=backend)
    for split in (board, Split(n, board.a, board.b)):
        for got, expected in zip(bdm_merge(x, key, split=split, backend=backend), want, strict=True):
            assert torch.equal(got, expected)
