"""The operators ``fpet::bdm_forward_triton`` and ``fpet::bdm_backward_triton``: arguments and results as ``fpet::bdm_forward``.

They are ``torch.library.triton_op``s, so Inductor sees the kernels. Calls that nobody traces skip the dispatcher: a launch
costs what Triton's own launch costs. Under ``TRITON_INTERPRET=1`` they are opaque operators, since there is nothing to compile.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .. import ops as base
from . import configs, long, short
from .primitives import INTERPRETED

__all__ = ["backward", "forward"]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _two_floats(value: float) -> tuple[float, float]:
    """value as the sum of two float32, which a kernel argument is rounded to."""
    high = ctypes.c_float(value).value
    return high, (value - high if abs(high) != float("inf") else 0.0)


_recorded: list[tuple[Any, tuple, dict[str, Any]]] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple, dict[str, Any]]]]:
    """Launches are noted, as (kernel, arguments, compile-time arguments), instead of made."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _launch(kernel: Any, grid: tuple, *args: Any, **meta: Any) -> None:
    if _recorded is not None:
        _recorded.append((kernel, args, meta))
        return
    if not INTERPRETED.value:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **meta)


class _Problem:
    """What both directions work out from their arguments: sizes, strides, compile-time flags, the configuration."""

    def __init__(
        self, x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None,
        dropout_mask: Tensor | None, key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None,
        grid_h: int, grid_w: int, prefix: int, scale: float, cosine: bool,
    ) -> None:  # fmt: skip
        self.x, self.size, self.prefix, self.width, self.cosine = x, size, prefix, grid_w, cosine
        self.num_a, self.num_b = base._counts(split_a, split_b, grid_h, grid_w)
        self.rows = self.num_a + self.num_b
        self.merged = prefix + self.num_b
        self.batch, _, self.dim = x.shape
        self.listed = split_a is not None
        self.key = key if key.dim() == 4 else key.unsqueeze(1)
        self.heads, self.channels = self.key.shape[1], self.key.shape[3]
        self.refined = w_down is not None
        self.hidden = 0 if w_down is None else w_down.shape[0]
        self.delta = key_delta is not None
        self.masked = dropout_mask is not None
        self.score_dtype = base.reference.compute_dtype(x, key, size, w_down, w_up, key_delta)  # type: ignore[attr-defined]
        self.double = self.score_dtype == torch.float64
        # A 16-bit key that nothing is added to is multiplied as it is.
        self.raw = (
            self.heads == 1 and not self.refined and not self.delta and key.dtype in (torch.float16, torch.bfloat16)
        ) and not self.double
        self.arch = arch = configs.table(x.device.type, x.device.index)
        self.tiles = arch.tiles_double if self.double else arch.tiles
        self.block_h = min(self.tiles.block_c, configs.next_power(max(self.hidden, 1)))
        self.split = arch.split_float32
        self.short = None if self.double else configs.short_class(self.num_a, self.num_b, self.channels, self.hidden)
        # An absent tensor still takes an argument: any pointer will do, it is never read.
        self.p_size = x if size is None else size
        self.p_delta = self.key if key_delta is None else key_delta
        self.p_down = self.key if w_down is None else w_down
        self.p_up = self.key if w_up is None else w_up
        self.p_mask = self.key if dropout_mask is None else dropout_mask
        if self.p_mask.dtype == torch.bool:
            self.p_mask = self.p_mask.view(torch.uint8)
        self.p_a = x if split_a is None else split_a.contiguous()
        self.p_b = x if split_b is None else split_b.contiguous()
        self.s_x = x.stride()
        self.s_size = (0, 0) if size is None else size.stride()[:2]
        self.s_delta = (0, 0, 0) if key_delta is None else key_delta.stride()
        self.s_down = (0, 0) if w_down is None else w_down.stride()
        self.s_up = (0, 0) if w_up is None else w_up.stride()
        self.s_mask = (0, 0, 0) if dropout_mask is None else dropout_mask.stride()
        self.scale = _two_floats(scale)
        self.spread_columns = min(256, configs.next_power(self.dim))

    def new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.score_dtype)

    def short_flags(self) -> dict[str, Any]:
        return {
            "BB": self.short, "BC": configs.next_power(self.channels), "BH": configs.next_power(max(self.hidden, 1)),
            "LISTED": self.listed, "SIZED": self.size is not None, "REFINED": self.refined, "MASKED": self.masked,
            "DELTA": self.delta, "COSINE": self.cosine, "RAW": self.raw, "SPLIT": self.split,
        }  # fmt: skip

    def prepare(self) -> tuple[Tensor, Tensor]:
        """k' of every row (B, N_A + N_B, C) and its norm."""
        t, rows = self.tiles, self.tiles.rows
        prepared = self.x.new_empty(
            (self.batch, self.rows, self.channels), dtype=self.key.dtype if self.raw else self.score_dtype
        )
        norm = self.new(self.batch, self.rows if self.cosine else 1)
        _launch(
            long.prepare_keys, (self.batch * _cdiv(self.rows, rows),),
            self.key, self.p_delta, self.p_down, self.p_up, self.p_mask, self.p_a, self.p_b, prepared, norm,
            *self.key.stride(), *self.s_delta, *self.s_down, *self.s_up, *self.s_mask,
            self.num_a, self.rows, self.prefix, self.width, self.channels, self.heads, self.hidden, *self.scale,
            BR=rows, BC=t.block_c, BH=self.block_h, LISTED=self.listed,
            REFINED=self.refined, MASKED=self.masked, DELTA=self.delta, COSINE=self.cosine, RAW=self.raw, DOUBLE=self.double,
            SPLIT=self.split, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return prepared, norm


def _forward_long(q: _Problem, tokens: Tensor, merged_size: Tensor, match: Tensor, second: Tensor, mid: Tensor) -> None:
    t = q.tiles
    if q.num_a:
        prepared, norm = q.prepare()
        _launch(
            long.match_tiles, (q.batch * _cdiv(q.num_a, t.block_a),),
            prepared, norm, match, second, mid, q.num_a, q.num_b, q.prefix, q.channels,
            BA=t.block_a, BB=t.block_b, BC=t.block_c, COSINE=q.cosine, DOUBLE=q.double, SPLIT=q.split,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    by_destination, order = match.to(torch.int32).sort(dim=1, stable=True)
    bounds = torch.arange(q.merged + 1, dtype=torch.int32, device=match.device).expand(q.batch, -1).contiguous()
    start = torch.searchsorted(by_destination, bounds, out_int32=True)
    block_d = min(1024, configs.next_power(q.dim))
    _launch(
        long.merge_lists, (q.batch * q.merged * _cdiv(q.dim, block_d),),
        q.x, q.p_size, order, start, q.p_a, q.p_b, tokens, merged_size, *q.s_x, *q.s_size,
        q.num_a, q.merged, q.prefix, q.width, q.dim,
        BT=4, BD=block_d, LISTED=q.listed, SIZED=q.size is not None, DOUBLE=q.double, num_warps=4,
    )  # fmt: skip


def _forward_short(
    q: _Problem, config: configs.Short, tokens: Tensor, merged_size: Tensor, match: Tensor, second: Tensor, mid: Tensor
) -> None:
    # The batch decides only how many programs share an image's columns; what each one computes stays the same.
    columns = _cdiv(q.dim, config.block_d)
    steps = _cdiv(columns, min(columns, max(1, q.arch.programs // q.batch)))
    parts = _cdiv(columns, steps)
    block_a = min(config.block_a, configs.next_power(q.num_a))
    _launch(
        short.merge_short, (q.batch * parts,),
        q.x, q.key, q.p_size, q.p_down, q.p_up, q.p_mask, q.p_delta, q.p_a, q.p_b, tokens, merged_size, match, second, mid,
        *q.s_x, *q.key.stride(), *q.s_size, *q.s_down, *q.s_up, *q.s_mask, *q.s_delta,
        q.num_a, q.num_b, q.prefix, q.width, q.dim, q.channels, q.heads, q.hidden, *q.scale, parts, steps,
        BA=block_a, BD=config.block_d, ONE=block_a >= q.num_a, **q.short_flags(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _launch_forward(
    x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None, dropout_mask: Tensor | None,
    key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None, grid_h: int, grid_w: int,
    num_prefix_tokens: int, scale: float, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = (
        x, key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b, grid_h, grid_w, num_prefix_tokens, scale, cosine
    )  # fmt: skip
    outputs = base.forward_outputs(*args)
    if x.shape[0] == 0:
        return outputs
    q = _Problem(*args)
    config = q.arch.forward.get((x.element_size(), q.raw, q.short)) if q.short is not None else None
    if config is None:
        _forward_long(q, *outputs)
    else:
        _forward_short(q, config, *outputs)
    return outputs


def _launch_backward(
    grad_tokens: Tensor, grad_size: Tensor | None, x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None,
    w_up: Tensor | None, dropout_mask: Tensor | None, key_delta: Tensor | None, tokens: Tensor, merged_size: Tensor,
    match: Tensor, second: Tensor, mid: Tensor, split_a: Tensor | None, split_b: Tensor | None, grid_h: int, grid_w: int,
    num_prefix_tokens: int, scale: float, cosine: bool, need_x: bool, need_size: bool, need_weights: bool, need_refined: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (x, key, size, w_down, w_up, dropout_mask, key_delta)
    problem = (split_a, split_b, grid_h, grid_w, num_prefix_tokens, scale, cosine)
    needs = (need_x, need_size, need_weights, need_refined, need_key)
    outputs = base.backward_outputs(grad_tokens, grad_size, *inputs, tokens, merged_size, match, second, mid, *problem, *needs)
    q = _Problem(*inputs, *problem)
    if q.batch == 0 or q.num_a == 0:
        for grad in outputs[1 if q.num_a == 0 and q.batch else 0 :]:  # no source: nothing reaches a key
            grad.zero_()
    if q.batch == 0:
        return outputs
    match, second, mid = match.contiguous(), second.contiguous(), mid.contiguous()
    _backward(q, grad_tokens, grad_size, tokens, merged_size.contiguous(), match, second, mid, outputs, *needs)
    return outputs


def _backward(
    q: _Problem, grad_tokens: Tensor, grad_size: Tensor | None, tokens: Tensor, merged_size: Tensor, match: Tensor,
    second: Tensor, mid: Tensor, outputs: tuple, need_x: bool, need_size: bool, need_weights: bool, need_refined: bool,
    need_key: bool,
) -> None:  # fmt: skip
    grad_x, grad_in_size, grad_down, grad_up, grad_refined, grad_key = outputs
    t = q.tiles
    keys = (need_weights or need_refined or need_key) and q.num_a > 0
    spread = _cdiv(q.merged + q.num_a, t.rows) if need_x or need_size else 0
    p_grad_size = grad_tokens if grad_size is None else grad_size
    s_gs = (0, 0) if grad_size is None else grad_size.stride()[:2]
    outside = (*grad_tokens.stride(), *s_gs, *q.s_x, *q.s_size, *tokens.stride())
    spreading = {
        "BR": t.rows, "LISTED": q.listed, "SIZED": q.size is not None, "GRAD_SIZE": grad_size is not None,
        "NEED_X": need_x, "NEED_SIZE": need_size,
    }  # fmt: skip
    config = q.arch.backward.get((q.x.element_size(), q.raw, q.short)) if keys and q.short is not None else None
    if spread and config is None:
        _launch(
            long.spread_gradient_kernel, (q.batch * spread,),
            grad_tokens, p_grad_size, q.x, q.p_size, tokens, merged_size, match, q.p_a, q.p_b, grad_x, grad_in_size,
            *outside, q.num_a, q.merged, q.prefix, q.width, q.dim,
            BD=q.spread_columns, DOUBLE=q.double, **spreading, num_warps=4,
        )  # fmt: skip
    if not keys:
        return

    prepared, norm = q.prepare()
    gamma = q.new(q.batch, q.num_b)
    _launch(
        long.merged_size_gradient, (q.batch * _cdiv(q.num_b, t.rows),),
        grad_tokens, p_grad_size, tokens, merged_size, gamma, *grad_tokens.stride(), *s_gs, *tokens.stride(),
        q.num_b, q.merged, q.prefix, q.dim, BR=t.rows, BD=q.spread_columns, GRAD_SIZE=grad_size is not None, DOUBLE=q.double,
        num_warps=4,
    )  # fmt: skip
    unit_grad = q.new(q.batch, q.rows, q.channels)
    partial, parts = unit_grad, 0
    if config is not None:
        block_a = min(config.block_a, configs.next_power(q.num_a))
        parts = _cdiv(q.num_a, block_a)
        partial = q.new(q.batch, parts, q.num_b, q.channels)
        _launch(
            short.backward_short, (q.batch * (parts + spread),),
            grad_tokens, p_grad_size, q.x, q.p_size, q.p_a, q.p_b, tokens, merged_size, match, second, mid,
            prepared, norm, gamma, grad_x, grad_in_size, unit_grad, partial, *outside,
            q.num_a, q.num_b, q.prefix, q.width, q.dim, q.channels, parts, spread,
            BA=block_a, BB=q.short, BC=configs.next_power(q.channels), BD=config.block_d, BS=q.spread_columns,
            COSINE=q.cosine, SPLIT=q.split, **spreading, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    else:
        share = q.new(q.batch, q.num_a)
        c_blocks = _cdiv(q.channels, t.block_c)
        for kernel, blocks in ((long.row_pass, _cdiv(q.num_a, t.block_a)), (long.column_pass, _cdiv(q.num_b, t.block_b))):
            _launch(
                kernel, (q.batch * blocks, c_blocks),
                grad_tokens, q.x, q.p_size, merged_size, gamma, prepared, norm, match, second, mid, q.p_a, share, unit_grad,
                *grad_tokens.stride(), *q.s_x, *q.s_size, q.num_a, q.num_b, q.prefix, q.width, q.dim, q.channels,
                BA=t.block_a, BB=t.block_b, BC=t.block_c, BD=t.block_d, LISTED=q.listed, SIZED=q.size is not None,
                COSINE=q.cosine, DOUBLE=q.double, SPLIT=q.split, num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    _launch(
        long.key_gradient, (q.batch * _cdiv(q.prefix + q.rows, t.rows),),
        unit_grad, partial, prepared, norm, q.key, q.p_down, q.p_up, q.p_mask, q.p_a, q.p_b, grad_refined, grad_key,
        *q.key.stride(), *q.s_down, *q.s_up, *q.s_mask,
        q.num_a, q.rows, q.prefix, q.width, q.channels, q.heads, q.hidden, *q.scale, parts,
        BR=t.rows, BC=t.block_c, BH=q.block_h, PARTS=parts > 0, LISTED=q.listed, REFINED=q.refined, MASKED=q.masked,
        COSINE=q.cosine, NEED_REFINED=need_refined, NEED_KEY=need_key, DOUBLE=q.double, SPLIT=q.split, num_warps=t.warps,
        num_stages=t.stages,
    )  # fmt: skip
    if need_weights:
        _weights(q, unit_grad, grad_down, grad_up)


def _weights(q: _Problem, refined_grad: Tensor, grad_down: Tensor, grad_up: Tensor) -> None:
    """dW_down and dW_up from dk': every program sums some rows of one image, then the sums are added up in a fixed order."""
    t = q.tiles
    rows_per_program = 512
    pieces = q.batch * _cdiv(q.rows, rows_per_program)
    partial = q.new(pieces, 2, q.channels, q.hidden)
    _launch(
        long.weight_partials, (pieces, _cdiv(q.hidden, q.block_h), _cdiv(q.channels, t.block_c)),
        refined_grad, q.key, q.p_down, q.p_up, q.p_mask, q.p_a, q.p_b, partial, *q.key.stride(), *q.s_down, *q.s_up, *q.s_mask,
        q.num_a, q.rows, q.prefix, q.width, q.channels, q.heads, q.hidden, *q.scale, rows_per_program,
        BR=t.rows, BC=t.block_c, BH=q.block_h, LISTED=q.listed, MASKED=q.masked, DOUBLE=q.double, SPLIT=q.split,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    _launch(
        long.reduce_partials, (_cdiv(2 * q.channels * q.hidden, 64),),
        partial, grad_down, grad_up, pieces, q.channels, q.hidden, BP=16, BE=64, DOUBLE=q.double, num_warps=4,
    )  # fmt: skip


_register = torch.library.custom_op if INTERPRETED.value else torch.library.triton_op
_forward_op = _register("fpet::bdm_forward_triton", _launch_forward, mutates_args=())
_backward_op = _register("fpet::bdm_backward_triton", _launch_backward, mutates_args=())
_forward_op.register_fake(base.forward_outputs)  # type: ignore[attr-defined]
_backward_op.register_fake(base.backward_outputs)  # type: ignore[attr-defined]
register_flop_formula(torch.ops.fpet.bdm_forward_triton)(base.forward_flops)
register_flop_formula(torch.ops.fpet.bdm_backward_triton)(base.backward_flops)


def _seen(x: Tensor) -> bool:
    """Somebody watches operators go by (a tracer, a counter, a subclass), who must see one."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, torch.nn.Parameter)


def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fpet.bdm_forward`` on Triton kernels."""
    if _seen(x):
        return torch.ops.fpet.bdm_forward_triton(x, *args)
    return _launch_forward(x, *args)


def backward(grad_tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fpet.bdm_backward`` on Triton kernels."""
    if _seen(grad_tokens):
        return torch.ops.fpet.bdm_backward_triton(grad_tokens, *args)
    return _launch_backward(grad_tokens, *args)
