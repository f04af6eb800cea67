"""The backward: any number of tokens, any C, D and hidden width, every dtype. Extra memory grows with N.

``spread_gradient`` is all of it without a key path; with one, ``prepare_backward`` → ``pair_pass`` → ``refined_gradient`` →
``weight_partials`` → ``reduce_partials``, and ``attached_gradient`` for a key that is refined and not detached.

Sizes that change from call to call, or with the resolution, are not specialised: another batch compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import hidden_gradient, inverse_norm, load_key, load_matrix
from .long import dot_with_rows, load_rows, prepare_rows, row_inverse_norm, tile_scores
from .primitives import (
    NORM_EPS,
    exact_dot,
    merged_token,
    product,
    reciprocal,
    row_token,
    soft_slope,
    source_token,
    split_scalar,
    store,
    unknown_zero,
    wide,
    zeros,
)

# --- tokens and sizes: a gather --------------------------------------------------------------------------------------


@triton.jit
def _spread(
    grad, grad_size, x, size, tokens_out, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size,
    b, block, num_a, merged, prefix, width, dim,
    BR: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, GRAD_SIZE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """dx_t = size_t g_{e(t)} and dsize_t = γ_e + G_e · (x_t − y_e) / n_e, e(t) the merged row that token t went into.

    Rows: kept tokens first (merged order), then sources.
    """
    p_grad, stride_grad_e, stride_grad_d = grad
    tokens_in = merged + num_a
    r = block * BR + tl.arange(0, BR)
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
    ratio = 1.0 / n
    if SIZED:
        p_size, stride_size_n = size
        ratio = wide(tl.load(p_size + token * stride_size_n, mask=row_mask, other=1.0), DOUBLE) / n
    dot = zeros((BR,), DOUBLE)
    for d_start in range(0, dim, BD):
        d = (d_start + tl.arange(0, BD)).to(tl.int64)
        mask = row_mask[:, None] & (d < dim)[None, :]
        g = wide(tl.load(p_grad + e[:, None] * stride_grad_e + d[None, :] * stride_grad_d, mask=mask, other=0.0), DOUBLE)
        if NEED_SIZE:
            p_x, stride_x_n, stride_x_d = x
            p_tokens, stride_tok_e, stride_tok_d = tokens_out
            here = wide(tl.load(p_x + token[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=mask, other=0.0), DOUBLE)
            y = wide(tl.load(p_tokens + e[:, None] * stride_tok_e + d[None, :] * stride_tok_d, mask=mask, other=0.0), DOUBLE)
            dot += tl.sum(product(g, here - y), axis=1)
        if NEED_X:
            store(p_grad_x + (b * tokens_in + token)[:, None] * dim + d[None, :], g * ratio[:, None], mask)
    if NEED_SIZE:
        dot = dot / n
        if GRAD_SIZE:
            p_grad_size, stride_gs_e = grad_size
            dot += wide(tl.load(p_grad_size + e * stride_gs_e, mask=row_mask, other=0.0), DOUBLE)
        store(p_grad_in_size + b * tokens_in + token, dot, row_mask)


@triton.jit(do_not_specialize=["num_a", "merged", "width", "stride_size_b", "stride_gs_b"])
def spread_gradient(
    p_grad, p_grad_size, p_x, p_size, p_split_a, p_split_b, p_tokens, p_merged_size, p_match, p_grad_x, p_grad_in_size,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_tok_b, stride_tok_e, stride_tok_d,
    stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    num_a, merged, prefix, width, dim,
    BR: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, GRAD_SIZE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The whole backward where no gradient reaches the key path."""
    blocks = tl.cdiv(merged + num_a, BR)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    _spread(
        (p_grad + b * stride_grad_b, stride_grad_e, stride_grad_d), (p_grad_size + b * stride_gs_b, stride_gs_e),
        (p_x + b * stride_x_b, stride_x_n, stride_x_d), (p_size + b * stride_size_b, stride_size_n),
        (p_tokens + b * stride_tok_b, stride_tok_e, stride_tok_d), p_merged_size, p_match, p_split_a, p_split_b, p_grad_x,
        p_grad_in_size, b, tl.program_id(0) % blocks, num_a, merged, prefix, width, dim,
        BR, BD, LISTED, SIZED, GRAD_SIZE, NEED_X, NEED_SIZE, DOUBLE,
    )  # fmt: skip


# --- what the pairs need ---------------------------------------------------------------------------------------------


@triton.jit
def _merged_size_gradient(
    grad, grad_size, tokens_out, p_merged_size, b, j, row_mask, merged, prefix, dim,
    BD: tl.constexpr, GRAD_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """γ'_j = γ_j − (G_j · y_j) / n_j of destinations ``j``."""
    p_grad, stride_grad_e, stride_grad_d = grad
    p_tokens, stride_tok_e, stride_tok_d = tokens_out
    e = (prefix + j).to(tl.int64)
    dot = zeros((j.shape[0],), DOUBLE)
    for d_start in range(0, dim, BD):
        d = (d_start + tl.arange(0, BD)).to(tl.int64)
        mask = row_mask[:, None] & (d < dim)[None, :]
        g = tl.load(p_grad + e[:, None] * stride_grad_e + d[None, :] * stride_grad_d, mask=mask, other=0.0)
        y = tl.load(p_tokens + e[:, None] * stride_tok_e + d[None, :] * stride_tok_d, mask=mask, other=0.0)
        dot += tl.sum(product(wide(g, DOUBLE), wide(y, DOUBLE)), axis=1)
    out = -dot / wide(tl.load(p_merged_size + b * merged + e, mask=row_mask, other=1.0), DOUBLE)
    if GRAD_SIZE:
        p_grad_size, stride_gs_e = grad_size
        out += wide(tl.load(p_grad_size + e * stride_gs_e, mask=row_mask, other=0.0), DOUBLE)
    return out


@triton.jit(do_not_specialize=["num_a", "num_rows", "width", "stride_size_b", "stride_gs_b", "size_programs", "row_programs"])
def prepare_backward(
    p_grad, p_grad_size, p_x, p_size, p_key, p_delta, p_down, p_up, p_mask, p_split_a, p_split_b,
    p_tokens, p_merged_size, p_match, p_prepared, p_norm, p_mean, p_gamma, p_grad_x, p_grad_in_size,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_gs_b, stride_gs_e, stride_tok_b, stride_tok_e, stride_tok_d,
    stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    stride_key_b, stride_key_h, stride_key_n, stride_key_c, stride_delta_b, stride_delta_n, stride_delta_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, dim, channels, heads, hidden, scale_high, scale_low, size_programs, row_programs,
    BR: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr,
    SIZED: tl.constexpr, REFINED: tl.constexpr, MASKED: tl.constexpr, DELTA: tl.constexpr, COSINE: tl.constexpr,
    RAW: tl.constexpr, WHOLE: tl.constexpr, MEAN: tl.constexpr, GRAD_SIZE: tl.constexpr, NEED_X: tl.constexpr,
    NEED_SIZE: tl.constexpr, DOUBLE: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Everything that needs no pairs. The first ``row_programs`` programs form k', its norm and the mean key, the next
    ``size_programs`` γ', the others gather dx and dsize."""
    num_b = num_rows - num_a
    merged = prefix + num_b
    program = tl.program_id(0)
    if program < row_programs:
        blocks = tl.cdiv(num_rows, BK)
        b = (program // blocks).to(tl.int64)
        key = (p_key + b * stride_key_b, stride_key_h, stride_key_n, stride_key_c)
        delta = (p_delta + b * stride_delta_b, stride_delta_n, stride_delta_c)
        weights = (p_down, p_up, stride_down_h, stride_down_c, stride_up_c, stride_up_h)
        dropout = (p_mask + b * stride_mask_b, stride_mask_n, stride_mask_h)
        prepare_rows(
            p_prepared, p_norm, p_mean, key, delta, weights, dropout, p_split_a, p_split_b, b, program % blocks, num_a,
            num_rows, prefix, width, channels, heads, hidden, split_scalar(scale_high, scale_low, DOUBLE),
            BK, BC, BH, LISTED, REFINED, MASKED, DELTA, COSINE, RAW, WHOLE, MEAN, DOUBLE, PLANES, PARTS,
        )  # fmt: skip
    else:
        program -= row_programs
        of_size = program < size_programs
        program = tl.where(of_size, program, program - size_programs)
        blocks = tl.where(of_size, tl.cdiv(num_b, BR), tl.cdiv(merged + num_a, BR))
        b = (program // blocks).to(tl.int64)
        grad = (p_grad + b * stride_grad_b, stride_grad_e, stride_grad_d)
        grad_size = (p_grad_size + b * stride_gs_b, stride_gs_e)
        tokens_out = (p_tokens + b * stride_tok_b, stride_tok_e, stride_tok_d)
        if of_size:
            j = (program % blocks) * BR + tl.arange(0, BR)
            gamma = _merged_size_gradient(
                grad, grad_size, tokens_out, p_merged_size, b, j, j < num_b, merged, prefix, dim, BD, GRAD_SIZE, DOUBLE
            )
            tl.store(p_gamma + b * num_b + j, gamma, mask=j < num_b)
        else:
            _spread(
                grad, grad_size, (p_x + b * stride_x_b, stride_x_n, stride_x_d), (p_size + b * stride_size_b, stride_size_n),
                tokens_out, p_merged_size, p_match, p_split_a, p_split_b, p_grad_x, p_grad_in_size, b, program % blocks, num_a,
                merged, prefix, width, dim, BR, BD, LISTED, SIZED, GRAD_SIZE, NEED_X, NEED_SIZE, DOUBLE,
            )  # fmt: skip


# --- pairs of sources and destinations -------------------------------------------------------------------------------


@triton.jit
def _matrix_gradient(
    grad, x, size, p_merged_size, p_gamma, p_split_a, b, i, a_mask, j, b_mask, num_b, prefix, width, dim,
    BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dM_ij = size_i (g_j · x_i + γ'_j), [sources, destinations]."""
    p_grad, stride_grad_e, stride_grad_d = grad
    p_x, stride_x_n, stride_x_d = x
    token = source_token(i, a_mask, p_split_a, prefix, width, LISTED)
    e = (prefix + j).to(tl.int64)
    grad_m = zeros((i.shape[0], j.shape[0]), DOUBLE)
    for d_start in range(0, dim, BD):
        d = (d_start + tl.arange(0, BD)).to(tl.int64)
        d_mask = d < dim
        x_a = tl.load(
            p_x + token[:, None] * stride_x_n + d[None, :] * stride_x_d, mask=a_mask[:, None] & d_mask[None, :], other=0.0
        )
        g = tl.load(
            p_grad + e[None, :] * stride_grad_e + d[:, None] * stride_grad_d, mask=b_mask[None, :] & d_mask[:, None], other=0.0
        )
        if DOUBLE:
            grad_m = exact_dot(wide(x_a, DOUBLE), wide(g, DOUBLE), grad_m, PARTS)
        else:
            grad_m = exact_dot(x_a, g, grad_m, PARTS)
    n = wide(tl.load(p_merged_size + b * (prefix + num_b) + e, mask=b_mask, other=1.0), DOUBLE)
    gamma = tl.load(p_gamma + b * num_b + j, mask=b_mask, other=0.0)
    grad_m = grad_m / n[None, :] + gamma[None, :]
    if SIZED:
        p_size, stride_size_n = size
        grad_m = grad_m * wide(tl.load(p_size + token * stride_size_n, mask=a_mask, other=0.0), DOUBLE)[:, None]
    return grad_m


@triton.jit(
    do_not_specialize=["num_a", "num_b", "width", "stride_size_b", "planes_out", "rows", "columns", "row_steps", "column_steps",
                         "step"]
)  # fmt: skip
def pair_pass(
    p_grad, p_x, p_size, p_split_a, p_merged_size, p_mid, p_gamma, p_prepared, p_norm, p_share, p_partial,
    stride_grad_b, stride_grad_e, stride_grad_d, stride_x_b, stride_x_n, stride_x_d, stride_size_b, stride_size_n,
    num_a, num_b, prefix, width, dim, channels, planes_out, rows, columns, row_steps, column_steps, step,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LISTED: tl.constexpr, SIZED: tl.constexpr,
    COSINE: tl.constexpr, WHOLE: tl.constexpr, DOUBLE: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ds = dM ⊙ p (1 − p) of each pair once, and what it adds to dk̂ on both sides, without the share of the two best.

    ``rows`` × ``columns`` programs of an image have ``row_steps`` blocks of BA sources and ``column_steps`` of BB destinations
    each; a launch does one block of sources, number ``step``. Partial sums (B, planes_out, N_A + N_B, C): those of a source in
    one plane for each column of programs, those of a destination in one for each row of them. Shares: ½ Σ_j ds_ij of a
    column's destinations, (B, columns, N_A).
    """
    program = tl.program_id(0)
    column = program % columns
    row = program // columns % rows
    b = (program // columns // rows).to(tl.int64)
    grad = (p_grad + b * stride_grad_b, stride_grad_e, stride_grad_d)
    x = (p_x + b * stride_x_b, stride_x_n, stride_x_d)
    size = (p_size + b * stride_size_b, stride_size_n)
    num_rows = num_a + num_b
    i = (row * row_steps + step) * BA + tl.arange(0, BA)
    a_mask = i < num_a
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_mask = c < channels
    mid = tl.load(p_mid + b * num_a + i, mask=a_mask, other=0.0)
    unit_grad = zeros((BA, BC), DOUBLE)
    share = zeros((BA,), DOUBLE)
    first = column * column_steps * BB
    last = tl.minimum(first + column_steps * BB, num_b)
    for start in tl.range(first, last, BB, num_stages=1, disable_licm=True):
        j = start + tl.arange(0, BB)
        b_mask = j < num_b
        grad_m = _matrix_gradient(
            grad, x, size, p_merged_size, p_gamma, p_split_a, b, i, a_mask, j, b_mask, num_b, prefix, width, dim,
            BD, LISTED, SIZED, DOUBLE, PARTS,
        )  # fmt: skip
        scores = tile_scores(
            p_prepared, p_norm, b, i + unknown_zero(start), a_mask, num_a + j, b_mask, channels, num_rows,
            BC, COSINE, WHOLE, DOUBLE, PLANES, PARTS,
        )  # fmt: skip
        grad_s = tl.where(a_mask[:, None] & b_mask[None, :], grad_m * soft_slope(scores, mid[:, None]), 0.0)
        share += tl.sum(grad_s, axis=1)
        to_b = grad_s
        if COSINE:
            to_b = grad_s * row_inverse_norm(p_norm, b, i, a_mask, num_rows)[:, None]
        # Summed up in memory, launch after launch.
        at_b = p_partial + ((b * planes_out + row) * num_rows + num_a + j)[:, None] * channels + c[None, :]
        mask_b = b_mask[:, None] & c_mask[None, :]
        unit_grad_b = tl.load(at_b, mask=mask_b & (step > 0), other=0.0)
        # Keys are loaded again, which costs less than keeping them, or what does not change in the loop before it.
        again = unknown_zero(start)
        rows_a = load_rows(p_prepared, b, i + again, a_mask, c, channels, num_rows, PLANES)
        tl.store(at_b, dot_with_rows(tl.trans(to_b), rows_a, unit_grad_b, PLANES, PARTS), mask=mask_b)
        to_a = grad_s
        if COSINE:
            to_a = grad_s * row_inverse_norm(p_norm, b, num_a + j + again, b_mask, num_rows)[None, :]
        rows_b = load_rows(p_prepared, b, num_a + j + again, b_mask, c, channels, num_rows, PLANES)
        unit_grad = dot_with_rows(to_a, rows_b, unit_grad, PLANES, PARTS)
    at_a = p_partial + ((b * planes_out + column) * num_rows + i)[:, None] * channels + c[None, :]
    tl.store(at_a, unit_grad, mask=a_mask[:, None] & c_mask[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_share + (b * columns + column) * num_a + i, share * 0.5, mask=a_mask)


# --- back to the key and the weights ---------------------------------------------------------------------------------


@triton.jit
def _rows_of_image(block, num_a, num_rows, prefix, width, p_split_a, p_split_b, BR: tl.constexpr, LISTED: tl.constexpr):
    """BR tokens of an image, prefix tokens, sources, destinations: row, and which have one; token, and which are one."""
    every = block * BR + tl.arange(0, BR)
    r = tl.maximum(every - prefix, 0)
    row_mask = (every >= prefix) & (r < num_rows)
    token = tl.where(
        every < prefix, every.to(tl.int64), row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
    )
    return r, row_mask, token, every < prefix + num_rows


@triton.jit
def _shares(p_share, b, i, mask, num_a, columns, DOUBLE: tl.constexpr):
    """½ Σ_j ds_ij of sources ``i``."""
    share = zeros(i.shape, DOUBLE)
    for column in range(0, columns):
        share += tl.load(p_share + (b * columns + column) * num_a + i, mask=mask, other=0.0)
    return share


@triton.jit
def _unit_gradient(
    p_partial, p_share, p_prepared, p_norm, p_match, p_second, b, r, row_mask, c, num_a, num_rows, prefix, channels,
    planes_out, rows, columns, BI: tl.constexpr, COSINE: tl.constexpr, DOUBLE: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """dk̂ [rows, c]: the partial sums, less the share that the mean of the two best takes from these two."""
    mask = row_mask[:, None] & (c < channels)[None, :]
    is_source = r < num_a
    planes = tl.where(is_source, columns, rows)
    grad = zeros((r.shape[0], c.shape[0]), DOUBLE)
    for plane in range(0, planes_out):
        at = p_partial + ((b * planes_out + plane) * num_rows + r)[:, None] * channels + c[None, :]
        grad += tl.load(at, mask=mask & (plane < planes)[:, None], other=0.0)
    # Of a source: k̂ of its two best, which take part in its mean.
    a_mask = row_mask & is_source
    share = _shares(p_share, b, r, a_mask, num_a, columns, DOUBLE)
    for which in tl.static_range(2):
        p_two = p_match if which == 0 else p_second
        two = num_a + (tl.load(p_two + b * num_a + r, mask=a_mask, other=prefix) - prefix).to(tl.int32)
        weight = share
        if COSINE:
            weight = share * row_inverse_norm(p_norm, b, two, a_mask, num_rows)
        planes_two = load_rows(p_prepared, b, two, a_mask, c, channels, num_rows, PLANES)
        for plane in tl.static_range(len(planes_two)):
            grad -= weight[:, None] * wide(planes_two[plane], DOUBLE)
    if tl.max(r, axis=0) >= num_a:
        taken = _taken_from_destinations(
            p_share, p_prepared, p_norm, p_match, p_second, b, r - num_a, c, num_a, num_rows, prefix, channels, columns,
            BI, COSINE, DOUBLE, PLANES, PARTS,
        )  # fmt: skip
        grad -= tl.where(is_source[:, None], 0.0, taken)  # 0 · NaN of a source must not reach its neighbours in the block
    return grad


@triton.jit
def _taken_from_destinations(
    p_share, p_prepared, p_norm, p_match, p_second, b, j, c, num_a, num_rows, prefix, channels, columns, BI: tl.constexpr,
    COSINE: tl.constexpr, DOUBLE: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Σ share_i k̂_i over the sources of which destination ``j`` is one of the two best."""
    total = zeros((j.shape[0], c.shape[0]), DOUBLE)
    for start in range(0, num_a, BI):
        i = start + tl.arange(0, BI)
        i_mask = i < num_a
        best = tl.load(p_match + b * num_a + i, mask=i_mask, other=0) - prefix
        second = tl.load(p_second + b * num_a + i, mask=i_mask, other=0) - prefix
        weight = _shares(p_share, b, i, i_mask, num_a, columns, DOUBLE)
        if COSINE:
            weight = weight * row_inverse_norm(p_norm, b, i, i_mask, num_rows)
        hit = ((best[None, :] == j[:, None]) | (second[None, :] == j[:, None])) & i_mask[None, :]
        rows_i = load_rows(p_prepared, b, i, i_mask, c, channels, num_rows, PLANES)
        total = dot_with_rows(tl.where(hit, weight[None, :], 0.0), rows_i, total, PLANES, PARTS)
    return total


@triton.jit(do_not_specialize=["num_a", "num_rows", "width", "planes_out", "rows", "columns"])
def refined_gradient(
    p_split_a, p_split_b, p_match, p_second, p_prepared, p_norm, p_share, p_partial, p_refined_grad, p_grad_refined, p_grad_key,
    num_a, num_rows, prefix, width, channels, heads, planes_out, rows, columns,
    BR: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr, LISTED: tl.constexpr, COSINE: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr, NEED_REFINED: tl.constexpr, NEED_KEY: tl.constexpr, DOUBLE: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """dk' = (dk̂ − k̂ (k̂ · dk̂)) / ‖k'‖, in token order to grad_refined and grad_key, with 0 for prefix tokens.

    KEEP: also by rows, (B, N_A + N_B, C), for the kernels that go on through the refinement.
    """
    blocks = tl.cdiv(prefix + num_rows, BR)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r, row_mask, token, in_image = _rows_of_image(
        tl.program_id(0) % blocks, num_a, num_rows, prefix, width, p_split_a, p_split_b, BR, LISTED
    )
    whole = zeros((BR, BC), DOUBLE)
    if WHOLE:
        whole = _unit_gradient(
            p_partial, p_share, p_prepared, p_norm, p_match, p_second, b, r, row_mask, tl.arange(0, BC), num_a, num_rows,
            prefix, channels, planes_out, rows, columns, BI, COSINE, DOUBLE, PLANES, PARTS,
        )  # fmt: skip
    dot = zeros((BR,), DOUBLE)
    inverse = dot
    if COSINE:
        norm = tl.load(p_norm + b * num_rows + r, mask=row_mask, other=1.0)
        for c_start in range(0, BC if WHOLE else channels, BC):
            c = c_start + tl.arange(0, BC)
            if WHOLE:
                grad = whole
            else:
                grad = _unit_gradient(
                    p_partial, p_share, p_prepared, p_norm, p_match, p_second, b, r, row_mask, c, num_a, num_rows, prefix,
                    channels, planes_out, rows, columns, BI, COSINE, DOUBLE, PLANES, PARTS,
                )  # fmt: skip
            planes = load_rows(p_prepared, b, r, row_mask, c, channels, num_rows, PLANES)
            for plane in tl.static_range(len(planes)):
                dot += tl.sum(product(wide(planes[plane], DOUBLE), grad), axis=1)
        inverse = inverse_norm(norm)
        # A norm at its floor is a constant, and nothing flows through it.
        dot = tl.where(norm <= NORM_EPS, 0.0, dot * inverse * inverse)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        if WHOLE:
            grad = whole
        else:
            grad = _unit_gradient(
                p_partial, p_share, p_prepared, p_norm, p_match, p_second, b, r, row_mask, c, num_a, num_rows, prefix, channels,
                planes_out, rows, columns, BI, COSINE, DOUBLE, PLANES, PARTS,
            )  # fmt: skip
        if COSINE:
            planes = load_rows(p_prepared, b, r, row_mask, c, channels, num_rows, PLANES)
            for plane in tl.static_range(len(planes)):
                grad -= wide(planes[plane], DOUBLE) * dot[:, None]
            grad = grad * inverse[:, None]
        if KEEP:
            at = (b * num_rows + r)[:, None] * channels + c[None, :]
            tl.store(p_refined_grad + at, grad, mask=row_mask[:, None] & (c < channels)[None, :])
        grad = tl.where(row_mask[:, None], grad, 0.0)
        out = (b * (prefix + num_rows) + token)[:, None] * channels + c[None, :]
        out_mask = in_image[:, None] & (c < channels)[None, :]
        if NEED_REFINED:
            store(p_grad_refined + out, grad, out_mask)
        if NEED_KEY:
            store(p_grad_key + out, grad * reciprocal(heads, DOUBLE), out_mask)


@triton.jit(do_not_specialize=["num_a", "num_rows", "width"])
def attached_gradient(
    p_mean, p_down, p_up, p_mask, p_split_a, p_split_b, p_refined_grad, p_grad_key,
    stride_mean_b, stride_mean_h, stride_mean_n, stride_mean_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, mean_heads, heads, hidden, scale_high, scale_low,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dk = dk' + dhidden W_down: the gradient of a key that was refined and is not detached; 0 for prefix tokens."""
    blocks = tl.cdiv(prefix + num_rows, BR)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r, row_mask, token, in_image = _rows_of_image(
        tl.program_id(0) % blocks, num_a, num_rows, prefix, width, p_split_a, p_split_b, BR, LISTED
    )
    key = (p_mean + b * stride_mean_b, stride_mean_h, stride_mean_n, stride_mean_c)
    weights = (p_down, p_up, stride_down_h, stride_down_c, stride_up_c, stride_up_h)
    dropout = (p_mask + b * stride_mask_b, stride_mask_n, stride_mask_h)
    row = b * num_rows + r
    scale = split_scalar(scale_high, scale_low, DOUBLE)
    for c_start in range(0, BC if WHOLE else channels, BC):
        c = c_start + tl.arange(0, BC)
        c_mask = c < channels
        at = row[:, None] * channels + c[None, :]
        grad = tl.load(p_refined_grad + at, mask=row_mask[:, None] & c_mask[None, :], other=0.0)
        for h_start in range(0, BH if WHOLE else hidden, BH):
            h = h_start + tl.arange(0, BH)
            hidden_grad, _units = hidden_gradient(
                p_refined_grad, key, weights, dropout, row, row_mask, token, h, channels, mean_heads, hidden, scale,
                BC, MASKED, WHOLE, DOUBLE, PARTS,
            )  # fmt: skip
            down = load_matrix(p_down, h, hidden, stride_down_h, c, channels, stride_down_c, DOUBLE)  # [BH, BC]
            grad = exact_dot(hidden_grad, down, grad, PARTS)
        grad = tl.where(row_mask[:, None], grad, 0.0)
        out = (b * (prefix + num_rows) + token)[:, None] * channels + c[None, :]
        store(p_grad_key + out, grad * reciprocal(heads, DOUBLE), in_image[:, None] & c_mask[None, :])


@triton.jit(do_not_specialize=["num_a", "num_rows", "width", "rows_per_program"])
def weight_partials(
    p_mean, p_down, p_up, p_mask, p_split_a, p_split_b, p_refined_grad, p_sums,
    stride_mean_b, stride_mean_h, stride_mean_n, stride_mean_c,
    stride_down_h, stride_down_c, stride_up_c, stride_up_h, stride_mask_b, stride_mask_n, stride_mask_h,
    num_a, num_rows, prefix, width, channels, mean_heads, hidden, scale_high, scale_low, rows_per_program,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program's part of dW_downᵀ and dW_up, both laid out (C, h): sums[program, 0 or 1, C, h]."""
    pieces = tl.cdiv(num_rows, rows_per_program)
    b = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces) * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    key = (p_mean + b * stride_mean_b, stride_mean_h, stride_mean_n, stride_mean_c)
    weights = (p_down, p_up, stride_down_h, stride_down_c, stride_up_c, stride_up_h)
    dropout = (p_mask + b * stride_mask_b, stride_mask_n, stride_mask_h)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    c_mask = c < channels
    scale = split_scalar(scale_high, scale_low, DOUBLE)
    down_grad = zeros((BC, BH), DOUBLE)
    up_grad = zeros((BC, BH), DOUBLE)
    for start in range(first, last, BR):
        r = start + tl.arange(0, BR)
        row_mask = r < last
        token = row_token(r, num_a, num_rows, p_split_a, p_split_b, prefix, width, LISTED)
        row = b * num_rows + r
        hidden_grad, units = hidden_gradient(
            p_refined_grad, key, weights, dropout, row, row_mask, token, h, channels, mean_heads, hidden, scale,
            BC, MASKED, WHOLE, DOUBLE, PARTS,
        )  # fmt: skip
        mean = load_key(key, mean_heads, token, row_mask, c, channels, DOUBLE)
        at = row[:, None] * channels + c[None, :]
        grad = tl.load(p_refined_grad + at, mask=row_mask[:, None] & c_mask[None, :], other=0.0)
        down_grad = exact_dot(tl.trans(mean), hidden_grad, down_grad, PARTS)
        up_grad = exact_dot(tl.trans(grad * scale), units, up_grad, PARTS)
    out_mask = c_mask[:, None] & (h < hidden)[None, :]
    out = tl.program_id(0).to(tl.int64) * 2 * channels * hidden + c[:, None] * hidden + h[None, :]
    tl.store(p_sums + out, down_grad, mask=out_mask)
    tl.store(p_sums + out + channels * hidden, up_grad, mask=out_mask)


@triton.jit(do_not_specialize=["pieces"])
def reduce_partials(
    p_sums, p_grad_down, p_grad_up, pieces, channels, hidden, BP: tl.constexpr, BE: tl.constexpr, DOUBLE: tl.constexpr
):
    """dW_down (h, C) and dW_up (C, h): the partial sums added up in the order of the programs that made them."""
    elements = 2 * channels * hidden
    at = tl.program_id(0) * BE + tl.arange(0, BE)
    mask = at < elements
    total = zeros((BE,), DOUBLE)
    for start in range(0, pieces, BP):
        piece = start + tl.arange(0, BP)
        part = tl.load(
            p_sums + piece.to(tl.int64)[:, None] * elements + at[None, :],
            mask=(piece < pieces)[:, None] & mask[None, :],
            other=0.0,
        )
        total += tl.sum(part, axis=0)
    is_down = at < channels * hidden
    c, h = at // hidden % channels, at % hidden
    store(p_grad_down + h * channels + c, total, mask & is_down)
    store(p_grad_up + tl.maximum(at - channels * hidden, 0), total, mask & (at >= channels * hidden))
