"""Fused kernels for short grids (up to 256 sources and 256 destinations): one launch forward, one backward.

The scores of one block of sources against all destinations live in registers and never leave the chip. Blocks of sources
follow one another; at up to 128 sources there is one block (ONE), and the match stays in registers too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .long import spread_gradient
from .primitives import (
    destination_token,
    exact_dot,
    inverse_norm,
    load_key,
    load_matrix,
    second_column,
    soft_slope,
    source_token,
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
    BC: tl.constexpr, BH: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr,
    RAW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """k' [rows, C] of one image, and 1 / max(‖k'‖, ε). RAW: the 16-bit key as it is."""
    c = tl.arange(0, BC)
    mask = row_mask[:, None] & (c < channels)[None, :]
    if RAW:
        refined = tl.load(
            p_key + tokens[:, None] * stride_key_n + c.to(tl.int64)[None, :] * stride_key_c, mask=mask, other=0.0
        )
    else:
        refined = load_key(p_key, stride_key_h, stride_key_n, stride_key_c, heads, tokens, row_mask, c, channels, False)
        if REFINED:
            h = tl.arange(0, BH)
            _, _, units = _hidden_units(
                refined, p_down, p_mask, stride_down_h, stride_down_c, stride_mask_n, stride_mask_h, tokens, row_mask, c,
                channels, h, hidden, MASKED, SPLIT,
            )  # fmt: skip
            w_up = load_matrix(p_up, h, hidden, stride_up_h, c, channels, stride_up_c, False)  # [BH, BC]
            refined += scale * exact_dot(units, w_up, tl.zeros((tokens.shape[0], BC), tl.float32), SPLIT)
        if DELTA:
            pointers = p_delta + tokens[:, None] * stride_delta_n + c.to(tl.int64)[None, :] * stride_delta_c
            refined += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if COSINE:
        whole = refined.to(tl.float32)
        inverse = inverse_norm(square_root(tl.sum(whole * whole, axis=1)))
    else:
        inverse = tl.full((tokens.shape[0],), 1.0, tl.float32)
    return refined, inverse


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
    merged = prefix + num_b

    j = tl.arange(0, BB)
    b_mask = j < num_b
    token_b = destination_token(j, b_mask, p_split_b, prefix, width, LISTED)
    key_b, inverse_b = _refined_key(
        p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_b, b_mask, channels, heads,
        hidden, scale, BC, BH, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
    )  # fmt: skip
    size_b = _row_sizes(p_size, stride_size_n, token_b, b_mask, SIZED)
    n = size_b

    for start in range(0, BA if ONE else num_a, BA):
        i = start + tl.arange(0, BA)
        a_mask = i < num_a
        token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
        key_a, inverse_a = _refined_key(
            p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
            stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_a, a_mask, channels,
            heads, hidden, scale, BC, BH, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
        )  # fmt: skip
        best, i_best, second, i_second = top_two(_scores(key_a, inverse_a, key_b, inverse_b, COSINE, SPLIT), num_b)
        i_second = second_column(second, i_second, i_best)
        if part == 0:
            tl.store(p_second + b * num_a + i, (prefix + i_second).to(tl.int64), mask=a_mask)
            tl.store(p_mid + b * num_a + i, (best + second) / 2, mask=a_mask)
        if part == 0 or not ONE:  # the parts of an image write the same values
            tl.store(p_match + i, (prefix + i_best).to(tl.int64), mask=a_mask)
        size_a = _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)
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
def _finish_rows(
    unit_grad, refined, inverse, p_key, p_down, p_up, p_mask, p_grad_refined, p_grad_key,
    stride_key_h, stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h,
    stride_mask_n, stride_mask_h, tokens, row_mask, channels, heads, hidden, scale, down_grad, up_grad,
    BC: tl.constexpr, BH: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, COSINE: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, NEED_REFINED: tl.constexpr, NEED_KEY: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """From dk̂ of some rows: dk' and its outputs, and what they add to dW_downᵀ and dW_up, both (C, h)."""
    c = tl.arange(0, BC)
    mask = row_mask[:, None] & (c < channels)[None, :]
    if COSINE:
        unit = refined.to(tl.float32) * inverse[:, None]
        # A norm at its floor is a constant, and nothing flows through it.
        along = tl.where(inverse < 1e12, tl.sum(unit * unit_grad, axis=1), 0.0)
        grad = (unit_grad - unit * along[:, None]) * inverse[:, None]
    else:
        grad = unit_grad
    at = tokens[:, None] * channels + c[None, :]
    if NEED_REFINED:
        store(p_grad_refined + at, grad, mask)
    if REFINED and (NEED_WEIGHTS or NEED_KEY):
        h = tl.arange(0, BH)
        key = load_key(p_key, stride_key_h, stride_key_n, stride_key_c, heads, tokens, row_mask, c, channels, False)
        pre, keep, units = _hidden_units(
            key, p_down, p_mask, stride_down_h, stride_down_c, stride_mask_n, stride_mask_h, tokens, row_mask, c, channels, h,
            hidden, MASKED, SPLIT,
        )  # fmt: skip
        up = load_matrix(p_up, c, channels, stride_up_c, h, hidden, stride_up_h, False)  # [BC, BH]
        scaled = grad * scale
        through = exact_dot(scaled, up, tl.zeros((tokens.shape[0], BH), tl.float32), SPLIT)
        if MASKED:
            through = through * keep
        through = tl.where(pre > 0, through, 0.0)
        if NEED_WEIGHTS:
            down_grad = exact_dot(tl.trans(key), through, down_grad, SPLIT)
            up_grad = exact_dot(tl.trans(scaled), units, up_grad, SPLIT)
        if NEED_KEY:
            down = load_matrix(p_down, h, hidden, stride_down_h, c, channels, stride_down_c, False)  # [BH, BC]
            grad = exact_dot(through, down, grad, SPLIT)
    if NEED_KEY:
        store(p_grad_key + at, grad / heads, mask)
    return down_grad, up_grad


@triton.jit
def backward_short(
    p_grad, p_grad_size, p_x, p_key, p_size, p_down, p_up, p_mask, p_delta, p_split_a, p_split_b, p_tokens, p_merged_size,
    p_match, p_second, p_mid, p_grad_x, p_grad_in_size, p_grad_refined, p_grad_key, p_partial,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    stride_delta_b, stride_delta_n, stride_delta_c,
    num_a, num_b, prefix, width, dim, channels, heads, hidden, scale_high, scale_low, spread_programs,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    BS: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, GRAD_SIZE: tl.constexpr, REFINED: tl.constexpr,
    MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_REFINED: tl.constexpr,
    NEED_KEY: tl.constexpr,
):  # fmt: skip
    """Of an image's 1 + ``spread_programs`` programs the first does the key path, the others dx and dsize.

    Neighbours in the launch share G, x and y of their image through the L2 cache.
    """
    merged = prefix + num_b
    b = (tl.program_id(0) // (1 + spread_programs)).to(tl.int64)
    role = tl.program_id(0) % (1 + spread_programs)
    if role > 0:
        spread_gradient(
            p_grad, p_grad_size, p_x, p_size, p_tokens, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
            stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
            stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d, num_a, merged, prefix, width, dim,
            b.to(tl.int32) * spread_programs + role - 1, BR, BS, LISTED, SIZED, GRAD_SIZE, NEED_X, NEED_SIZE, False,
        )  # fmt: skip
    else:
        scale = split_scalar(scale_high, scale_low, False)
        tokens_in = merged + num_a
        p_grad += b * stride_grad_b
        p_x += b * stride_x_b
        p_key += b * stride_key_b
        p_size += b * stride_size_b
        p_tokens += b * stride_tok_b
        p_mask += b * stride_mask_b
        p_delta += b * stride_delta_b
        p_grad_refined += b * tokens_in * channels
        p_grad_key += b * tokens_in * channels

        c = tl.arange(0, BC)
        j = tl.arange(0, BB)
        b_mask = j < num_b
        e = (prefix + j).to(tl.int64)
        token_b = destination_token(j, b_mask, p_split_b, prefix, width, LISTED)
        key_b, inverse_b = _refined_key(
            p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
            stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_b, b_mask, channels,
            heads, hidden, scale, BC, BH, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
        )  # fmt: skip
        n = tl.load(p_merged_size + b * merged + e, mask=b_mask, other=1.0).to(tl.float32)
        if GRAD_SIZE:
            gamma = tl.load(p_grad_size + b * stride_gs_b + e * stride_gs_e, mask=b_mask, other=0.0).to(tl.float32)
        else:
            gamma = tl.zeros((BB,), tl.float32)
        unit_grad_b = tl.zeros((BB, BC), tl.float32)
        down_grad = tl.zeros((BC, BH), tl.float32)
        up_grad = tl.zeros((BC, BH), tl.float32)

        for start in range(0, num_a, BA):
            i = start + tl.arange(0, BA)
            a_mask = i < num_a
            token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
            grad_m = tl.zeros((BA, BB), tl.float32)  # G_j · x_i, then dM
            dot = tl.zeros((BB,), tl.float32)  # G_j · y_j
            for d_start in range(0, dim, BD):
                d = (d_start + tl.arange(0, BD)).to(tl.int64)
                d_mask = d < dim
                x = tl.load(
                    p_x + token_a[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=a_mask[:, None] & d_mask[None, :], other=0.0
                )
                mask = b_mask[:, None] & d_mask[None, :]
                grad = tl.load(p_grad + e[:, None] * stride_grad_e + d[None, :] * stride_grad_d, mask=mask, other=0.0)
                y = tl.load(p_tokens + e[:, None] * stride_tok_e + d[None, :] * stride_tok_d, mask=mask, other=0.0)
                dot += tl.sum(grad.to(tl.float32) * y.to(tl.float32), axis=1)
                grad_m = exact_dot(x, tl.trans(grad), grad_m, SPLIT)
            grad_m = (grad_m - dot[None, :]) / n[None, :] + gamma[None, :]
            if SIZED:
                grad_m = grad_m * _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)[:, None]

            key_a, inverse_a = _refined_key(
                p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
                stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_a, a_mask, channels,
                heads, hidden, scale, BC, BH, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
            )  # fmt: skip
            scores = _scores(key_a, inverse_a, key_b, inverse_b, COSINE, SPLIT)
            mid = tl.load(p_mid + b * num_a + i, mask=a_mask, other=0.0)
            grad_s = tl.where(a_mask[:, None] & b_mask[None, :], grad_m * soft_slope(scores, mid[:, None]), 0.0)
            # The mean of the two best takes half of the row's sum from each of them.
            share = tl.sum(grad_s, axis=1) / 2
            best = tl.load(p_match + b * num_a + i, mask=a_mask, other=0).to(tl.int32) - prefix
            second = tl.load(p_second + b * num_a + i, mask=a_mask, other=0).to(tl.int32) - prefix
            is_two = (best[:, None] == j[None, :]) | (second[:, None] == j[None, :])
            grad_s = tl.where(is_two, grad_s - share[:, None], grad_s)

            unit_grad_a = exact_dot(grad_s * inverse_b[None, :], key_b, tl.zeros((BA, BC), tl.float32), SPLIT)
            unit_grad_b = exact_dot(tl.trans(grad_s * inverse_a[:, None]), key_a, unit_grad_b, SPLIT)
            down_grad, up_grad = _finish_rows(
                unit_grad_a, key_a, inverse_a, p_key, p_down, p_up, p_mask, p_grad_refined, p_grad_key,
                stride_key_h, stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h,
                stride_mask_n, stride_mask_h, token_a, a_mask, channels, heads, hidden, scale, down_grad, up_grad,
                BC, BH, REFINED, MASKED, COSINE, NEED_WEIGHTS, NEED_REFINED, NEED_KEY, SPLIT,
            )  # fmt: skip
        down_grad, up_grad = _finish_rows(
            unit_grad_b, key_b, inverse_b, p_key, p_down, p_up, p_mask, p_grad_refined, p_grad_key,
            stride_key_h, stride_key_n, stride_key_c, stride_down_h, stride_down_c, stride_up_c, stride_up_h,
            stride_mask_n, stride_mask_h, token_b, b_mask, channels, heads, hidden, scale, down_grad, up_grad,
            BC, BH, REFINED, MASKED, COSINE, NEED_WEIGHTS, NEED_REFINED, NEED_KEY, SPLIT,
        )  # fmt: skip

        if NEED_REFINED or NEED_KEY:  # a prefix token has no say in the matching
            for start in range(0, prefix, 16):
                token = start + tl.arange(0, 16)
                at = token.to(tl.int64)[:, None] * channels + c[None, :]
                mask = (token < prefix)[:, None] & (c < channels)[None, :]
                if NEED_REFINED:
                    store(p_grad_refined + at, tl.zeros((16, BC), tl.float32), mask)
                if NEED_KEY:
                    store(p_grad_key + at, tl.zeros((16, BC), tl.float32), mask)
        if NEED_WEIGHTS:
            h = tl.arange(0, BH)
            mask = (c < channels)[:, None] & (h < hidden)[None, :]
            at = b * 2 * channels * hidden + c[:, None] * hidden + h[None, :]
            tl.store(p_partial + at, down_grad, mask=mask)
            tl.store(p_partial + at + channels * hidden, up_grad, mask=mask)
