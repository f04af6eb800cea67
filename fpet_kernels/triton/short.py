"""Fused kernels for short grids: up to 256 sources and 256 destinations.

The scores of one block of sources against all destinations live in registers and never leave the chip. Forward: one launch;
blocks of sources follow one another, and at up to 128 sources there is one block (ONE) whose match stays in registers too.
Backward: dx, dsize and dk̂ in one launch, between the tiled kernels that prepare keys and finish dk'.
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
        refined = tl.load(p_key + tokens[:, None] * stride_key_n + c.to(tl.int64)[None, :] * stride_key_c, mask=mask, other=0.0)
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
    key_a, inverse_a = _refined_key(
        p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_a, a_mask, channels, heads,
        hidden, scale, BC, BH, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
    )  # fmt: skip
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
    key_b, inverse_b = _refined_key(
        p_key, p_delta, p_down, p_up, p_mask, stride_key_h, stride_key_n, stride_key_c, stride_delta_n, stride_delta_c,
        stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_n, stride_mask_h, token_b, b_mask, channels, heads,
        hidden, scale, BC, BH, REFINED, MASKED, DELTA, COSINE, RAW, SPLIT,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=["num_a", "num_b", "width", "stride_size_b", "stride_gs_b", "blocks", "spread_programs"])
def backward_short(
    p_grad, p_grad_size, p_x, p_size, p_split_a, p_split_b, p_tokens, p_merged_size, p_match, p_second, p_mid,
    p_prepared, p_norm, p_gamma, p_grad_x, p_grad_in_size, p_unit_grad, p_partial,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
    stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d,
    num_a, num_b, prefix, width, dim, channels, blocks, spread_programs,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    LISTED: tl.constexpr, SIZED: tl.constexpr, GRAD_SIZE: tl.constexpr, COSINE: tl.constexpr, SPLIT: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr,
):  # fmt: skip
    """Of an image's programs, ``blocks`` take BA sources each against all destinations, the rest do dx and dsize.

    The first give dk̂ of their sources and their part of dk̂ of the destinations, (blocks, N_B, C) per image. Neighbours in
    the launch share G and x of their image through the L2 cache. One block a program, not a loop over blocks: what a
    compiler moves out of such a loop fills the registers.
    """
    merged = prefix + num_b
    rows = num_a + num_b
    b = (tl.program_id(0) // (blocks + spread_programs)).to(tl.int64)
    role = tl.program_id(0) % (blocks + spread_programs)
    if role >= blocks:
        spread_gradient(
            p_grad, p_grad_size, p_x, p_size, p_tokens, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
            stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_x_b, stride_x_n, stride_x_d,
            stride_size_b, stride_size_n, stride_tok_b, stride_tok_e, stride_tok_d, num_a, merged, prefix, width, dim,
            b.to(tl.int32) * spread_programs + role - blocks, BR, BS, LISTED, SIZED, GRAD_SIZE, NEED_X, NEED_SIZE, False,
        )  # fmt: skip
    else:
        p_grad += b * stride_grad_b
        p_x += b * stride_x_b
        p_size += b * stride_size_b
        p_prepared += b * rows * channels
        p_norm += b * rows
        p_unit_grad += b * rows * channels
        p_partial += (b * blocks + role) * num_b * channels
        i = role * BA + tl.arange(0, BA)
        j = tl.arange(0, BB)
        a_mask = i < num_a
        b_mask = j < num_b
        token_a = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
        e = (prefix + j).to(tl.int64)
        grad_m = tl.zeros((BA, BB), tl.float32)  # G_j · x_i, then dM
        for d_start in range(0, dim, BD):
            d = (d_start + tl.arange(0, BD)).to(tl.int64)
            d_mask = d < dim
            x = tl.load(
                p_x + token_a[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=a_mask[:, None] & d_mask[None, :], other=0.0
            )
            grad = tl.load(
                p_grad + e[None, :] * stride_grad_e + d[:, None] * stride_grad_d,
                mask=b_mask[None, :] & d_mask[:, None],
                other=0.0,
            )
            grad_m = exact_dot(x, grad, grad_m, SPLIT)

        # The same columns again. The zero, unknown to the compiler, keeps it from working out their addresses ahead of the
        # loop, in the layout of the scores, and carrying them through in registers.
        j = tl.arange(0, BB) + num_b // 1024
        b_mask = j < num_b
        inverse_n = 1.0 / tl.load(p_merged_size + b * merged + prefix + j, mask=b_mask, other=1.0)
        gamma = tl.load(p_gamma + b * num_b + j, mask=b_mask, other=0.0)
        grad_m = grad_m * inverse_n[None, :] + gamma[None, :]
        if SIZED:
            grad_m = grad_m * _row_sizes(p_size, stride_size_n, token_a, a_mask, SIZED)[:, None]

        c = tl.arange(0, BC)
        c_mask = c < channels
        at_a = i[None, :] * channels + c[:, None]
        at_b = j[None, :] * channels + c[:, None]
        mask_a = a_mask[None, :] & c_mask[:, None]
        mask_b = b_mask[None, :] & c_mask[:, None]
        key_a = tl.load(p_prepared + at_a, mask=mask_a, other=0.0)  # [BC, BA]
        key_b = tl.load(p_prepared + num_a * channels + at_b, mask=mask_b, other=0.0)  # [BC, BB]
        scores = exact_dot(tl.trans(key_a), key_b, tl.zeros((BA, BB), tl.float32), SPLIT)
        if COSINE:
            inverse_a = inverse_norm(tl.load(p_norm + i, mask=a_mask, other=1.0))
            inverse_b = inverse_norm(tl.load(p_norm + num_a + j, mask=b_mask, other=1.0))
            scores = scores * inverse_a[:, None] * inverse_b[None, :]
        mid = tl.load(p_mid + b * num_a + i, mask=a_mask, other=0.0)
        grad_s = tl.where(a_mask[:, None] & b_mask[None, :], grad_m * soft_slope(scores, mid[:, None]), 0.0)
        # The mean of the two best takes half of the row's sum from each of them.
        share = tl.sum(grad_s, axis=1) * 0.5
        best = tl.load(p_match + b * num_a + i, mask=a_mask, other=0).to(tl.int32) - prefix
        second = tl.load(p_second + b * num_a + i, mask=a_mask, other=0).to(tl.int32) - prefix
        is_two = (best[:, None] == j[None, :]) | (second[:, None] == j[None, :])
        grad_s = tl.where(is_two, grad_s - share[:, None], grad_s)

        # Transposed products: ds as the right factor comes from shared memory, as the left one it would fill registers.
        to_a, to_b = grad_s, grad_s
        if COSINE:
            to_a, to_b = grad_s * inverse_b[None, :], grad_s * inverse_a[:, None]
        unit_grad = exact_dot(key_b, tl.trans(to_a), tl.zeros((BC, BA), tl.float32), SPLIT)
        tl.store(p_unit_grad + at_a, unit_grad, mask=mask_a)
        tl.store(p_partial + at_b, exact_dot(key_a, to_b, tl.zeros((BC, BB), tl.float32), SPLIT), mask=mask_b)
