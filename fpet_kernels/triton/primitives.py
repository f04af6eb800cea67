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


@triton.jit
def product(a, b):
    """a b, to be summed over a row: rounded by itself.

    Compilers fuse a multiplication with an addition, also with that of what came from another lane. Each lane's own share is
    then exact and the others' are rounded, and copies of one sum, which lanes hold for each other, differ in the last bit.
    """
    return tl.fma(a, b, zeros_like(a))


@triton.jit
def unknown_zero(n):
    """0 for 0 ≤ n < 2²⁴, which the compiler does not know: what it is added to is not worked out earlier and kept in registers.

    A multiple of 16, which the compiler does know: addresses stay aligned.
    """
    return (n >> 24) * 16


@triton.jit
def zeros_like(t):
    return tl.zeros(t.shape, t.dtype)


@triton.jit
def relu(t):
    """max(t, 0), and NaN stays NaN: tl.maximum drops it on GPUs, though not in the interpreter."""
    return tl.where(t <= 0, 0.0, t)


@triton.jit
def relu_gradient(pre, grad):
    """``grad`` where ``pre`` > 0. NaN is not taken for closed: what diverged must show."""
    return tl.where(pre <= 0, 0.0, grad)


# --- products on matrix units ----------------------------------------------------------------------------------------


@triton.jit
def _mma(a, b, acc):
    """acc + a b for 16-bit operands: their products are exact in float32."""
    if INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def parts_of(t, PARTS: tl.constexpr):
    """``t`` as a sum of bfloat16, the largest first; what is bfloat16 is its own only part.

    Three parts are exact for float32 whose magnitude is not at the very ends of the range, two are good to 2^-17.
    """
    if t.dtype == tl.bfloat16:
        return (t,)
    else:
        t = t.to(tl.float32)
        high = to_bfloat16(t)
        rest = t - high.to(tl.float32)
        middle = to_bfloat16(rest)
        if PARTS == 2:
            return high, middle
        else:
            return high, middle, to_bfloat16(rest - middle.to(tl.float32))


@triton.jit
def dot_of_parts(a, b, acc, PARTS: tl.constexpr):
    """acc + a b of operands in bfloat16 parts, small terms first.

    Of three parts by three, six products are kept: what is dropped is below 2^-24 of the product of the two magnitudes. Of two
    by two, three: 2^-16.
    """
    part = tl.zeros(acc.shape, tl.float32)  # matrix units truncate as they accumulate: keep their sums short
    for together in tl.static_range(PARTS - 1, -1, -1):
        for i in tl.static_range(0, together + 1):
            if i < len(a) and together - i < len(b):
                part = _mma(a[i], b[together - i], part)
    return acc + part


@triton.jit
def exact_dot(a, b, acc, PARTS: tl.constexpr):
    """acc + a b to the accuracy of PARTS, never through tf32.

    16-bit operands of one type go to the matrix units as they are. With PARTS = 0, float32 (or float64) multiply-adds.
    """
    if a.dtype == tl.float64:  # tl.dot in float64 does not compile for every target
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return _mma(a, b, acc)
    elif PARTS == 0:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return dot_of_parts(parts_of(a, PARTS), parts_of(b, PARTS), acc, PARTS)


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
def better_two(best, i_best, second, i_second, other_best, i_other_best, other_second, i_other_second):
    """The two best of two pairs, of which the first come from lower columns and win ties."""
    wins = other_best > best
    return (
        tl.where(wins, other_best, best),
        tl.where(wins, i_other_best, i_best),
        tl.where(wins, tl.where(best >= other_second, best, other_second), tl.where(other_best > second, other_best, second)),
        tl.where(
            wins,
            tl.where(best >= other_second, i_best, i_other_second),
            tl.where(other_best > second, i_other_best, i_second),
        ),
    )


@triton.jit
def second_column(second, i_second, i_best):
    """Where nothing but the best has a score, the second is the lowest column that is not the best."""
    return tl.where(second == float("-inf"), tl.where(i_best == 0, 1, 0), i_second)


@triton.jit
def middle(best, second):
    """Mean of the two best scores; NaN where the second is none, as every score but the best is NaN (or −inf) there.

    With a mid of −inf the gradients of such a row would vanish instead of being NaN, as plain PyTorch's are.
    """
    return tl.where(second == float("-inf"), float("nan"), (best + second) * 0.5)


@triton.jit
def soft_slope(scores, mid):
    """p (1 − p) with p = σ(scores − mid), without cancellation."""
    e = tl.exp(-tl.abs(scores - mid))
    return e / ((1.0 + e) * (1.0 + e))
