"""The tiled forward: any number of tokens, any C, D and hidden width, every dtype. Extra memory grows with N.

``prepare_keys`` → ``match_tiles`` (→ ``join_matches``) → (torch sorts the match) → ``merge_lists``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import inverse_norm, refined_key, square_root, sum_of_squares
from .primitives import (
    better_two,
    dot_of_parts,
    exact_dot,
    merged_token,
    middle,
    parts_of,
    product,
    row_token,
    second_column,
    source_token,
    split_scalar,
    store,
    top_two,
    wide,
    zeros,
)

# --- k', prepared once for all tiles that read it --------------------------------------------------------------------


@triton.jit
def prepare_rows(
    p_prepared, p_norm, p_mean, key, delta, weights, dropout, p_split_a, p_split_b, b, block, num_a, num_rows, prefix, width,
    channels, heads, hidden, scale,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr, MEAN: tl.constexpr,
    DOUBLE: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k' of BR rows of image ``b``, sources then destinations, in (B, PLANES, N_A + N_B, C), and its norm.

    A plane is a part of k' as products take it; with one, it is k' itself, and with RAW a copy of the 16-bit key. MEAN: also
    the key averaged over heads, (B, N, C), but its prefix tokens.
    """
    r = block * BR + tl.arange(0, BR)
    row_mask = r < num_rows
    tokens = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
    row = b * num_rows * PLANES + r
    squares = zeros((BR,), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        mask = row_mask[:, None] & (c < channels)[None, :]
        refined, mean = refined_key(
            key, delta, weights, dropout, tokens, row_mask, c, channels, heads, hidden, scale,
            BC, BH, WHOLE, REFINED, MASKED, DELTA, RAW, DOUBLE, PARTS,
        )  # fmt: skip
        at = p_prepared + row[:, None] * channels + c[None, :]
        if PLANES == 1:
            tl.store(at, refined, mask=mask)
        else:
            parts = parts_of(refined, PARTS)
            for plane in tl.static_range(PLANES):
                tl.store(at + plane * num_rows * channels, parts[plane], mask=mask)
        if MEAN:
            tl.store(p_mean + (b * (prefix + num_rows) + tokens)[:, None] * channels + c[None, :], mean, mask=mask)
        squares += sum_of_squares(refined, DOUBLE)
    if COSINE:
        tl.store(p_norm + b * num_rows + r, square_root(squares), mask=row_mask)


@triton.jit
def load_rows(p_prepared, b, r, mask, c, channels, num_rows, PLANES: tl.constexpr):
    """The planes of k' of rows [r, c] of image ``b``."""
    at = p_prepared + (b * num_rows * PLANES + r)[:, None] * channels + c[None, :]
    mask = mask[:, None] & (c < channels)[None, :]
    first = tl.load(at, mask=mask, other=0.0)
    if PLANES == 1:
        return (first,)
    else:
        second = tl.load(at + num_rows * channels, mask=mask, other=0.0)
        if PLANES == 2:
            return first, second
        else:
            return first, second, tl.load(at + 2 * num_rows * channels, mask=mask, other=0.0)


@triton.jit
def turned(planes):
    """Each plane transposed."""
    if len(planes) == 1:
        return (tl.trans(planes[0]),)
    elif len(planes) == 2:
        return tl.trans(planes[0]), tl.trans(planes[1])
    else:
        return tl.trans(planes[0]), tl.trans(planes[1]), tl.trans(planes[2])


@triton.jit
def dot_of_rows(a, b, acc, PLANES: tl.constexpr, PARTS: tl.constexpr):
    """acc + a b of two operands in planes."""
    if PLANES > 1:
        return dot_of_parts(a, b, acc, PARTS)
    else:
        return exact_dot(a[0], b[0], acc, PARTS)


@triton.jit
def dot_with_rows(a, rows, acc, PLANES: tl.constexpr, PARTS: tl.constexpr):
    """acc + a b where only the second operand is in planes."""
    if PLANES > 1:
        return dot_of_parts(parts_of(a, PARTS), rows, acc, PARTS)
    else:
        return exact_dot(a, rows[0], acc, PARTS)


@triton.jit
def tile_scores(
    p_prepared, p_norm, b, r_a, a_mask, r_b, b_mask, channels, num_rows,
    BC: tl.constexpr, COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """[sources, destinations] scores of one tile of image ``b``."""
    scores = zeros((r_a.shape[0], r_b.shape[0]), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        rows_a = load_rows(p_prepared, b, r_a, a_mask, c, channels, num_rows, PLANES)
        rows_b = load_rows(p_prepared, b, r_b, b_mask, c, channels, num_rows, PLANES)
        scores = dot_of_rows(rows_a, turned(rows_b), scores, PLANES, PARTS)
    if COSINE:
        scores = scores * row_inverse_norm(p_norm, b, r_a, a_mask, num_rows)[:, None]
        scores = scores * row_inverse_norm(p_norm, b, r_b, b_mask, num_rows)[None, :]
    return scores


@triton.jit
def row_inverse_norm(p_norm, b, r, mask, num_rows):
    """1 / max(‖k'‖, ε) of rows of image ``b``."""
    return inverse_norm(tl.load(p_norm + b * num_rows + r, mask=mask, other=1.0))


@triton.jit(do_not_specialize=["num_a", "num_rows", "width"])
def prepare_keys(
    p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_prepared, p_norm,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, heads, hidden, scale_high, scale_low,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr,
    PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k' of every row and its norm."""
    blocks = tl.cdiv(num_rows, BR)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    key = (p_key + b * stride_key_b, stride_key_h, stride_key_n, stride_key_c)
    delta = (p_delta + b * stride_delta_b, stride_delta_n, stride_delta_c)
    weights = (p_down, p_up, stride_down_h, stride_down_c, stride_up_c, stride_up_h)
    dropout = (p_mask + b * stride_mask_b, stride_mask_n, stride_mask_h)
    prepare_rows(
        p_prepared, p_norm, p_norm, key, delta, weights, dropout, p_split_a, p_split_b, b, tl.program_id(0) % blocks, num_a,
        num_rows, prefix, width, channels, heads, hidden, split_scalar(scale_high, scale_low, DOUBLE),
        BR, BC, BH, LISTED, REFINED, MASKED, DELTA, COSINE, RAW, WHOLE, False, DOUBLE, PLANES, PARTS,
    )  # fmt: skip


# --- matching --------------------------------------------------------------------------------------------------------


@triton.jit
def _store_match(p_match, p_second, p_mid, at, mask, best, i_best, second, i_second, prefix):
    tl.store(p_match + at, (prefix + i_best).to(tl.int64), mask=mask)
    tl.store(p_second + at, (prefix + second_column(second, i_second, i_best)).to(tl.int64), mask=mask)
    tl.store(p_mid + at, middle(best, second), mask=mask)


@triton.jit(do_not_specialize=["num_a", "num_b", "parts", "steps"])
def match_tiles(
    p_prepared, p_norm, p_match, p_second, p_mid, p_scores, p_columns, num_a, num_b, prefix, channels, parts, steps,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr,
    PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """match, second, mid of BA sources: destinations pass by in ``steps`` tiles, the two best so far are kept.

    Several ``parts`` share the destinations out; each then leaves its two best, scores and columns (2, B, parts, N_A), to
    :func:`join_matches`.
    """
    blocks = tl.cdiv(num_a, BA)
    part = tl.program_id(0) % parts
    b = (tl.program_id(0) // parts // blocks).to(tl.int64)
    i = (tl.program_id(0) // parts % blocks) * BA + tl.arange(0, BA)
    a_mask = i < num_a
    num_rows = num_a + num_b
    best = zeros((BA,), DOUBLE) - float("inf")
    second = best
    i_best = tl.zeros((BA,), tl.int32)
    i_second = tl.zeros((BA,), tl.int32)
    for start in range(part * steps * BB, tl.minimum((part + 1) * steps * BB, num_b), BB):
        j = start + tl.arange(0, BB)
        scores = tile_scores(
            p_prepared, p_norm, b, i, a_mask, num_a + j, j < num_b, channels, num_rows, BC, COSINE, WHOLE, DOUBLE, PLANES, PARTS
        )
        tile_best, i_tile_best, tile_second, i_tile_second = top_two(scores, num_b - start)
        best, i_best, second, i_second = better_two(
            best, i_best, second, i_second, tile_best, start + i_tile_best, tile_second, start + i_tile_second
        )
    if parts == 1:
        _store_match(p_match, p_second, p_mid, b * num_a + i, a_mask, best, i_best, second, i_second, prefix)
    else:
        at = (b * parts + part) * num_a + i
        other = (tl.num_programs(0) // blocks).to(tl.int64) * num_a
        tl.store(p_scores + at, best, mask=a_mask)
        tl.store(p_scores + other + at, second, mask=a_mask)
        tl.store(p_columns + at, i_best, mask=a_mask)
        tl.store(p_columns + other + at, i_second, mask=a_mask)


@triton.jit(do_not_specialize=["num_a", "batch", "parts"])
def join_matches(
    p_scores, p_columns, p_match, p_second, p_mid, num_a, prefix, batch, parts, BA: tl.constexpr, DOUBLE: tl.constexpr
):
    """The two best of what the parts of :func:`match_tiles` left, in the order of their columns: as if there was one part."""
    blocks = tl.cdiv(num_a, BA)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BA + tl.arange(0, BA)
    a_mask = i < num_a
    other = tl.cast(batch, tl.int64) * parts * num_a
    best = zeros((BA,), DOUBLE) - float("inf")
    second = best
    i_best = tl.zeros((BA,), tl.int32)
    i_second = tl.zeros((BA,), tl.int32)
    for part in range(0, parts):
        at = (b * parts + part) * num_a + i
        best, i_best, second, i_second = better_two(
            best, i_best, second, i_second,
            tl.load(p_scores + at, mask=a_mask, other=float("-inf")), tl.load(p_columns + at, mask=a_mask, other=0),
            tl.load(p_scores + other + at, mask=a_mask, other=float("-inf")),
            tl.load(p_columns + other + at, mask=a_mask, other=0),
        )  # fmt: skip
    _store_match(p_match, p_second, p_mid, b * num_a + i, a_mask, best, i_best, second, i_second, prefix)


# --- merging ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_a", "merged", "width", "stride_size_b"])
def merge_lists(
    p_x, p_size, p_order, p_start, p_split_a, p_split_b, p_tokens, p_merged_size,
    stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    num_a, merged, prefix, width, dim,
    BT: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """One merged row: its own token plus those listed in order[start[e] : start[e + 1]], in that order."""
    blocks = tl.cdiv(dim, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b = row // merged
    e = (row % merged).to(tl.int32)
    d_block = tl.program_id(0) % blocks
    d = d_block * BD + tl.arange(0, BD)
    d_mask = d < dim
    p_x += b * stride_x_b
    p_size += b * stride_size_b

    kept = merged_token(e, True, p_split_b, prefix, width, LISTED)
    total = wide(tl.load(p_x + kept * stride_x_n + d.to(tl.int64) * stride_x_d, mask=d_mask, other=0.0), DOUBLE)
    if SIZED:
        size = wide(tl.load(p_size + kept * stride_size_n), DOUBLE)
        total = total * size
    else:
        size = tl.sum(zeros((1,), DOUBLE) + 1.0, axis=0)
    at = tl.load(p_start + b * (merged + 1) + e)
    end = tl.load(p_start + b * (merged + 1) + e + 1)
    while at < end:
        t = at + tl.arange(0, BT)
        t_mask = t < end
        source = tl.load(p_order + b * num_a + t, mask=t_mask, other=0)
        tokens = source_token(source.to(tl.int32), t_mask, p_split_a, prefix, width, LISTED)
        x = wide(
            tl.load(
                p_x + tokens[:, None] * stride_x_n + d.to(tl.int64)[None, :] * stride_x_d,
                mask=t_mask[:, None] & d_mask[None, :],
                other=0.0,
            ),
            DOUBLE,
        )
        if SIZED:
            sizes = wide(tl.load(p_size + tokens * stride_size_n, mask=t_mask, other=0.0), DOUBLE)
        else:
            sizes = wide(t_mask, DOUBLE)
        total += tl.sum(product(x, tl.broadcast_to(sizes[:, None], x.shape)), axis=0)
        size += tl.sum(sizes, axis=0)
        at += BT
    if DOUBLE:
        value = total / size
    else:
        value = tl.div_rn(total, zeros((BD,), DOUBLE) + size)
    store(p_tokens + row * dim + d, value, d_mask)
    if d_block == 0:
        tl.store(p_merged_size + row, size)
