"""Tiled kernels: any number of tokens, any C, D and hidden width, every dtype. Extra memory grows with N.

Forward: ``prepare_keys`` → ``match_tiles`` → (torch sorts the match) → ``merge_lists``.
Backward: ``spread_gradient_kernel`` is all of it without a key path; with one, ``prepare_backward`` → ``row_pass`` →
``column_pass`` → ``refined_gradient`` → ``weight_partials`` → ``reduce_partials``, and ``attached_gradient`` for a key that is
refined and not detached.

Sizes that change from call to call, or with the resolution, are not specialised: another batch compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    exact_dot,
    inverse_norm,
    load_key,
    load_matrix,
    merged_token,
    reciprocal,
    row_token,
    second_column,
    soft_slope,
    source_token,
    split_scalar,
    square_root,
    store,
    top_two,
    wide,
    zeros,
)


@triton.jit
def _hidden(
    p_key, stride_key_h, stride_key_n, stride_key_c, heads, p_down, stride_down_h, stride_down_c, p_mask, stride_mask_n,
    stride_mask_h, tokens, row_mask, h, hidden, channels,
    BC: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """pre = key W_downᵀ and the dropout mask, both [rows, h], of one image."""
    pre = zeros((tokens.shape[0], h.shape[0]), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        key = load_key(p_key, stride_key_h, stride_key_n, stride_key_c, heads, tokens, row_mask, c, channels, DOUBLE)
        down = load_matrix(p_down, c, channels, stride_down_c, h, hidden, stride_down_h, DOUBLE)  # [BC, BH]
        pre = exact_dot(key, down, pre, SPLIT)
    return pre, _dropout(p_mask, stride_mask_n, stride_mask_h, tokens, row_mask, h, hidden, MASKED, DOUBLE)


@triton.jit
def _dropout(p_mask, stride_mask_n, stride_mask_h, tokens, row_mask, h, hidden, MASKED: tl.constexpr, DOUBLE: tl.constexpr):
    """The dropout mask [rows, h], ones where there is none."""
    if MASKED:
        pointers = p_mask + tokens[:, None] * stride_mask_n + h.to(tl.int64)[None, :] * stride_mask_h
        return wide(tl.load(pointers, mask=row_mask[:, None] & (h < hidden)[None, :], other=0.0), DOUBLE)
    else:
        return zeros((tokens.shape[0], h.shape[0]), DOUBLE) + 1.0


@triton.jit
def _prepare_rows(
    p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_prepared, p_norm, p_mean,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, heads, hidden, scale_high, scale_low, program,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr, MEAN: tl.constexpr,
    DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """k' of BR rows, sources then destinations, (B, N_A + N_B, C) without gaps, and its norm. RAW: the key itself, copied.

    WHOLE: C and the hidden units fit into one block each. MEAN: also the key averaged over heads, (B, N, C), but its prefix
    tokens.
    """
    blocks = tl.cdiv(num_rows, BR)
    b = (program // blocks).to(tl.int64)
    r = (program % blocks) * BR + tl.arange(0, BR)
    row_mask = r < num_rows
    tokens = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
    scale = split_scalar(scale_high, scale_low, DOUBLE)
    p_key += b * stride_key_b
    p_delta += b * stride_delta_b
    p_mask += b * stride_mask_b
    row = b * num_rows + r

    squares = zeros((BR,), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        mask = row_mask[:, None] & (c < channels)[None, :]
        if RAW:
            raw = tl.load(p_key + tokens[:, None] * stride_key_n + c.to(tl.int64)[None, :] * stride_key_c, mask=mask, other=0.0)
            tl.store(p_prepared + row[:, None] * channels + c[None, :], raw, mask=mask)
            refined = wide(raw, DOUBLE)
        else:
            refined = load_key(p_key, stride_key_h, stride_key_n, stride_key_c, heads, tokens, row_mask, c, channels, DOUBLE, 4)
            if MEAN:
                at_mean = (b * (prefix + num_rows) + tokens)[:, None] * channels + c[None, :]
                tl.store(p_mean + at_mean, refined, mask=mask)
            if REFINED:
                up = zeros((BR, BC), DOUBLE)
                for h_start in range(0, BH if WHOLE else hidden, BH):
                    h = h_start + tl.arange(0, BH)
                    if WHOLE:
                        down = load_matrix(p_down, c, channels, stride_down_c, h, hidden, stride_down_h, DOUBLE)
                        pre = exact_dot(refined, down, zeros((BR, BH), DOUBLE), SPLIT)
                        keep = _dropout(p_mask, stride_mask_n, stride_mask_h, tokens, row_mask, h, hidden, MASKED, DOUBLE)
                    else:
                        pre, keep = _hidden(
                            p_key, stride_key_h, stride_key_n, stride_key_c, heads, p_down, stride_down_h, stride_down_c,
                            p_mask, stride_mask_n, stride_mask_h, tokens, row_mask, h, hidden, channels, BC, MASKED, WHOLE,
                            DOUBLE, SPLIT,
                        )  # fmt: skip
                    w_up = load_matrix(p_up, h, hidden, stride_up_h, c, channels, stride_up_c, DOUBLE)  # [BH, BC]
                    up = exact_dot(tl.maximum(pre, 0.0) * keep, w_up, up, SPLIT)
                refined += scale * up
            if DELTA:
                pointers = p_delta + tokens[:, None] * stride_delta_n + c.to(tl.int64)[None, :] * stride_delta_c
                refined += wide(tl.load(pointers, mask=mask, other=0.0), DOUBLE)
            tl.store(p_prepared + row[:, None] * channels + c[None, :], refined, mask=mask)
        squares += tl.sum(refined * refined, axis=1)
    if COSINE:
        tl.store(p_norm + row, square_root(squares), mask=row_mask)


@triton.jit(do_not_specialize=["num_a", "num_rows", "width"])
def prepare_keys(
    p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_prepared, p_norm,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, heads, hidden, scale_high, scale_low,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """k' of every row and its norm."""
    _prepare_rows(
        p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_prepared, p_norm, p_norm,
        stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
        num_a, num_rows, prefix, width, channels, heads, hidden, scale_high, scale_low, tl.program_id(0),
        BR, BC, BH, LISTED, REFINED, MASKED, DELTA, COSINE, RAW, WHOLE, False, DOUBLE, SPLIT,
    )  # fmt: skip


@triton.jit
def _scores(
    p_prepared, p_norm, image_row, r_a, a_mask, r_b, b_mask, channels,
    BC: tl.constexpr, COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """[sources, destinations] scores of one tile; ``image_row`` is the image's first row."""
    scores = zeros((r_a.shape[0], r_b.shape[0]), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        c_mask = c < channels
        key_a = tl.load(
            p_prepared + (image_row + r_a)[:, None] * channels + c[None, :], mask=a_mask[:, None] & c_mask[None, :], other=0.0
        )
        key_b = tl.load(
            p_prepared + (image_row + r_b)[None, :] * channels + c[:, None], mask=b_mask[None, :] & c_mask[:, None], other=0.0
        )
        scores = exact_dot(key_a, key_b, scores, SPLIT)
    if COSINE:
        inverse_a = inverse_norm(tl.load(p_norm + image_row + r_a, mask=a_mask, other=1.0))
        inverse_b = inverse_norm(tl.load(p_norm + image_row + r_b, mask=b_mask, other=1.0))
        scores = scores * inverse_a[:, None] * inverse_b[None, :]
    return scores


@triton.jit(do_not_specialize=["num_a", "num_b"])
def match_tiles(
    p_prepared, p_norm, p_match, p_second, p_mid, num_a, num_b, prefix, channels,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """match, second, mid of BA sources: all destinations pass by in tiles, the two best so far are kept."""
    blocks = tl.cdiv(num_a, BA)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BA + tl.arange(0, BA)
    a_mask = i < num_a
    image_row = b * (num_a + num_b)

    best = zeros((BA,), DOUBLE) - float("inf")
    second = best
    i_best = tl.zeros((BA,), tl.int32)
    i_second = tl.zeros((BA,), tl.int32)
    for start in range(0, num_b, BB):
        j = start + tl.arange(0, BB)
        scores = _scores(
            p_prepared, p_norm, image_row, i, a_mask, num_a + j, j < num_b, channels, BC, COSINE, WHOLE, DOUBLE, SPLIT
        )
        tile_best, i_tile_best, tile_second, i_tile_second = top_two(scores, num_b - start)
        # What came earlier has lower columns and wins ties.
        wins = tile_best > best
        old_is_second = best >= tile_second
        new_is_second = tile_best > second
        second, i_second = (
            tl.where(wins, tl.where(old_is_second, best, tile_second), tl.where(new_is_second, tile_best, second)),
            tl.where(
                wins,
                tl.where(old_is_second, i_best, start + i_tile_second),
                tl.where(new_is_second, start + i_tile_best, i_second),
            ),
        )
        best = tl.where(wins, tile_best, best)
        i_best = tl.where(wins, start + i_tile_best, i_best)

    at = b * num_a + i
    tl.store(p_match + at, (prefix + i_best).to(tl.int64), mask=a_mask)
    tl.store(p_second + at, (prefix + second_column(second, i_second, i_best)).to(tl.int64), mask=a_mask)
    tl.store(p_mid + at, (best + second) * 0.5, mask=a_mask)


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
                mask=t_mask[:, None] & d_mask[None, :], other=0.0,
            ), DOUBLE,
        )  # fmt: skip
        if SIZED:
            sizes = wide(tl.load(p_size + tokens * stride_size_n, mask=t_mask, other=0.0), DOUBLE)
        else:
            sizes = wide(t_mask, DOUBLE)
        total += tl.sum(x * sizes[:, None], axis=0)
        size += tl.sum(sizes, axis=0)
        at += BT
    if DOUBLE:
        value = total / size
    else:
        value = tl.div_rn(total, zeros((BD,), DOUBLE) + size)
    store(p_tokens + row * dim + d, value, d_mask)
    if d_block == 0:
        tl.store(p_merged_size + row, size)


@triton.jit
def spread_gradient(
    p_grad, p_grad_size, p_x, p_size, p_tokens, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
    stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d,
    num_a, merged, prefix, width, dim, program,
    BR: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, GRAD_SIZE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """dx_t = size_t g_{e(t)} and dsize_t = γ_e + G_e · (x_t − y_e) / n_e, e(t) the merged row that token t went into.

    Rows: kept tokens first (merged order), then sources.
    """
    tokens_in = merged + num_a
    blocks = tl.cdiv(tokens_in, BR)
    b = (program // blocks).to(tl.int64)
    r = (program % blocks) * BR + tl.arange(0, BR)
    row_mask = r < tokens_in
    is_kept = r < merged
    is_source = row_mask & (r >= merged)
    i = tl.maximum(r - merged, 0)
    kept = merged_token(r, row_mask & is_kept, p_split_b, prefix, width, LISTED)
    source = source_token(i, is_source, p_split_a, prefix, width, LISTED)
    token = tl.where(is_kept, kept, source)
    match = tl.load(p_match + b * num_a + i, mask=is_source, other=0)
    e = tl.where(is_kept, r.to(tl.int64), match)

    n = wide(tl.load(p_merged_size + b * merged + e, mask=row_mask, other=1.0), DOUBLE)
    if SIZED:
        size = wide(tl.load(p_size + b * stride_size_b + token * stride_size_n, mask=row_mask, other=1.0), DOUBLE)
    else:
        size = zeros((BR,), DOUBLE) + 1.0
    ratio = size / n
    p_grad += b * stride_grad_b
    p_x += b * stride_x_b
    p_tokens += b * stride_tok_b
    dot = zeros((BR,), DOUBLE)
    for d_start in range(0, dim, BD):
        d = (d_start + tl.arange(0, BD)).to(tl.int64)
        mask = row_mask[:, None] & (d < dim)[None, :]
        grad = wide(tl.load(p_grad + e[:, None] * stride_grad_e + d[None, :] * stride_grad_d, mask=mask, other=0.0), DOUBLE)
        if NEED_SIZE:
            x = wide(tl.load(p_x + token[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask, other=0.0), DOUBLE)
            y = wide(tl.load(p_tokens + e[:, None] * stride_tok_e + d[None, :] * stride_tok_d, mask=mask, other=0.0), DOUBLE)
            dot += tl.sum(grad * (x - y), axis=1)
        if NEED_X:
            store(p_grad_x + (b * tokens_in + token)[:, None] * dim + d[None, :], grad * ratio[:, None], mask)
    if NEED_SIZE:
        dot = dot / n
        if GRAD_SIZE:
            dot += wide(tl.load(p_grad_size + b * stride_gs_b + e * stride_gs_e, mask=row_mask, other=0.0), DOUBLE)
        store(p_grad_in_size + b * tokens_in + token, dot, row_mask)


@triton.jit(do_not_specialize=["num_a", "merged", "width", "stride_size_b", "stride_gs_b"])
def spread_gradient_kernel(
    p_grad, p_grad_size, p_x, p_size, p_tokens, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
    stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d,
    num_a, merged, prefix, width, dim,
    BR: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, GRAD_SIZE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The whole backward where no gradient reaches the key path: a gather."""
    spread_gradient(
        p_grad, p_grad_size, p_x, p_size, p_tokens, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
        stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
        stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d,
        num_a, merged, prefix, width, dim, tl.program_id(0), BR, BD, LISTED, SIZED, GRAD_SIZE, NEED_X, NEED_SIZE, DOUBLE,
    )  # fmt: skip


@triton.jit
def merged_size_gradient(
    p_grad, p_grad_size, p_tokens, p_merged_size, stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e,
    stride_tok_b, stride_tok_e, stride_tok_d, b, j, row_mask, merged, prefix, dim,
    BD: tl.constexpr, GRAD_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """γ'_j = γ_j − (G_j · y_j) / n_j of destinations ``j``."""
    e = (prefix + j).to(tl.int64)
    p_grad += b * stride_grad_b
    p_tokens += b * stride_tok_b
    dot = zeros((j.shape[0],), DOUBLE)
    for d_start in range(0, dim, BD):
        d = (d_start + tl.arange(0, BD)).to(tl.int64)
        mask = row_mask[:, None] & (d < dim)[None, :]
        grad = tl.load(p_grad + e[:, None] * stride_grad_e + d[None, :] * stride_grad_d, mask=mask, other=0.0)
        y = tl.load(p_tokens + e[:, None] * stride_tok_e + d[None, :] * stride_tok_d, mask=mask, other=0.0)
        dot += tl.sum(wide(grad, DOUBLE) * wide(y, DOUBLE), axis=1)
    out = -dot / wide(tl.load(p_merged_size + b * merged + e, mask=row_mask, other=1.0), DOUBLE)
    if GRAD_SIZE:
        out += wide(tl.load(p_grad_size + b * stride_gs_b + e * stride_gs_e, mask=row_mask, other=0.0), DOUBLE)
    return out


@triton.jit(do_not_specialize=["num_a", "num_rows", "width", "stride_gs_b", "size_programs"])
def prepare_backward(
    p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_prepared, p_norm, p_mean,
    p_grad, p_grad_size, p_tokens, p_merged_size, p_gamma,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_tok_b, stride_tok_e, stride_tok_d,
    num_a, num_rows, prefix, width, dim, channels, heads, hidden, scale_high, scale_low, size_programs,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr,
    MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr,
    MEAN: tl.constexpr, GRAD_SIZE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What every later kernel reads: the first ``size_programs`` programs form γ', the others k', its norm and the mean key."""
    if tl.program_id(0) < size_programs:
        num_b = num_rows - num_a
        blocks = tl.cdiv(num_b, BR)
        b = (tl.program_id(0) // blocks).to(tl.int64)
        j = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
        gamma = merged_size_gradient(
            p_grad, p_grad_size, p_tokens, p_merged_size, stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e,
            stride_tok_b, stride_tok_e, stride_tok_d, b, j, j < num_b, prefix + num_b, prefix, dim, BD, GRAD_SIZE, DOUBLE,
        )  # fmt: skip
        tl.store(p_gamma + b * num_b + j, gamma, mask=j < num_b)
    else:
        _prepare_rows(
            p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_prepared, p_norm, p_mean,
            stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
            stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
            num_a, num_rows, prefix, width, channels, heads, hidden, scale_high, scale_low,
            tl.program_id(0) - size_programs,
            BR, BC, BH, LISTED, REFINED, MASKED, DELTA, COSINE, RAW, WHOLE, MEAN, DOUBLE, SPLIT,
        )  # fmt: skip


@triton.jit
def _score_gradient(
    p_grad, p_x, p_size, p_merged_size, p_gamma, p_prepared, p_norm, p_mid, p_split_a,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    b, i, j, num_a, num_b, prefix, width, dim, channels,
    BC: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, COSINE: tl.constexpr,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """[sources, destinations] tile of dM ⊙ p (1 − p), before the mean of the two best takes its share; zero outside."""
    a_mask = i < num_a
    b_mask = j < num_b
    token = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
    e = (prefix + j).to(tl.int64)
    grad_m = zeros((i.shape[0], j.shape[0]), DOUBLE)
    for d_start in range(0, dim, BD):
        d = (d_start + tl.arange(0, BD)).to(tl.int64)
        d_mask = d < dim
        x = tl.load(
            p_x + b * stride_x_b + token[:, None] * stride_x_n + d[None, :] * stride_x_d,
            mask=a_mask[:, None] & d_mask[None, :], other=0.0,
        )  # fmt: skip
        grad = tl.load(
            p_grad + b * stride_grad_b + e[None, :] * stride_grad_e + d[:, None] * stride_grad_d,
            mask=b_mask[None, :] & d_mask[:, None], other=0.0,
        )  # fmt: skip
        if DOUBLE:
            grad_m = exact_dot(wide(x, DOUBLE), wide(grad, DOUBLE), grad_m, SPLIT)
        else:
            grad_m = exact_dot(x, grad, grad_m, SPLIT)
    n = wide(tl.load(p_merged_size + b * (prefix + num_b) + e, mask=b_mask, other=1.0), DOUBLE)
    gamma = tl.load(p_gamma + b * num_b + j, mask=b_mask, other=0.0)
    grad_m = grad_m / n[None, :] + gamma[None, :]
    if SIZED:
        size = tl.load(p_size + b * stride_size_b + token * stride_size_n, mask=a_mask, other=0.0)
        grad_m = grad_m * wide(size, DOUBLE)[:, None]
    scores = _scores(
        p_prepared, p_norm, b * (num_a + num_b), i, a_mask, num_a + j, b_mask, channels, BC, COSINE, WHOLE, DOUBLE, SPLIT
    )
    mid = tl.load(p_mid + b * num_a + i, mask=a_mask, other=0.0)
    return tl.where(a_mask[:, None] & b_mask[None, :], grad_m * soft_slope(scores, mid[:, None]), 0.0)


@triton.jit
def _unit_keys(p_prepared, p_norm, image_row, r, mask, c, channels, COSINE: tl.constexpr, DOUBLE: tl.constexpr):
    """k̂ of some rows, and 1 / max(‖k'‖, ε)."""
    keys = tl.load(
        p_prepared + (image_row + r)[:, None] * channels + c[None, :], mask=mask[:, None] & (c < channels)[None, :], other=0.0
    )
    keys = wide(keys, DOUBLE)
    if COSINE:
        keys = keys * inverse_norm(tl.load(p_norm + image_row + r, mask=mask, other=1.0))[:, None]
    return keys


@triton.jit(do_not_specialize=["num_a", "num_b", "width", "stride_size_b"])
def row_pass(
    p_grad, p_x, p_size, p_merged_size, p_gamma, p_prepared, p_norm, p_match, p_second, p_mid, p_split_a, p_share, p_unit_grad,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    num_a, num_b, prefix, width, dim, channels,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr,
    COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk̂ of BA sources, and ½ Σ_j ds_ij, which the mean of the two best takes from its two entries."""
    blocks = tl.cdiv(num_a, BA)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BA + tl.arange(0, BA)
    a_mask = i < num_a
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image_row = b * (num_a + num_b)
    unit_grad = zeros((BA, BC), DOUBLE)
    share = zeros((BA,), DOUBLE)
    for start in range(0, num_b, BB):
        j = start + tl.arange(0, BB)
        grad_s = _score_gradient(
            p_grad, p_x, p_size, p_merged_size, p_gamma, p_prepared, p_norm, p_mid, p_split_a,
            stride_grad_b, stride_grad_e, stride_grad_d, stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
            b, i, j, num_a, num_b, prefix, width, dim, channels, BC, BD, LISTED, SIZED, COSINE, WHOLE, DOUBLE, SPLIT,
        )  # fmt: skip
        share += tl.sum(grad_s, axis=1)
        unit = _unit_keys(p_prepared, p_norm, image_row, num_a + j, j < num_b, c, channels, COSINE, DOUBLE)
        unit_grad = exact_dot(grad_s, unit, unit_grad, SPLIT)
    share = share * 0.5
    for which in tl.static_range(2):
        p_two = p_match if which == 0 else p_second
        two = (tl.load(p_two + b * num_a + i, mask=a_mask, other=prefix) - prefix).to(tl.int32)
        unit_grad -= share[:, None] * _unit_keys(
            p_prepared, p_norm, image_row, num_a + two, a_mask, c, channels, COSINE, DOUBLE
        )
    tl.store(
        p_unit_grad + (image_row + i)[:, None] * channels + c[None, :],
        unit_grad,
        mask=a_mask[:, None] & (c < channels)[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(p_share + b * num_a + i, share, mask=a_mask)


@triton.jit(do_not_specialize=["num_a", "num_b", "width", "stride_size_b"])
def column_pass(
    p_grad, p_x, p_size, p_merged_size, p_gamma, p_prepared, p_norm, p_match, p_second, p_mid, p_split_a, p_share, p_unit_grad,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    num_a, num_b, prefix, width, dim, channels,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr,
    COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk̂ of BB destinations; the shares come from the row pass."""
    blocks = tl.cdiv(num_b, BB)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BB + tl.arange(0, BB)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image_row = b * (num_a + num_b)
    unit_grad = zeros((BB, BC), DOUBLE)
    for start in range(0, num_a, BA):
        i = start + tl.arange(0, BA)
        a_mask = i < num_a
        grad_s = _score_gradient(
            p_grad, p_x, p_size, p_merged_size, p_gamma, p_prepared, p_norm, p_mid, p_split_a,
            stride_grad_b, stride_grad_e, stride_grad_d, stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
            b, i, j, num_a, num_b, prefix, width, dim, channels, BC, BD, LISTED, SIZED, COSINE, WHOLE, DOUBLE, SPLIT,
        )  # fmt: skip
        share = tl.load(p_share + b * num_a + i, mask=a_mask, other=0.0)
        best = tl.load(p_match + b * num_a + i, mask=a_mask, other=-1) - prefix
        second = tl.load(p_second + b * num_a + i, mask=a_mask, other=-1) - prefix
        is_two = (best[:, None] == j[None, :]) | (second[:, None] == j[None, :])
        grad_s = tl.where(is_two, grad_s - share[:, None], grad_s)
        unit = _unit_keys(p_prepared, p_norm, image_row, i, a_mask, c, channels, COSINE, DOUBLE)
        unit_grad = exact_dot(tl.trans(grad_s), unit, unit_grad, SPLIT)
    tl.store(
        p_unit_grad + (image_row + num_a + j)[:, None] * channels + c[None, :], unit_grad,
        mask=(j < num_b)[:, None] & (c < channels)[None, :],
    )  # fmt: skip


@triton.jit
def _rows_of_image(program, num_a, num_rows, prefix, width, p_split_a, p_split_b, BR: tl.constexpr, LISTED: tl.constexpr):
    """BR tokens of an image, prefix tokens, sources, destinations: image; row, and which have one; token, and which are one."""
    tokens_in = prefix + num_rows
    blocks = tl.cdiv(tokens_in, BR)
    b = (program // blocks).to(tl.int64)
    all_rows = (program % blocks) * BR + tl.arange(0, BR)
    in_image = all_rows < tokens_in
    r = tl.maximum(all_rows - prefix, 0)
    token = tl.where(
        all_rows < prefix, all_rows.to(tl.int64), row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
    )
    return b, r, in_image & (all_rows >= prefix), token, in_image


@triton.jit(do_not_specialize=["num_a", "num_rows", "width"])
def refined_gradient(
    p_unit_grad, p_prepared, p_norm, p_split_a, p_split_b, p_grad_refined, p_grad_key,
    num_a, num_rows, prefix, width, channels, heads,
    BR: tl.constexpr, BC: tl.constexpr, LISTED: tl.constexpr, COSINE: tl.constexpr, KEEP: tl.constexpr,
    NEED_REFINED: tl.constexpr, NEED_KEY: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """dk' = (dk̂ − k̂ (k̂ · dk̂)) / ‖k'‖, in token order to grad_refined and grad_key, with 0 for prefix tokens.

    KEEP: also over dk̂, for the kernels that go on through the refinement.
    """
    b, r, row_mask, token, in_image = _rows_of_image(
        tl.program_id(0), num_a, num_rows, prefix, width, p_split_a, p_split_b, BR, LISTED
    )
    if COSINE:
        norm = tl.load(p_norm + b * num_rows + r, mask=row_mask, other=1.0)
        inverse = inverse_norm(norm)
        dot = zeros((BR,), DOUBLE)
        for c_start in range(0, channels, BC):
            c = c_start + tl.arange(0, BC)
            mask = row_mask[:, None] & (c < channels)[None, :]
            at = (b * num_rows + r)[:, None] * channels + c[None, :]
            grad = tl.load(p_unit_grad + at, mask=mask, other=0.0)
            keys = tl.load(p_prepared + at, mask=mask, other=0.0)
            dot += tl.sum(wide(keys, DOUBLE) * grad, axis=1)
        # A norm at its floor is a constant, and nothing flows through it.
        dot = tl.where(norm > 1e-12, dot * inverse * inverse, 0.0)
    for c_start in range(0, channels, BC):
        c = c_start + tl.arange(0, BC)
        mask = row_mask[:, None] & (c < channels)[None, :]
        at = (b * num_rows + r)[:, None] * channels + c[None, :]
        grad = tl.load(p_unit_grad + at, mask=mask, other=0.0)
        if COSINE:
            keys = wide(tl.load(p_prepared + at, mask=mask, other=0.0), DOUBLE)
            grad = (grad - keys * dot[:, None]) * inverse[:, None]
        if KEEP:
            tl.store(p_unit_grad + at, grad, mask=mask)
        out = (b * (prefix + num_rows) + token)[:, None] * channels + c[None, :]
        out_mask = in_image[:, None] & (c < channels)[None, :]
        if NEED_REFINED:
            store(p_grad_refined + out, grad, out_mask)
        if NEED_KEY:
            store(p_grad_key + out, grad * reciprocal(heads, DOUBLE), out_mask)


@triton.jit(do_not_specialize=["num_a", "num_rows", "width"])
def attached_gradient(
    p_refined_grad, p_key, p_down, p_up, p_mask, p_split_a, p_split_b, p_grad_key,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h,
    stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, heads, out_heads, hidden, scale_high, scale_low,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk = dk' + dhidden W_down: the gradient of a key that was refined and is not detached; 0 for prefix tokens."""
    b, r, row_mask, token, in_image = _rows_of_image(
        tl.program_id(0), num_a, num_rows, prefix, width, p_split_a, p_split_b, BR, LISTED
    )
    image_row = b * num_rows
    scale = split_scalar(scale_high, scale_low, DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        c_mask = c < channels
        at = (image_row + r)[:, None] * channels + c[None, :]
        grad = tl.load(p_refined_grad + at, mask=row_mask[:, None] & c_mask[None, :], other=0.0)
        for h_start in range(0, BH if WHOLE else hidden, BH):
            h = h_start + tl.arange(0, BH)
            hidden_grad, _ = _hidden_gradient(
                p_refined_grad, p_key, p_down, p_up, p_mask, stride_key_b, stride_key_h, stride_key_n, stride_key_c,
                stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
                b, image_row, r, row_mask, token, h, channels, heads, hidden, scale, BC, MASKED, WHOLE, DOUBLE, SPLIT,
            )  # fmt: skip
            down = load_matrix(p_down, h, hidden, stride_down_h, c, channels, stride_down_c, DOUBLE)  # [BH, BC]
            grad = exact_dot(hidden_grad, down, grad, SPLIT)
        out = (b * (prefix + num_rows) + token)[:, None] * channels + c[None, :]
        store(p_grad_key + out, grad * reciprocal(out_heads, DOUBLE), in_image[:, None] & c_mask[None, :])


@triton.jit
def _hidden_gradient(
    p_refined_grad, p_key, p_down, p_up, p_mask, stride_key_b, stride_key_h, stride_key_n, stride_key_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    b, image_row, r, row_mask, token, h, channels, heads, hidden, scale,
    BC: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dhidden = scale · dk' W_up ⊙ mask ⊙ [pre > 0], and the hidden units themselves, both [rows, h]."""
    pre, keep = _hidden(
        p_key + b * stride_key_b, stride_key_h, stride_key_n, stride_key_c, heads, p_down, stride_down_h, stride_down_c,
        p_mask + b * stride_mask_b, stride_mask_n, stride_mask_h, token, row_mask, h, hidden, channels, BC, MASKED, WHOLE,
        DOUBLE, SPLIT,
    )  # fmt: skip
    through = zeros((r.shape[0], h.shape[0]), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        grad = tl.load(
            p_refined_grad + (image_row + r)[:, None] * channels + c[None, :],
            mask=row_mask[:, None] & (c < channels)[None, :], other=0.0,
        )  # fmt: skip
        up = load_matrix(p_up, c, channels, stride_up_c, h, hidden, stride_up_h, DOUBLE)  # [BC, BH]
        through = exact_dot(grad, up, through, SPLIT)
    return tl.where(pre > 0, through * keep * scale, 0.0), tl.maximum(pre, 0.0) * keep


@triton.jit(do_not_specialize=["num_a", "num_rows", "width", "rows_per_program"])
def weight_partials(
    p_refined_grad, p_key, p_down, p_up, p_mask, p_split_a, p_split_b, p_partial,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h,
    stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, heads, hidden, scale_high, scale_low, rows_per_program,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program's part of dW_downᵀ and dW_up, both laid out (C, h): partial[program, 0 or 1, C, h]."""
    pieces = tl.cdiv(num_rows, rows_per_program)
    b = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces) * rows_per_program
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    c_mask = c < channels
    image_row = b * num_rows
    scale = split_scalar(scale_high, scale_low, DOUBLE)
    down_grad = zeros((BC, BH), DOUBLE)
    up_grad = zeros((BC, BH), DOUBLE)
    for start in range(0, rows_per_program, BR):
        r = first + start + tl.arange(0, BR)
        row_mask = (r < num_rows) & (start + tl.arange(0, BR) < rows_per_program)
        token = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
        hidden_grad, units = _hidden_gradient(
            p_refined_grad, p_key, p_down, p_up, p_mask, stride_key_b, stride_key_h, stride_key_n, stride_key_c,
            stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
            b, image_row, r, row_mask, token, h, channels, heads, hidden, scale, BC, MASKED, WHOLE, DOUBLE, SPLIT,
        )  # fmt: skip
        key = load_key(
            p_key + b * stride_key_b, stride_key_h, stride_key_n, stride_key_c, heads, token, row_mask, c, channels, DOUBLE
        )
        grad = tl.load(
            p_refined_grad + (image_row + r)[:, None] * channels + c[None, :],
            mask=row_mask[:, None] & c_mask[None, :],
            other=0.0,
        )
        down_grad = exact_dot(tl.trans(key), hidden_grad, down_grad, SPLIT)
        up_grad = exact_dot(tl.trans(grad * scale), units, up_grad, SPLIT)
    out_mask = c_mask[:, None] & (h < hidden)[None, :]
    out = tl.program_id(0).to(tl.int64) * 2 * channels * hidden + c[:, None] * hidden + h[None, :]
    tl.store(p_partial + out, down_grad, mask=out_mask)
    tl.store(p_partial + out + channels * hidden, up_grad, mask=out_mask)


@triton.jit(do_not_specialize=["pieces"])
def reduce_partials(
    p_partial, p_grad_down, p_grad_up, pieces, channels, hidden, BP: tl.constexpr, BE: tl.constexpr, DOUBLE: tl.constexpr
):
    """dW_down (h, C) and dW_up (C, h): the partial sums added up in the order of the programs that made them."""
    elements = 2 * channels * hidden
    at = tl.program_id(0) * BE + tl.arange(0, BE)
    mask = at < elements
    total = zeros((BE,), DOUBLE)
    for start in range(0, pieces, BP):
        piece = start + tl.arange(0, BP)
        part = tl.load(
            p_partial + piece.to(tl.int64)[:, None] * elements + at[None, :],
            mask=(piece < pieces)[:, None] & mask[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(part, axis=0)
    is_down = at < channels * hidden
    c, h = at // hidden % channels, at % hidden
    store(p_grad_down + h * channels + c, total, mask & is_down)
    store(p_grad_up + tl.maximum(at - channels * hidden, 0), total, mask & (at >= channels * hidden))
