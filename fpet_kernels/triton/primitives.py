"""Device functions that the short and the long kernels share.

Naming: N_A sources and N_B destinations; a *row* numbers sources first, then destinations (0 .. N_A + N_B); a *token* is a
position in x and key, prefix tokens included; a *merged row* is a position in the merged tokens. Flags in capitals are
compile-time: DOUBLE (compute in float64, else float32), LISTED (the split is two position lists, else the checkerboard).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NORM_EPS = tl.constexpr(1e-12)  # as reference.NORM_EPS


# --- numbers ---------------------------------------------------------------------------------------------------------


@triton.jit
def wide(t, DOUBLE: tl.constexpr):
    """``t`` in the precision of the computation."""
    if DOUBLE:
        return t.to(tl.float64)
    else:
        return t.to(tl.float32)


@triton.jit
def zeros(shape, DOUBLE: tl.constexpr):
    if DOUBLE:
        return tl.zeros(shape, tl.float64)
    else:
        return tl.zeros(shape, tl.float32)


@triton.jit
def to_bfloat16(t):
    """Nearest, ties to even; Triton's interpreter by itself would truncate."""
    if INTERPRETED:
        t = t.to(tl.float32)
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(t == t, rounded, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return t.to(tl.bfloat16)


@triton.jit
def store(pointers, value, mask):
    """Stores ``value`` rounded to the type behind ``pointers``."""
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, to_bfloat16(value), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def reciprocal(count, DOUBLE: tl.constexpr):
    """1 / count, rounded once: Triton's own division of float32 is not."""
    if DOUBLE:
        return 1.0 / tl.cast(count, tl.float64)
    else:
        return tl.div_rn(tl.cast(1.0, tl.float32), tl.cast(count, tl.float32))


@triton.jit
def split_scalar(high, low, DOUBLE: tl.constexpr):
    """A Python float that came as two float32: eager launches round scalars to float32, Inductor does not."""
    if DOUBLE:
        return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)
    else:
        return tl.cast(high, tl.float32)


# --- products on matrix units ----------------------------------------------------------------------------------------


@triton.jit
def _mma(a, b, acc):
    """acc + a b for 16-bit operands: their products are exact in float32."""
    if INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def split_float32(t):
    """t = high + middle + low in bfloat16; exact for float32 whose magnitude is not at the very ends of the range."""
    high = to_bfloat16(t)
    rest = t - high.to(tl.float32)
    middle = to_bfloat16(rest)
    return high, middle, to_bfloat16(rest - middle.to(tl.float32))


@triton.jit
def _six_products(a_high, a_middle, a_low, b_high, b_middle, b_low, part):
    """part + a b of float32 operands in three bfloat16 parts each, small terms first."""
    part = _mma(a_low, b_high, part)
    part = _mma(a_high, b_low, part)
    part = _mma(a_middle, b_middle, part)
    part = _mma(a_middle, b_high, part)
    part = _mma(a_high, b_middle, part)
    return _mma(a_high, b_high, part)


@triton.jit
def exact_dot(a, b, acc, SPLIT: tl.constexpr):
    """acc + a b to float32 accuracy (float64 for float64 operands), never through tf32.

    16-bit operands of one type go to the matrix units as they are. A float32 operand is the sum of three bfloat16
    (SPLIT): six of the nine products are kept, what is dropped is below 2^-24 of the product of the two magnitudes, and
    small terms are added first. Without SPLIT, float32 multiply-adds.
    """
    if a.dtype == tl.float64:  # tl.dot in float64 does not compile for every target
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return _mma(a, b, acc)
    elif SPLIT:
        part = tl.zeros(acc.shape, tl.float32)  # matrix units truncate as they accumulate: keep their sums short
        if a.dtype == tl.bfloat16:
            high, middle, low = split_float32(b.to(tl.float32))
            part = _mma(a, low, part)
            part = _mma(a, middle, part)
            part = _mma(a, high, part)
        elif b.dtype == tl.bfloat16:
            high, middle, low = split_float32(a.to(tl.float32))
            part = _mma(low, b, part)
            part = _mma(middle, b, part)
            part = _mma(high, b, part)
        else:
            a_high, a_middle, a_low = split_float32(a.to(tl.float32))
            b_high, b_middle, b_low = split_float32(b.to(tl.float32))
            part = _six_products(a_high, a_middle, a_low, b_high, b_middle, b_low, part)
        return acc + part
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def dot_of_parts(
    a_high, a_middle, a_low, b_high, b_middle, b_low, acc, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, SPLIT: tl.constexpr
):
    """acc + a b as :func:`exact_dot`, where the parts of float32 operands may be at hand; else an operand is its high part."""
    if not (A_PARTS or B_PARTS):
        return exact_dot(a_high, b_high, acc, SPLIT)
    else:
        if not A_PARTS:
            a_high, a_middle, a_low = split_float32(a_high)
        if not B_PARTS:
            b_high, b_middle, b_low = split_float32(b_high)
        part = tl.zeros(acc.shape, tl.float32)  # matrix units truncate as they accumulate: keep their sums short
        part = _six_products(a_high, a_middle, a_low, b_high, b_middle, b_low, part)
        return acc + part


# --- positions -------------------------------------------------------------------------------------------------------


@triton.jit
def source_token(i, mask, p_split_a, prefix, width, LISTED: tl.constexpr):
    """Token of source ``i``. On a checkerboard each pair of neighbours (2i, 2i + 1) in raster order holds one of each set."""
    if LISTED:
        return prefix + tl.load(p_split_a + i, mask=mask, other=0)
    else:
        odd_row = (i // tl.maximum(width // 2, 1)) % 2 * (1 - width % 2)  # the pair is turned in odd rows of an even width
        return (prefix + 2 * i + odd_row).to(tl.int64)


@triton.jit
def destination_token(j, mask, p_split_b, prefix, width, LISTED: tl.constexpr):
    """Token of destination ``j``."""
    if LISTED:
        return prefix + tl.load(p_split_b + j, mask=mask, other=0)
    else:
        odd_row = (j // tl.maximum(width // 2, 1)) % 2 * (1 - width % 2)
        return (prefix + 2 * j + 1 - odd_row).to(tl.int64)


@triton.jit
def row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED: tl.constexpr):
    """Token of row ``r``: sources first, then destinations."""
    is_source = r < num_a
    of_source = source_token(r, is_source, p_split_a, prefix, width, LISTED)
    of_destination = destination_token(
        tl.maximum(r - num_a, 0), (r >= num_a) & (r < num_rows), p_split_b, prefix, width, LISTED
    )
    return tl.where(is_source, of_source, of_destination)


@triton.jit
def merged_token(e, mask, p_split_b, prefix, width, LISTED: tl.constexpr):
    """Token kept in merged row ``e``."""
    of_destination = destination_token(tl.maximum(e - prefix, 0), mask & (e >= prefix), p_split_b, prefix, width, LISTED)
    return tl.where(e < prefix, e.to(tl.int64), of_destination)


# --- keys ------------------------------------------------------------------------------------------------------------


@triton.jit
def load_key(
    p_key, stride_head, stride_token, stride_channel, heads, tokens, row_mask, c, channels,
    DOUBLE: tl.constexpr, AT_ONCE: tl.constexpr = 1,
):  # fmt: skip
    """[rows, channels] of one image's key, averaged over its heads; AT_ONCE: heads on their way at a time."""
    pointers = p_key + tokens[:, None] * stride_token + c.to(tl.int64)[None, :] * stride_channel
    mask = row_mask[:, None] & (c < channels)[None, :]
    total = wide(tl.load(pointers, mask=mask, other=0.0), DOUBLE)
    for _ in tl.range(1, heads, loop_unroll_factor=AT_ONCE):
        pointers += stride_head
        total += wide(tl.load(pointers, mask=mask, other=0.0), DOUBLE)
    return total * reciprocal(heads, DOUBLE)


@triton.jit
def load_matrix(p, row, rows, stride_row, column, columns, stride_column, DOUBLE: tl.constexpr):
    """[row, column] of a small matrix, zero outside."""
    pointers = p + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return wide(tl.load(pointers, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0), DOUBLE)


@triton.jit
def inverse_norm(norm):
    """1 / max(‖k'‖, 1e-12)."""
    return 1.0 / tl.maximum(norm, NORM_EPS)


@triton.jit
def square_root(t):
    if t.dtype == tl.float64:
        return tl.sqrt(t)
    else:
        return tl.sqrt_rn(t)


# --- matching --------------------------------------------------------------------------------------------------------


@triton.jit
def top_two(scores, valid):
    """The two largest of every row among the first ``valid`` columns, and where they are.

    Equal scores go to the lowest column, NaN ranks lowest. A second of −inf still needs :func:`second_column`.
    """
    minus_inf = float("-inf")
    column = tl.arange(0, scores.shape[1])[None, :]
    ranked = tl.where((scores == scores) & (column < valid), scores, minus_inf)
    best = tl.max(ranked, axis=1)
    i_best = tl.min(tl.where(ranked == best[:, None], column, scores.shape[1]), axis=1)
    ranked = tl.where(column == i_best[:, None], minus_inf, ranked)
    second = tl.max(ranked, axis=1)
    i_second = tl.min(tl.where(ranked == second[:, None], column, scores.shape[1]), axis=1)
    return best, i_best, second, i_second


@triton.jit
def second_column(second, i_second, i_best):
    """Where nothing but the best has a score, the second is the lowest column that is not the best."""
    return tl.where(second == float("-inf"), tl.where(i_best == 0, 1, 0), i_second)


@triton.jit
def soft_slope(scores, mid):
    """p (1 − p) with p = σ(scores − mid), without cancellation."""
    e = tl.exp(-tl.abs(scores - mid))
    return e / ((1.0 + e) * (1.0 + e))
