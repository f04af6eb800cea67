"""Fused kernels for short grids: up to 256 sources and 256 destinations.

The scores of one block of sources against all destinations live in registers and never leave the chip. Forward: one launch;
blocks of sources follow one another, and at up to 128 sources there is one block (ONE) whose match stays in registers too.
Backward: one launch; programs of one image each go down the key path, as far as the image's part of the weight gradients, and
others gather dx and dsize.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .long import merged_size_gradient, spread_gradient
from .primitives import (
    NORM_EPS,
    destination_token,
    dot_of_parts,
    exact_dot,
    inverse_norm,
    load_key,
    load_matrix,
    reciprocal,
    row_token,
    second_column,
    soft_slope,
    source_token,
    split_float32,
    split_scalar,
    square_root,
    store,
    to_bfloat16,
    top_two,
)


@triton.jit
def _hidden_units(
    key, p_down, p_mask, stride_down_h, stride_down_c, stride_mask_n, stride_mask_h, tokens, row_mask, c, channels, h, hidden,
    MASKED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """pre = key W_downᵀ, and the units ReLU(pre) ⊙ mask with the mask itself, all [rows, h]."""
    down = load_matrix(p_down, c, channels, stride_down_c, h, hidden, stride_down_h, False)  # [BC, BH]
    pre = exact_dot(key, down, tl.zeros((key.shape[0], h.shape[0]), tl.float32), SPLIT)
    if MASKED:
        pointers = p_mask + tokens[:, None] * stride_mask_n + h.to(tl.int64)[None, :] * stride_mask_h
        keep = tl.load(pointers, mask=row_mask[:, None] & (h < hidden)[None, :], other=0.0).to(tl.float32)
        units = tl.maximum(pre, 0.0) * keep
    else:
        keep = pre
        units = tl.maximum(pre, 0.0)
    return pre, keep, units


@triton.jit
def _refined_key(
    p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h,
    tokens, row_mask, channels, heads, hidden, scale,
    BC: tl.constexpr, BH: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr, RAW: tl.constexpr,
    SPLIT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """k' [rows, C] of one image, and the key that it was made of. RAW: the 16-bit key as it is."""
    c = tl.arange(0, BC)
    mask = row_mask[:, None] & (c < channels)[None, :]
    if RAW:
        key = tl.load(p_key + tokens[:, None] * stride_key_n + c.to(tl.int64)[None, :] * stride_key_c, mask=mask, other=0.0)
        refined = key
    else:
        key = load_key(p_key, stride_key_h, stride_key_n, stride_key_c, heads, tokens, row_mask, c, channels, False, AT_ONCE)
        refined = key
        if REFINED:
            h = tl.arange(0, BH)
            _, _, units = _hidden_units(
                key, p_down, p_mask, stride_down_h, stride_down_c, stride_mask_n, stride_mask_h, tokens, row_mask, c,
                channels, h, hidden, MASKED, SPLIT,
            )  # fmt: skip
            w_up = load_matrix(p_up, h, hidden, stride_up_h, c, channels, stride_up_c, False)  # [BH, BC]
            refined += scale * exact_dot(units, w_up, tl.zeros((tokens.shape[0], BC), tl.float32), SPLIT)
        if DELTA:
            pointers = p_delta + tokens[:, None] * stride_delta_n + c.to(tl.int64)[None, :] * stride_delta_c
            refined += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return refined, key


@triton.jit
def _norm(key):
    """‖k'‖ of rows [rows, C]."""
    whole = key.to(tl.float32)
    return square_root(tl.sum(whole * whole, axis=1))


@triton.jit
def _inverse_norm(key, COSINE: tl.constexpr):
    """1 / max(‖k'‖, ε) of rows [rows, C]; 1 where nothing is divided."""
    if COSINE:
        return inverse_norm(_norm(key))
    else:
        return tl.full((key.shape[0],), 1.0, tl.float32)


@triton.jit
def _scores(key_a, inverse_a, key_b, inverse_b, COSINE: tl.constexpr, SPLIT: tl.constexpr):
    scores = exact_dot(key_a, tl.trans(key_b), tl.zeros((key_a.shape[0], key_b.shape[0]), tl.float32), SPLIT)
    if COSINE:
        scores = scores * inverse_a[:, None] * inverse_b[None, :]
    return scores


@triton.jit
def _row_sizes(p_size, stride_size_n, tokens, mask, SIZED: tl.constexpr):
    if SIZED:
        return tl.load(p_size + tokens * stride_size_n, mask=mask, other=0.0).to(tl.float32)
    else:
        return mask.to(tl.float32)


@triton.jit
def _gather_sources(into, x, sizes, total, SIZED: tl.constexpr, SPLIT: tl.constexpr):
    """total + into · (size ⊙ x), ``into`` [destinations, sources] the one-hot match: a sum, made by matrix units."""
    if SIZED:
        return exact_dot(to_bfloat16(into.to(tl.float32)), x.to(tl.float32) * sizes[:, None], total, SPLIT)
    elif x.dtype == tl.float16:
        return exact_dot(into.to(tl.float16), x, total, SPLIT)
    else:
        return exact_dot(to_bfloat16(into.to(tl.float32)), x, total, SPLIT)


@triton.jit
def _match_block(
    start, p_key, p_size, p_delta, p_down, p_up, p_mask, p_split_a, p_match, p_second, p_mid,
    stride_key_h, stride_key_n, stride_key_c, stride_size_n, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h,
    key_b, inverse_b, num_a, num_b, prefix, width, channels, heads, hidden, scale, write_match, write_rest,
    BA: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, REFINED: tl.constexpr,
    MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Matches BA sources of one image from ``start`` on: their mask, tokens, best destinations, sizes (0 beyond the last)."""
    i = start + tl.arange(0, BA)
    a_mask = i < num_a
    token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
    key_a, _ = _refined_key(
        p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_a, a_mask, channels, heads,
        hidden, scale, BC, BH, REFINED, MASKED, DELTA, RAW, SPLIT, 1,
    )  # fmt: skip
    inverse_a = _inverse_norm(key_a, COSINE)
    best, i_best, second, i_second = top_two(_scores(key_a, inverse_a, key_b, inverse_b, COSINE, SPLIT), num_b)
    i_second = second_column(second, i_second, i_best)
    if write_match:
        tl.store(p_match + i, (prefix + i_best).to(tl.int64), mask=a_mask)
    if write_rest:
        tl.store(p_second + i, (prefix + i_second).to(tl.int64), mask=a_mask)
        tl.store(p_mid + i, (best + second) * 0.5, mask=a_mask)
    return a_mask, token_a, i_best, _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)


@triton.jit(do_not_specialize=["num_a", "num_b", "width", "stride_size_b", "parts", "steps"])
def merge_short(
    p_x, p_key, p_size, p_down, p_up, p_mask, p_delta, p_split_a, p_split_b, p_tokens, p_merged_size, p_match, p_second, p_mid,
    stride_x_b, stride_x_n, stride_x_d, stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_size_b, stride_size_n,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    stride_delta_b, stride_delta_n, stride_delta_c,
    num_a, num_b, prefix, width, dim, channels, heads, hidden, scale_high, scale_low, parts, steps,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr,
    LISTED: tl.constexpr, SIZED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr,
    COSINE: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Everything for one image and ``steps`` × BD of its columns; each of an image's ``parts`` programs matches anew."""
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scale = split_scalar(scale_high, scale_low, False)
    p_x += b * stride_x_b
    p_key += b * stride_key_b
    p_size += b * stride_size_b
    p_mask += b * stride_mask_b
    p_delta += b * stride_delta_b
    p_match += b * num_a
    p_second += b * num_a
    p_mid += b * num_a
    merged = prefix + num_b

    j = tl.arange(0, BB)
    b_mask = j < num_b
    token_b = destination_token(j, b_mask, p_split_b, prefix, width, LISTED)
    key_b, _unrefined_b = _refined_key(  # not "_": Triton would carry that through the loop below
        p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_b, b_mask, channels, heads,
        hidden, scale, BC, BH, REFINED, MASKED, DELTA, RAW, SPLIT, 1,
    )  # fmt: skip
    inverse_b = _inverse_norm(key_b, COSINE)
    size_b = _row_sizes(p_size, stride_size_n, token_b, b_mask, SIZED)
    n = size_b

    if ONE:
        a_mask, token_a, i_best, size_a = _match_block(
            0, p_key, p_size, p_delta, p_down, p_up, p_mask, p_split_a, p_match, p_second, p_mid,
            stride_key_h, stride_key_n, stride_key_c, stride_size_n, stride_delta_n, stride_delta_c,
            stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h,
            key_b, inverse_b, num_a, num_b, prefix, width, channels, heads, hidden, scale, part == 0, part == 0,
            BA, BC, BH, LISTED, SIZED, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
        )  # fmt: skip
        n += tl.sum(tl.where(i_best[None, :] == j[:, None], size_a[None, :], 0.0), axis=1)
    else:
        for start in range(0, num_a, BA):  # the parts of an image write the same match
            _, _, i_best, size_a = _match_block(
                start, p_key, p_size, p_delta, p_down, p_up, p_mask, p_split_a, p_match, p_second, p_mid,
                stride_key_h, stride_key_n, stride_key_c, stride_size_n, stride_delta_n, stride_delta_c,
                stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h,
                key_b, inverse_b, num_a, num_b, prefix, width, channels, heads, hidden, scale, True, part == 0,
                BA, BC, BH, LISTED, SIZED, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
            )  # fmt: skip
            n += tl.sum(tl.where(i_best[None, :] == j[:, None], size_a[None, :], 0.0), axis=1)
    if part == 0:
        tl.store(p_merged_size + b * merged + prefix + j, n, mask=b_mask)
        for start in range(0, prefix, 16):
            e = start + tl.arange(0, 16)
            size_e = _row_sizes(p_size, stride_size_n, e.to(tl.int64), e < prefix, SIZED)
            tl.store(p_merged_size + b * merged + e, size_e, mask=e < prefix)
    if not ONE:
        tl.debug_barrier()  # the match is read back below
    inverse_n = 1.0 / tl.where(b_mask, n, 1.0)

    for step in range(0, steps):
        d = ((part * steps + step) * BD + tl.arange(0, BD)).to(tl.int64)
        d_mask = d < dim
        total = tl.zeros((BB, BD), tl.float32)
        if ONE:
            x_a = tl.load(
                p_x + token_a[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=a_mask[:, None] & d_mask[None, :], other=0.0
            )
            into = (i_best[None, :] == j[:, None]) & a_mask[None, :]
            total = _gather_sources(into, x_a, size_a, total, SIZED, SPLIT)
        else:
            for start in range(0, num_a, BA):
                i = start + tl.arange(0, BA)
                a_mask = i < num_a
                token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
                x_a = tl.load(
                    p_x + token_a[:, None] * stride_x_n + d[None, :] * stride_x_d,
                    mask=a_mask[:, None] & d_mask[None, :], other=0.0,
                )  # fmt: skip
                match = tl.load(p_match + i, mask=a_mask, other=-1).to(tl.int32) - prefix
                size_a = _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)
                total = _gather_sources(match[None, :] == j[:, None], x_a, size_a, total, SIZED, SPLIT)
        mask = b_mask[:, None] & d_mask[None, :]
        x_b = tl.load(p_x + token_b[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask, other=0.0)
        total += x_b.to(tl.float32) * size_b[:, None]
        if x_b.dtype == tl.float32:
            value = tl.div_rn(total, tl.broadcast_to(tl.where(b_mask, n, 1.0)[:, None], (BB, BD)))
        else:
            value = total * inverse_n[:, None]
        store(p_tokens + (b * merged + prefix + j)[:, None] * dim + d[None, :], value, mask)
        for start in range(0, prefix, 16):
            e = (start + tl.arange(0, 16)).to(tl.int64)
            mask_e = (e < prefix)[:, None] & d_mask[None, :]
            x_e = tl.load(p_x + e[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask_e, other=0.0)
            tl.store(p_tokens + (b * merged + e)[:, None] * dim + d[None, :], x_e, mask=mask_e)


@triton.jit
def _put_aside(
    p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_parts, p_norm, p_mean,
    stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c, stride_down_h, stride_down_c, stride_up_c,
    stride_up_h, stride_mask_n, stride_mask_h, start, num_a, num_rows, prefix, width, channels, heads, hidden, scale,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """k' of BR rows from ``start`` on, in the parts that products take, and its norm. MEAN: also the averaged key."""
    r = start + tl.arange(0, BR)
    c = tl.arange(0, BC)
    row_mask = r < num_rows
    tokens = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
    refined, key = _refined_key(
        p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, tokens, row_mask, channels, heads,
        hidden, scale, BC, BH, REFINED, MASKED, DELTA, RAW, SPLIT, 4,
    )  # fmt: skip
    mask = row_mask[:, None] & (c < channels)[None, :]
    at = r[:, None] * channels + c[None, :]
    if COSINE:
        tl.store(p_norm + r, _norm(refined), mask=row_mask)
    if not RAW:
        if SPLIT:
            high, middle, low = split_float32(refined)
            tl.store(p_parts + at, high, mask=mask)
            tl.store(p_parts + num_rows * channels + at, middle, mask=mask)
            tl.store(p_parts + 2 * num_rows * channels + at, low, mask=mask)
        else:
            tl.store(p_parts + at, refined, mask=mask)
    if MEAN:
        tl.store(p_mean + at, key, mask=mask)


@triton.jit
def _key_parts(
    p_key, p_parts, stride_key_n, stride_key_c, p_split_a, p_split_b, r, row_mask, num_a, num_rows, prefix, width, c, channels,
    LISTED: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """k' of rows [rows, c] in the parts put aside; RAW, the 16-bit key in its place, and without SPLIT the first is all."""
    mask = row_mask[:, None] & (c < channels)[None, :]
    if RAW:
        tokens = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
        key = tl.load(p_key + tokens[:, None] * stride_key_n + c.to(tl.int64)[None, :] * stride_key_c, mask=mask, other=0.0)
        return key, key, key
    else:
        at = p_parts + r[:, None] * channels + c[None, :]
        high = tl.load(at, mask=mask, other=0.0)
        if SPLIT:
            plane = num_rows * channels
            return high, tl.load(at + plane, mask=mask, other=0.0), tl.load(at + 2 * plane, mask=mask, other=0.0)
        else:
            return high, high, high


@triton.jit
def _finish_rows(
    p_key, p_down, p_up, p_mask, p_split_a, p_split_b, p_parts, p_norm, p_mean, p_unit_grad, p_grad_refined, p_grad_key,
    stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h,
    start, num_a, num_rows, prefix, width, channels, heads, hidden, scale, down_grad, up_grad,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    COSINE: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
    NEED_REFINED: tl.constexpr, NEED_KEY: tl.constexpr,
):  # fmt: skip
    """dk' = (dk̂ − k̂ (k̂ · dk̂)) / ‖k'‖ of BR rows from ``start`` on, dk, and the weight gradients with their part added."""
    r = start + tl.arange(0, BR)
    c = tl.arange(0, BC) + _zero(start)
    row_mask = r < num_rows
    tokens = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
    mask = row_mask[:, None] & (c < channels)[None, :]
    at = r[:, None] * channels + c[None, :]
    out = tokens[:, None] * channels + c[None, :]
    grad = tl.load(p_unit_grad + at, mask=mask, other=0.0)
    if COSINE:
        high, middle, low = _key_parts(
            p_key, p_parts, stride_key_n, stride_key_c, p_split_a, p_split_b, r, row_mask, num_a, num_rows, prefix, width, c,
            channels, LISTED, RAW, SPLIT,
        )  # fmt: skip
        refined = high.to(tl.float32)
        if SPLIT and not RAW:
            refined += middle.to(tl.float32) + low.to(tl.float32)
        norm = tl.load(p_norm + r, mask=row_mask, other=1.0)
        inverse = inverse_norm(norm)
        # A norm at its floor is a constant, and nothing flows through it.
        along = tl.where(norm > NORM_EPS, tl.sum(refined * grad, axis=1) * inverse * inverse, 0.0)
        grad = (grad - refined * along[:, None]) * inverse[:, None]
    if NEED_REFINED:
        store(p_grad_refined + out, grad, mask)
    if REFINED and (NEED_WEIGHTS or NEED_KEY):
        h = tl.arange(0, BH)
        if MEAN:
            key = tl.load(p_mean + at, mask=mask, other=0.0)
        else:
            key = load_key(p_key, 0, stride_key_n, stride_key_c, 1, tokens, row_mask, c, channels, False)
        pre, keep, units = _hidden_units(
            key, p_down, p_mask, stride_down_h, stride_down_c, stride_mask_n, stride_mask_h, tokens, row_mask, c, channels, h,
            hidden, MASKED, SPLIT,
        )  # fmt: skip
        if NEED_WEIGHTS:  # first, so that its factors are gone when the next ones are made
            up_grad = exact_dot(tl.trans(grad * scale), units, up_grad, SPLIT)
        w_up = load_matrix(p_up, c, channels, stride_up_c, h, hidden, stride_up_h, False)  # [BC, BH]
        through = exact_dot(grad, w_up, tl.zeros((BR, BH), tl.float32), SPLIT)
        if MASKED:
            through *= keep
        hidden_grad = tl.where(pre > 0, through * scale, 0.0)
        if NEED_WEIGHTS:
            down_grad = exact_dot(tl.trans(key), hidden_grad, down_grad, SPLIT)
        if NEED_KEY:
            w_down = load_matrix(p_down, h, hidden, stride_down_h, c, channels, stride_down_c, False)  # [BH, BC]
            grad = exact_dot(hidden_grad, w_down, grad, SPLIT)
    if NEED_KEY:
        store(p_grad_key + out, grad * reciprocal(heads, False), mask)
    return down_grad, up_grad


@triton.jit
def _zero(n):
    """0 for 0 ≤ n < 2²⁴, which the compiler does not know: what it is added to is not worked out earlier and kept in registers.

    A multiple of 16, which the compiler does know: addresses stay aligned.
    """
    return (n >> 24) * 16


@triton.jit(do_not_specialize=["num_a", "num_b", "width", "stride_size_b", "stride_gs_b", "images"])
def backward_short(
    p_grad, p_grad_size, p_x, p_key, p_size, p_down, p_up, p_mask, p_delta, p_split_a, p_split_b,
    p_tokens, p_merged_size, p_match, p_second, p_mid, p_parts, p_norm, p_mean, p_unit_grad,
    p_grad_x, p_grad_in_size, p_grad_refined, p_grad_key, p_sums,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
    stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_b, prefix, width, dim, channels, heads, hidden, scale_high, scale_low, images,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BY: tl.constexpr,
    BK: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr,
    GRAD_SIZE: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr,
    RAW: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr, NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, NEED_REFINED: tl.constexpr, NEED_KEY: tl.constexpr,
):  # fmt: skip
    """The first ``images`` programs go down the key path of one image each, the others gather dx and dsize.

    The key path in three loops, between barriers: k' is put aside, in parts; block by block of sources dM is formed over
    tiles of D, turned into ds and multiplied into dk̂ on both sides; dk̂ is taken on to dk', dk and the weights. What one loop
    leaves for the next is read by the program that wrote it, from a cache; loads are the products' operands, and nothing is
    kept in registers from one block to the next.
    """
    merged = prefix + num_b
    num_rows = num_a + num_b
    tokens_in = merged + num_a
    if tl.program_id(0) >= images:
        spread_gradient(
            p_grad, p_grad_size, p_x, p_size, p_tokens, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
            stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
            stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d, num_a, merged, prefix, width, dim,
            tl.program_id(0) - images, BR, BS, LISTED, SIZED, GRAD_SIZE, NEED_X, NEED_SIZE, False,
        )  # fmt: skip
    else:
        PARTS: tl.constexpr = SPLIT and not RAW
        b = tl.program_id(0).to(tl.int64)
        scale = split_scalar(scale_high, scale_low, False)
        p_key += b * stride_key_b
        p_mask += b * stride_mask_b
        p_delta += b * stride_delta_b
        p_parts += b * num_rows * channels * (3 if SPLIT else 1)
        p_norm += b * num_rows
        p_mean += b * num_rows * channels
        p_unit_grad += b * num_rows * channels
        for start in tl.range(0, num_rows, BK, num_stages=1, disable_licm=True):
            _put_aside(
                p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b, p_parts, p_norm, p_mean,
                stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c, stride_down_h, stride_down_c,
                stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, start, num_a, num_rows, prefix, width, channels, heads,
                hidden, scale, BK, BC, BH, LISTED, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT, MEAN,
            )  # fmt: skip
        j = tl.arange(0, BB)
        b_mask = j < num_b
        gamma = merged_size_gradient(
            p_grad, p_grad_size, p_tokens, p_merged_size, stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e,
            stride_tok_b, stride_tok_e, stride_tok_d, b, j, b_mask, merged, prefix, dim, BY, GRAD_SIZE, False,
        )  # fmt: skip
        inverse_n = 1.0 / tl.load(p_merged_size + b * merged + prefix + j, mask=b_mask, other=1.0)
        tl.debug_barrier()

        p_grad += b * stride_grad_b
        p_x += b * stride_x_b
        p_size += b * stride_size_b
        for start in tl.range(0, num_a, BA, num_stages=1, disable_licm=True):
            i = start + tl.arange(0, BA)
            j = tl.arange(0, BB) + _zero(start)
            c = tl.arange(0, BC) + _zero(start)
            a_mask = i < num_a
            b_mask = j < num_b
            token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
            e = (prefix + j).to(tl.int64)
            # Destinations by rows, sources by columns: the long side is the one that matrix units need long.
            grad_m = tl.zeros((BB, BA), tl.float32)  # G_j · x_i, then dM
            for d_start in range(0, dim, BD):
                d = (d_start + tl.arange(0, BD)).to(tl.int64)
                d_mask = d < dim
                x = tl.load(
                    p_x + token_a[None, :] * stride_x_n + d[:, None] * stride_x_d, mask=a_mask[None, :] & d_mask[:, None],
                    other=0.0,
                )  # fmt: skip
                grad = tl.load(
                    p_grad + e[:, None] * stride_grad_e + d[None, :] * stride_grad_d, mask=b_mask[:, None] & d_mask[None, :],
                    other=0.0,
                )  # fmt: skip
                grad_m = exact_dot(grad, x, grad_m, SPLIT)
            grad_m = grad_m * inverse_n[:, None] + gamma[:, None]
            if SIZED:
                grad_m = grad_m * _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)[None, :]

            a_high, a_middle, a_low = _key_parts(
                p_key, p_parts, stride_key_n, stride_key_c, p_split_a, p_split_b, i, a_mask, num_a, num_rows, prefix, width, c,
                channels, LISTED, RAW, SPLIT,
            )  # fmt: skip
            b_high, b_middle, b_low = _key_parts(
                p_key, p_parts, stride_key_n, stride_key_c, p_split_a, p_split_b, num_a + j, b_mask, num_a, num_rows, prefix,
                width, c, channels, LISTED, RAW, SPLIT,
            )  # fmt: skip
            scores = dot_of_parts(
                b_high, b_middle, b_low, tl.trans(a_high), tl.trans(a_middle), tl.trans(a_low),
                tl.zeros((BB, BA), tl.float32), PARTS, PARTS, SPLIT,
            )  # fmt: skip
            if COSINE:
                inverse_a = inverse_norm(tl.load(p_norm + i, mask=a_mask, other=1.0))
                inverse_b = inverse_norm(tl.load(p_norm + num_a + j, mask=b_mask, other=1.0))
                scores = scores * inverse_b[:, None] * inverse_a[None, :]
            mid = tl.load(p_mid + b * num_a + i, mask=a_mask, other=0.0)
            grad_s = tl.where(b_mask[:, None] & a_mask[None, :], grad_m * soft_slope(scores, mid[None, :]), 0.0)
            # The mean of the two best takes half of the source's sum from each of them.
            share = tl.sum(grad_s, axis=0) * 0.5
            best = tl.load(p_match + b * num_a + i, mask=a_mask, other=0).to(tl.int32) - prefix
            second = tl.load(p_second + b * num_a + i, mask=a_mask, other=0).to(tl.int32) - prefix
            is_two = (best[None, :] == j[:, None]) | (second[None, :] == j[:, None])
            grad_s = tl.where(is_two, grad_s - share[None, :], grad_s)

            to_a, to_b = grad_s, grad_s
            if COSINE:
                to_a, to_b = grad_s * inverse_b[:, None], grad_s * inverse_a[None, :]
            # Summed up in memory, in the order of the blocks: in registers it would leave too few for the products.
            at_b = p_unit_grad + (num_a + j)[:, None] * channels + c[None, :]
            mask = b_mask[:, None] & (c < channels)[None, :]
            unit_grad_b = tl.load(at_b, mask=mask & (start > 0), other=0.0)
            unit_grad_b = dot_of_parts(to_b, to_b, to_b, a_high, a_middle, a_low, unit_grad_b, False, PARTS, SPLIT)
            tl.store(at_b, unit_grad_b, mask=mask)

            # Loaded again, which costs less than keeping them: where products take their operands from registers, all of it.
            again = num_a + j + _zero(num_b + start)
            b_high, b_middle, b_low = _key_parts(
                p_key, p_parts, stride_key_n, stride_key_c, p_split_a, p_split_b, again, b_mask, num_a, num_rows, prefix, width,
                c, channels, LISTED, RAW, SPLIT,
            )  # fmt: skip
            unit_grad_a = dot_of_parts(
                tl.trans(b_high), tl.trans(b_middle), tl.trans(b_low), to_a, to_a, to_a, tl.zeros((BC, BA), tl.float32),
                PARTS, False, SPLIT,
            )  # fmt: skip
            tl.store(
                p_unit_grad + i[None, :] * channels + c[:, None], unit_grad_a, mask=a_mask[None, :] & (c < channels)[:, None]
            )
            tl.debug_barrier()  # what was stored is read by the next block, or the next loop

        p_grad_refined += b * tokens_in * channels
        p_grad_key += b * tokens_in * channels
        down_grad = tl.zeros((BC, BH), tl.float32)
        up_grad = tl.zeros((BC, BH), tl.float32)
        for start in tl.range(0, num_rows, BF, num_stages=1, disable_licm=True):
            down_grad, up_grad = _finish_rows(
                p_key, p_down, p_up, p_mask, p_split_a, p_split_b, p_parts, p_norm, p_mean, p_unit_grad, p_grad_refined,
                p_grad_key, stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n,
                stride_mask_h, start, num_a, num_rows, prefix, width, channels, heads, hidden, scale, down_grad, up_grad,
                BF, BC, BH, LISTED, REFINED, MASKED, COSINE, RAW, SPLIT, MEAN, NEED_WEIGHTS, NEED_REFINED, NEED_KEY,
            )  # fmt: skip
        c = tl.arange(0, BC)
        for start in range(0, prefix, 16):  # no gradient reaches a prefix token's key
            t = start + tl.arange(0, 16)
            at = t[:, None] * channels + c[None, :]
            mask = (t < prefix)[:, None] & (c < channels)[None, :]
            if NEED_REFINED:
                store(p_grad_refined + at, tl.zeros((16, BC), tl.float32), mask)
            if NEED_KEY:
                store(p_grad_key + at, tl.zeros((16, BC), tl.float32), mask)
        if NEED_WEIGHTS:
            h = tl.arange(0, BH)
            out = b * 2 * channels * hidden + c[:, None] * hidden + h[None, :]
            out_mask = (c < channels)[:, None] & (h < hidden)[None, :]
            tl.store(p_sums + out, down_grad, mask=out_mask)
            tl.store(p_sums + out + channels * hidden, up_grad, mask=out_mask)
