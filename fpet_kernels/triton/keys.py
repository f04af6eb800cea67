"""Device functions of the key path: the key averaged over heads, its refinement, its norm; and back.

Groups, here and in the kernels, are tuples in this order:

- ``key``: pointer to the image's key, strides of a head, a token, a channel.
- ``delta``: pointer to the image's correction, strides of a token, a channel.
- ``weights``: pointers to W_down and W_up; strides of W_down (hidden unit, channel) and of W_up (channel, hidden unit).
- ``dropout``: pointer to the image's mask, strides of a token, a hidden unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import NORM_EPS, exact_dot, product, reciprocal, relu, relu_gradient, wide, zeros


@triton.jit
def load_key(key, heads, tokens, row_mask, c, channels, DOUBLE: tl.constexpr):
    """[rows, channels] of the key averaged over its heads; four heads are on their way at a time."""
    p_key, stride_head, stride_token, stride_channel = key
    pointers = p_key + tokens[:, None] * stride_token + c.to(tl.int64)[None, :] * stride_channel
    mask = row_mask[:, None] & (c < channels)[None, :]
    total = zeros(mask.shape, DOUBLE)
    for _ in tl.range(0, heads, loop_unroll_factor=4):
        total += wide(tl.load(pointers, mask=mask, other=0.0), DOUBLE)
        pointers += stride_head
    return total * reciprocal(heads, DOUBLE)


@triton.jit
def load_raw_key(key, tokens, row_mask, c, channels):
    """[rows, channels] of a key of one head, in its own type."""
    p_key, _stride_head, stride_token, stride_channel = key
    pointers = p_key + tokens[:, None] * stride_token + c.to(tl.int64)[None, :] * stride_channel
    return tl.load(pointers, mask=row_mask[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def load_matrix(p, row, rows, stride_row, column, columns, stride_column, DOUBLE: tl.constexpr):
    """[row, column] of a small matrix, zero outside."""
    pointers = p + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return wide(tl.load(pointers, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0), DOUBLE)


@triton.jit
def load_dropout(dropout, tokens, row_mask, h, hidden, MASKED: tl.constexpr, DOUBLE: tl.constexpr):
    """The dropout mask [rows, h], ones where there is none."""
    if MASKED:
        p_mask, stride_token, stride_unit = dropout
        pointers = p_mask + tokens[:, None] * stride_token + h.to(tl.int64)[None, :] * stride_unit
        return wide(tl.load(pointers, mask=row_mask[:, None] & (h < hidden)[None, :], other=0.0), DOUBLE)
    else:
        return zeros((tokens.shape[0], h.shape[0]), DOUBLE) + 1.0


@triton.jit
def before_relu(
    loaded, key, weights, heads, tokens, row_mask, h, hidden, channels,
    BC: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """pre = key W_downᵀ [rows, h]. WHOLE: all channels of the key are ``loaded``; else it is read block by block."""
    p_down, _p_up, stride_unit, stride_channel, _stride_up_c, _stride_up_h = weights
    pre = zeros((tokens.shape[0], h.shape[0]), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        if WHOLE:
            block = loaded
        else:
            block = load_key(key, heads, tokens, row_mask, c, channels, DOUBLE)
        down = load_matrix(p_down, c, channels, stride_channel, h, hidden, stride_unit, DOUBLE)  # [BC, BH]
        pre = exact_dot(block, down, pre, PARTS)
    return pre


@triton.jit
def refined_key(
    key, delta, weights, dropout, tokens, row_mask, c, channels, heads, hidden, scale,
    BC: tl.constexpr, BH: tl.constexpr, WHOLE: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr,
    DELTA: tl.constexpr, RAW: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k' [rows, c], and the mean key that it was made of. RAW: the 16-bit key as it is.

    WHOLE: C and the hidden units fit into one block each. Loops over blocks are then of one constant round, which the compiler
    unrolls.
    """
    if RAW:
        raw = load_raw_key(key, tokens, row_mask, c, channels)
        return raw, raw
    else:
        mean = load_key(key, heads, tokens, row_mask, c, channels, DOUBLE)
        refined = mean
        if REFINED:
            _p_down, p_up, _stride_down_h, _stride_down_c, stride_channel, stride_unit = weights
            up = zeros(mean.shape, DOUBLE)
            for h_start in range(0, BH if WHOLE else hidden, BH):
                h = h_start + tl.arange(0, BH)
                pre = before_relu(mean, key, weights, heads, tokens, row_mask, h, hidden, channels, BC, WHOLE, DOUBLE, PARTS)
                units = relu(pre)
                if MASKED:
                    units *= load_dropout(dropout, tokens, row_mask, h, hidden, MASKED, DOUBLE)
                w_up = load_matrix(p_up, h, hidden, stride_unit, c, channels, stride_channel, DOUBLE)  # [BH, BC]
                up = exact_dot(units, w_up, up, PARTS)
            refined += scale * up
        if DELTA:
            p_delta, stride_token, stride_channel_d = delta
            pointers = p_delta + tokens[:, None] * stride_token + c.to(tl.int64)[None, :] * stride_channel_d
            refined += wide(tl.load(pointers, mask=row_mask[:, None] & (c < channels)[None, :], other=0.0), DOUBLE)
        return refined, mean


@triton.jit
def sum_of_squares(t, DOUBLE: tl.constexpr):
    """Of each row [rows, c]."""
    t = wide(t, DOUBLE)
    return tl.sum(product(t, t), axis=1)


@triton.jit
def square_root(t):
    if t.dtype == tl.float64:
        return tl.sqrt(t)
    else:
        return tl.sqrt_rn(t)


@triton.jit
def inverse_norm(norm):
    """1 / max(‖k'‖, 1e-12), NaN for NaN."""
    return 1.0 / tl.where(norm <= NORM_EPS, NORM_EPS, norm)


@triton.jit
def hidden_gradient(
    p_refined_grad, key, weights, dropout, row, row_mask, tokens, h, channels, heads, hidden, scale,
    BC: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dhidden = scale · dk' W_up ⊙ mask ⊙ [pre > 0], and the hidden units themselves, both [rows, h]; dk' is at ``row``."""
    _p_down, p_up, _stride_down_h, _stride_down_c, stride_channel, stride_unit = weights
    first = tl.arange(0, BC)
    loaded = zeros((tokens.shape[0], BC), DOUBLE)
    if WHOLE:
        loaded = load_key(key, heads, tokens, row_mask, first, channels, DOUBLE)
    pre = before_relu(loaded, key, weights, heads, tokens, row_mask, h, hidden, channels, BC, WHOLE, DOUBLE, PARTS)
    through = zeros((tokens.shape[0], h.shape[0]), DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        mask = row_mask[:, None] & (c < channels)[None, :]
        grad = tl.load(p_refined_grad + row[:, None] * channels + c[None, :], mask=mask, other=0.0)
        w_up = load_matrix(p_up, c, channels, stride_channel, h, hidden, stride_unit, DOUBLE)  # [BC, BH]
        through = exact_dot(grad, w_up, through, PARTS)
    units = relu(pre)
    if MASKED:
        keep = load_dropout(dropout, tokens, row_mask, h, hidden, MASKED, DOUBLE)
        through *= keep
        units *= keep
    return relu_gradient(pre, through * scale), units
