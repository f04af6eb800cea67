"""The fused forward of short grids: up to 256 sources and 256 destinations, one launch.

The scores of one block of sources against all destinations live in registers and never leave the chip. Blocks of sources follow
one another; at up to 128 sources there is one block (ONE), whose match stays in registers too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import inverse_norm, refined_key, square_root, sum_of_squares
from .primitives import (
    destination_token,
    exact_dot,
    middle,
    second_column,
    source_token,
    split_scalar,
    store,
    to_bfloat16,
    top_two,
)


@triton.jit
def _inverse_norm(key, COSINE: tl.constexpr):
    """1 / max(‖k'‖, ε) of rows [rows, C]; 1 where nothing is divided."""
    if COSINE:
        return inverse_norm(square_root(sum_of_squares(key, False)))
    else:
        return tl.full((key.shape[0],), 1.0, tl.float32)


@triton.jit
def _row_sizes(p_size, stride_size_n, tokens, mask, SIZED: tl.constexpr):
    if SIZED:
        return tl.load(p_size + tokens * stride_size_n, mask=mask, other=0.0).to(tl.float32)
    else:
        return mask.to(tl.float32)


@triton.jit
def _gather_sources(into, x, sizes, total, SIZED: tl.constexpr, PARTS: tl.constexpr):
    """total + into · (size ⊙ x), ``into`` [destinations, sources] the one-hot match: a sum, made by matrix units."""
    if SIZED:
        return exact_dot(to_bfloat16(into.to(tl.float32)), x.to(tl.float32) * sizes[:, None], total, PARTS)
    elif x.dtype == tl.float16:
        return exact_dot(into.to(tl.float16), x, total, PARTS)
    else:
        return exact_dot(to_bfloat16(into.to(tl.float32)), x, total, PARTS)


@triton.jit
def _match_block(
    start, key, delta, weights, dropout, p_size, stride_size_n, key_b, inverse_b, p_split_a, results, num_a, num_b, prefix,
    width, channels, heads, hidden, scale, part,
    BA: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, REFINED: tl.constexpr,
    MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Matches BA sources of one image from ``start`` on: their mask, tokens, best destinations, sizes (0 beyond the last)."""
    i = start + tl.arange(0, BA)
    a_mask = i < num_a
    token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
    key_a, _mean = refined_key(
        key, delta, weights, dropout, token_a, a_mask, tl.arange(0, BC), channels, heads, hidden, scale,
        BC, BH, True, REFINED, MASKED, DELTA, RAW, False, PARTS,
    )  # fmt: skip
    scores = exact_dot(key_a, tl.trans(key_b), tl.zeros((BA, key_b.shape[0]), tl.float32), PARTS)
    if COSINE:
        scores = scores * _inverse_norm(key_a, COSINE)[:, None] * inverse_b[None, :]
    best, i_best, second, i_second = top_two(scores, num_b)
    if part == 0:
        p_match, p_second, p_mid = results
        tl.store(p_match + i, (prefix + i_best).to(tl.int64), mask=a_mask)
        tl.store(p_second + i, (prefix + second_column(second, i_second, i_best)).to(tl.int64), mask=a_mask)
        tl.store(p_mid + i, middle(best, second), mask=a_mask)
    return a_mask, token_a, i_best, _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)


@triton.jit(do_not_specialize=["num_a", "num_b", "width", "stride_size_b", "parts", "steps"])
def merge_short(
    p_x, p_size, p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b,
    p_tokens, p_merged_size, p_match, p_second, p_mid, p_own_match,
    stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_b, prefix, width, dim, channels, heads, hidden, scale_high, scale_low, parts, steps,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr,
    LISTED: tl.constexpr, SIZED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr,
    COSINE: tl.constexpr, RAW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Everything for one image and ``steps`` × BD of its columns; each of an image's ``parts`` programs matches anew.

    The first part writes the match. With several blocks of sources a program also keeps it for itself, in ``p_own_match``
    (B · parts, N_A), to read it back.
    """
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scale = split_scalar(scale_high, scale_low, False)
    key = (p_key + b * stride_key_b, stride_key_h, stride_key_n, stride_key_c)
    delta = (p_delta + b * stride_delta_b, stride_delta_n, stride_delta_c)
    weights = (p_down, p_up, stride_down_h, stride_down_c, stride_up_c, stride_up_h)
    dropout = (p_mask + b * stride_mask_b, stride_mask_n, stride_mask_h)
    p_x += b * stride_x_b
    p_size += b * stride_size_b
    results = (p_match + b * num_a, p_second + b * num_a, p_mid + b * num_a)
    p_own_match += tl.program_id(0).to(tl.int64) * num_a
    merged = prefix + num_b

    j = tl.arange(0, BB)
    b_mask = j < num_b
    token_b = destination_token(j, b_mask, p_split_b, prefix, width, LISTED)
    key_b, _mean_b = refined_key(  # not "_": Triton would carry that through the loop below
        key, delta, weights, dropout, token_b, b_mask, tl.arange(0, BC), channels, heads, hidden, scale,
        BC, BH, True, REFINED, MASKED, DELTA, RAW, False, PARTS,
    )  # fmt: skip
    inverse_b = _inverse_norm(key_b, COSINE)
    size_b = _row_sizes(p_size, stride_size_n, token_b, b_mask, SIZED)
    n = size_b

    if ONE:
        a_mask, token_a, i_best, size_a = _match_block(
            0, key, delta, weights, dropout, p_size, stride_size_n, key_b, inverse_b, p_split_a, results, num_a, num_b, prefix,
            width, channels, heads, hidden, scale, part, BA, BC, BH, LISTED, SIZED, REFINED, MASKED, DELTA, COSINE, RAW, PARTS,
        )  # fmt: skip
        n += tl.sum(tl.where(i_best[None, :] == j[:, None], size_a[None, :], 0.0), axis=1)
    else:
        for start in range(0, num_a, BA):
            a_mask, _token_a, i_best, size_a = _match_block(
                start, key, delta, weights, dropout, p_size, stride_size_n, key_b, inverse_b, p_split_a, results, num_a, num_b,
                prefix, width, channels, heads, hidden, scale, part,
                BA, BC, BH, LISTED, SIZED, REFINED, MASKED, DELTA, COSINE, RAW, PARTS,
            )  # fmt: skip
            n += tl.sum(tl.where(i_best[None, :] == j[:, None], size_a[None, :], 0.0), axis=1)
            tl.store(p_own_match + start + tl.arange(0, BA), i_best, mask=a_mask)
    if part == 0:
        tl.store(p_merged_size + b * merged + prefix + j, n, mask=b_mask)
        for start in range(0, prefix, 16):
            e = start + tl.arange(0, 16)
            size_e = _row_sizes(p_size, stride_size_n, e.to(tl.int64), e < prefix, SIZED)
            tl.store(p_merged_size + b * merged + e, size_e, mask=e < prefix)
    if not ONE:
        tl.debug_barrier()  # orders the program's own match, stored above and read below
    inverse_n = 1.0 / tl.where(b_mask, n, 1.0)

    for step in range(0, steps):
        d = ((part * steps + step) * BD + tl.arange(0, BD)).to(tl.int64)
        d_mask = d < dim
        # Asked for first, so that a step waits once.
        mask = b_mask[:, None] & d_mask[None, :]
        x_b = tl.load(p_x + token_b[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask, other=0.0)
        e = tl.arange(0, 16).to(tl.int64)
        mask_e = (e < prefix)[:, None] & d_mask[None, :]
        x_e = tl.load(p_x + e[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask_e, other=0.0)
        total = tl.zeros((BB, BD), tl.float32)
        if ONE:
            x_a = tl.load(
                p_x + token_a[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=a_mask[:, None] & d_mask[None, :], other=0.0
            )
            into = (i_best[None, :] == j[:, None]) & a_mask[None, :]
            total = _gather_sources(into, x_a, size_a, total, SIZED, PARTS)
        else:
            for start in range(0, num_a, BA):
                i = start + tl.arange(0, BA)
                a_mask = i < num_a
                token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
                x_a = tl.load(
                    p_x + token_a[:, None] * stride_x_n + d[None, :] * stride_x_d,
                    mask=a_mask[:, None] & d_mask[None, :],
                    other=0.0,
                )
                match = tl.load(p_own_match + i, mask=a_mask, other=-1)
                size_a = _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)
                total = _gather_sources(match[None, :] == j[:, None], x_a, size_a, total, SIZED, PARTS)
        total += x_b.to(tl.float32) * size_b[:, None]
        if x_b.dtype == tl.float32:
            value = tl.div_rn(total, tl.broadcast_to(tl.where(b_mask, n, 1.0)[:, None], (BB, BD)))
        else:
            value = total * inverse_n[:, None]
        store(p_tokens + (b * merged + prefix + j)[:, None] * dim + d[None, :], value, mask)
        tl.store(p_tokens + (b * merged + e)[:, None] * dim + d[None, :], x_e, mask=mask_e)
        for start in range(16, prefix, 16):
            more = (start + tl.arange(0, 16)).to(tl.int64)
            mask_more = (more < prefix)[:, None] & d_mask[None, :]
            x_more = tl.load(p_x + more[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask_more, other=0.0)
            tl.store(p_tokens + (b * merged + more)[:, None] * dim + d[None, :], x_more, mask=mask_more)
