"""The operators ``fpet::bdm_forward_triton`` and ``fpet::bdm_backward_triton``: arguments and results as ``fpet::bdm_forward``.

They are ``torch.library.triton_op``s, so Inductor sees the kernels. Calls that nobody traces skip the dispatcher. What a call
needs besides its tensors is worked out once per shape, strides and types (:class:`_Problem`), and a kernel that Triton has
compiled is launched without going through Triton's search for it again (:class:`_Launch`). Under ``TRITON_INTERPRET=1`` the
operators are opaque, since there is nothing to compile.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .. import ops as base
from . import configs, long, short
from .primitives import INTERPRETED

__all__ = ["backward", "forward"]

Call = tuple[tuple, tuple, dict[str, Any]]  # grid; numbers; compile-time constants and launch options


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _two_floats(value: float) -> tuple[float, float]:
    """value as the sum of two float32, which a kernel argument is rounded to."""
    high = ctypes.c_float(value).value
    return high, (value - high if abs(high) != float("inf") else 0.0)


# --- launching -------------------------------------------------------------------------------------------------------


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


# The versions whose launch of a compiled kernel takes the arguments that _Launch gives it, which a test compares with Triton's.
_SHORTCUT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


class _Launch:
    """One kernel, and everything of its call but the tensors, which come first among its arguments.

    ``traced``: Inductor watches. ``device``: the index of an NVIDIA GPU, where launches after the first take the short cut;
    what else Triton would look at, the types and the alignment of the tensors, is part of a problem's key. AMD's
    specialisations depend on the size of a tensor's storage too.
    """

    __slots__ = ("compiled", "device", "grid", "kernel", "meta", "numbers", "rest", "traced")

    def __init__(self, kernel: Any, call: Call, traced: bool, device: int | None) -> None:
        self.kernel, (grid, self.numbers, self.meta) = kernel, call
        self.grid = (*grid, 1, 1)[:3]
        self.rest = (*self.numbers, *(self.meta[name] for name in kernel.arg_names if name in self.meta))
        self.traced, self.device, self.compiled = traced, device, None

    def __call__(self, *tensors: Tensor) -> None:
        if _recorded is not None:
            _recorded.append((self.kernel, (*tensors, *self.numbers), self.meta))
        elif self.traced:
            torch.library.wrap_triton(self.kernel)[self.grid](*tensors, *self.numbers, **self.meta)
        elif self.compiled is None:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.meta)
            if self.device is not None:
                self.compiled = compiled
        else:  # as JITFunction.run does once it has found the kernel
            compiled, grid, runtime = self.compiled, self.grid, triton.knobs.runtime
            args = (*tensors, *self.rest)
            stream = triton.runtime.driver.active.get_current_stream(self.device)
            compiled.run(
                *grid, stream, compiled.function, compiled.packed_metadata, compiled.launch_metadata(grid, stream, *args),
                runtime.launch_enter_hook, runtime.launch_exit_hook, *args,
            )  # fmt: skip


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current one, where Triton launches."""
    if device.type not in ("cuda", "xpu"):
        return _NOWHERE
    module = getattr(torch, device.type)
    return _NOWHERE if module.current_device() == device.index else module.device(device)


_NOWHERE = contextlib.nullcontext()


def _plain(x: Tensor) -> bool:
    """Not a tracer's or a subclass's tensor."""
    return type(x) is Tensor or type(x) is torch.nn.Parameter


# --- what a call needs besides its tensors ---------------------------------------------------------------------------


class _Problem:
    """Sizes, strides, compile-time constants and the configuration of a forward; its launches, each worked out once."""

    def __init__(
        self, x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None,
        dropout_mask: Tensor | None, key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None,
        grid_h: int, grid_w: int, prefix: int, scale: float, cosine: bool,
    ) -> None:  # fmt: skip
        self.prefix, self.width, self.cosine = prefix, grid_w, cosine
        self.num_a, self.num_b = base._counts(split_a, split_b, grid_h, grid_w)
        self.rows = self.num_a + self.num_b
        self.merged = prefix + self.num_b
        self.batch, _, self.dim = x.shape
        self.item = x.element_size()
        self.listed, self.sized = split_a is not None, size is not None
        self.heads, self.channels = key.shape[1] if key.dim() == 4 else 1, key.shape[-1]
        self.refined, self.masked, self.delta = w_down is not None, dropout_mask is not None, key_delta is not None
        self.hidden = 0 if w_down is None else w_down.shape[0]
        self.score_dtype = base.reference.compute_dtype(x, key, size, w_down, w_up, key_delta)  # type: ignore[attr-defined]
        self.double = self.score_dtype == torch.float64
        # A 16-bit key that nothing is added to is multiplied as it is.
        half = key.dtype in (torch.float16, torch.bfloat16) and not self.double
        self.raw = bool(half and not self.refined and not self.delta and self.heads == 1)  # bool(): heads may be symbolic
        self.key_dtype = key.dtype
        self.arch = configs.table(x.device.type, x.device.index)
        self.tiles = self.arch.tiles_double if self.double else self.arch.tiles
        self.block_h = min(self.tiles.block_c, configs.next_power(max(self.hidden, 1)))
        self.whole = bool(self.channels <= self.tiles.block_c and self.hidden <= self.block_h)
        self.split = self.arch.split_float32
        self.short = None if self.double else configs.short_class(self.num_a, self.num_b, self.channels, self.hidden)
        stride = key.stride()
        self.s_x, self.s_key = x.stride(), stride if len(stride) == 4 else (stride[0], 0, *stride[1:])
        self.s_size = (0, 0) if size is None else size.stride()[:2]
        self.s_delta = (0, 0, 0) if key_delta is None else key_delta.stride()
        self.s_down = (0, 0) if w_down is None else w_down.stride()
        self.s_up = (0, 0) if w_up is None else w_up.stride()
        self.s_mask = (0, 0, 0) if dropout_mask is None else dropout_mask.stride()
        self.scale = _two_floats(float(scale))
        self.spread_columns = min(256, configs.next_power(self.dim))
        self.traced = not _plain(x)
        nvidia = x.device.type == "cuda" and torch.version.hip is None
        self.device = x.device.index if nvidia and _SHORTCUT and not self.traced and not INTERPRETED.value else None
        self.launches: dict[str, _Launch] = {}

    def launch(self, kernel: Any, call: Callable[[], Call], *tensors: Tensor) -> None:
        """Runs ``kernel`` on ``tensors``; ``call`` is asked once for the rest."""
        name = kernel.fn.__name__
        found = self.launches.get(name)
        if found is None:
            found = self.launches[name] = _Launch(kernel, call(), self.traced, self.device)
        found(*tensors)

    def new(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor in the precision of scores."""
        return like.new_empty(shape, dtype=self.score_dtype)

    def short_flags(self) -> dict[str, Any]:
        return {
            "BB": self.short, "BC": configs.next_power(self.channels), "BH": configs.next_power(max(self.hidden, 1)),
            "LISTED": self.listed, "SIZED": self.sized, "REFINED": self.refined, "MASKED": self.masked,
            "DELTA": self.delta, "COSINE": self.cosine, "RAW": self.raw, "SPLIT": self.split,
        }  # fmt: skip

    def key_strides(self) -> tuple[int, ...]:
        return *self.s_key, *self.s_delta, *self.s_down, *self.s_up, *self.s_mask

    def key_flags(self) -> dict[str, Any]:
        t = self.tiles
        return {
            "BR": t.rows, "BC": t.block_c, "BH": self.block_h, "LISTED": self.listed, "REFINED": self.refined,
            "MASKED": self.masked, "DELTA": self.delta, "COSINE": self.cosine, "RAW": self.raw,
            "WHOLE": self.whole, "DOUBLE": self.double,
            "SPLIT": self.split, "num_warps": t.warps, "num_stages": t.stages,
        }  # fmt: skip

    def prepared(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for k' of every row (B, N_A + N_B, C) and its norm."""
        dtype = self.key_dtype if self.raw else self.score_dtype
        prepared = like.new_empty((self.batch, self.rows, self.channels), dtype=dtype)
        return prepared, self.new(like, self.batch, self.rows if self.cosine else 1)


class _Inputs:
    """The tensors of a call. An absent one still takes an argument: any pointer will do, it is never read.

    Positions lead to where kernels write, so torch's analysis takes their lists for written, and Inductor would copy x if it
    stood in for them.
    """

    __slots__ = ("a", "b", "delta", "down", "key", "mask", "size", "up", "x")

    def __init__(
        self, x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None,
        dropout_mask: Tensor | None, key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None,
        traced: bool,
    ) -> None:  # fmt: skip
        self.x, self.key = x, key
        self.size = x if size is None else size
        self.down = key if w_down is None else w_down
        self.up = key if w_up is None else w_up
        self.mask = key if dropout_mask is None else dropout_mask
        if self.mask.dtype == torch.bool:
            self.mask = self.mask.view(torch.uint8)
        self.delta = key if key_delta is None else key_delta
        self.a, self.b = (x.new_empty(1), x.new_empty(1)) if traced else (x, x)
        if split_a is not None and split_b is not None:
            self.a, self.b = split_a.contiguous(), split_b.contiguous()


class _Gradient(_Problem):
    """The same of a backward."""

    def __init__(
        self, inputs: tuple, problem: tuple, needs: tuple, grad: Tensor, grad_size: Tensor | None, tokens: Tensor
    ) -> None:
        super().__init__(*inputs, *problem)
        self.need_x, self.need_size, self.need_weights, self.need_refined, self.need_key = needs
        self.s_grad, self.s_tok = grad.stride(), tokens.stride()
        self.grad_sized = grad_size is not None
        self.s_gs = (0, 0) if grad_size is None else grad_size.stride()[:2]
        self.keys = bool((self.need_weights or self.need_refined or self.need_key) and self.num_a > 0)
        fused = self.keys and self.short is not None and self.arch.ordered
        self.config = self.arch.backward.get((self.item, self.raw, self.short)) if fused else None  # type: ignore[arg-type]
        # The gather: rows of a program (more in the fused kernel, whose programs are few and large), programs per image.
        self.spread_rows = self.tiles.rows if self.config is None else 16 * self.config.warps // self.item
        self.spread = _cdiv(self.merged + self.num_a, self.spread_rows) if self.need_x or self.need_size else 0
        # What goes on through the refinement reads the key again: rather its mean than all of its heads.
        self.through = self.refined and (self.need_weights or self.need_key)
        self.mean = bool(self.through and self.heads > 1)
        self.s_inner: tuple[int, ...] = self.s_key
        self.inner_heads = self.heads
        if self.mean:
            self.s_inner, self.inner_heads = ((self.prefix + self.rows) * self.channels, 0, self.channels, 1), 1
        # Every program of the tiled kernels sums the weight gradients of some rows of one image: as many rows as leave
        # enough programs.
        pieces = max(1, min(_cdiv(self.rows, self.tiles.rows), 2 * self.arch.programs // max(self.batch, 1)))
        self.piece = _cdiv(_cdiv(self.rows, pieces), self.tiles.rows) * self.tiles.rows
        self.pieces = self.batch * (_cdiv(self.rows, self.piece) if self.config is None else 1)

    def outside(self) -> tuple[int, ...]:
        return *self.s_grad, *self.s_gs, *self.s_x, *self.s_size, *self.s_tok

    def spread_flags(self) -> dict[str, Any]:
        return {
            "BR": self.spread_rows, "LISTED": self.listed, "SIZED": self.sized, "GRAD_SIZE": self.grad_sized,
            "NEED_X": self.need_x, "NEED_SIZE": self.need_size,
        }  # fmt: skip

    def inner_strides(self) -> tuple[int, ...]:
        return *self.s_inner, *self.s_down, *self.s_up, *self.s_mask

    def inner_flags(self) -> dict[str, Any]:
        t = self.tiles
        return {
            "BR": t.rows, "BC": t.block_c, "BH": self.block_h, "LISTED": self.listed, "MASKED": self.masked,
            "WHOLE": self.whole, "DOUBLE": self.double, "SPLIT": self.split, "num_warps": t.warps, "num_stages": t.stages,
        }  # fmt: skip


_PROBLEMS: dict[tuple, _Problem] = {}
_MOST_PROBLEMS = 512  # beyond that, somebody's shapes or scales never repeat


def _signature(tensors: tuple) -> tuple:
    """What a launch depends on of its tensors. Triton compiles another kernel for pointers off the 16-byte grid."""
    return tuple([None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() & 15) for t in tensors])


def _remembered(tensors: tuple, numbers: tuple, make: Callable[[], Any]) -> Any:
    """The problem made before for the same signature, or a new one."""
    x = tensors[0]
    if not _plain(x):
        return make()
    arch = configs.table(x.device.type, x.device.index)
    key = (x.device, id(arch), numbers, _signature(tensors))  # the problem keeps arch alive: its id is not used again
    found = _PROBLEMS.get(key)
    if found is None:
        if len(_PROBLEMS) >= _MOST_PROBLEMS:
            _PROBLEMS.clear()
        found = _PROBLEMS[key] = make()
    return found


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward_long(
    q: _Problem, i: _Inputs, tokens: Tensor, merged_size: Tensor, match: Tensor, second: Tensor, mid: Tensor
) -> None:
    t = q.tiles
    if q.num_a:
        prepared, norm = q.prepared(i.x)
        q.launch(
            long.prepare_keys,
            lambda: (
                (q.batch * _cdiv(q.rows, t.rows),),
                (*q.key_strides(), q.num_a, q.rows, q.prefix, q.width, q.channels, q.heads, q.hidden, *q.scale),
                q.key_flags(),
            ),
            i.key, i.delta, i.down, i.up, i.mask, i.a, i.b, prepared, norm,
        )  # fmt: skip
        q.launch(
            long.match_tiles,
            lambda: (
                (q.batch * _cdiv(q.num_a, t.block_a),),
                (q.num_a, q.num_b, q.prefix, q.channels),
                {"BA": t.block_a, "BB": t.block_b, "BC": t.block_c, "COSINE": q.cosine, "WHOLE": q.whole, "DOUBLE": q.double,
                 "SPLIT": q.split, "num_warps": t.warps, "num_stages": t.stages},
            ),
            prepared, norm, match, second, mid,
        )  # fmt: skip
    by_destination, order = match.to(torch.int32).sort(dim=1, stable=True)
    bounds = torch.arange(q.merged + 1, dtype=torch.int32, device=match.device).expand(q.batch, -1).contiguous()
    start = torch.searchsorted(by_destination, bounds, out_int32=True)

    def merge() -> Call:
        block_d = min(1024, configs.next_power(q.dim))
        return (
            (q.batch * q.merged * _cdiv(q.dim, block_d),),
            (*q.s_x, *q.s_size, q.num_a, q.merged, q.prefix, q.width, q.dim),
            {"BT": 4, "BD": block_d, "LISTED": q.listed, "SIZED": q.sized, "DOUBLE": q.double, "num_warps": 4},
        )

    q.launch(long.merge_lists, merge, i.x, i.size, order, start, i.a, i.b, tokens, merged_size)


def _forward_short(
    q: _Problem, config: configs.Short, i: _Inputs, tokens: Tensor, merged_size: Tensor, match: Tensor, second: Tensor,
    mid: Tensor,
) -> None:  # fmt: skip
    def merge() -> Call:
        # The batch decides only how many programs share an image's columns; what each one computes stays the same.
        columns = _cdiv(q.dim, config.block_d)
        steps = _cdiv(columns, min(columns, max(1, q.arch.programs // q.batch)))
        parts = _cdiv(columns, steps)
        block_a = min(config.block_a, configs.next_power(q.num_a))
        return (
            (q.batch * parts,),
            (*q.s_x, *q.s_key, *q.s_size, *q.s_down, *q.s_up, *q.s_mask, *q.s_delta,
             q.num_a, q.num_b, q.prefix, q.width, q.dim, q.channels, q.heads, q.hidden, *q.scale, parts, steps),
            {"BA": block_a, "BD": config.block_d, "ONE": bool(block_a >= q.num_a), **q.short_flags(),
             "num_warps": config.warps, "num_stages": config.stages},
        )  # fmt: skip

    q.launch(
        short.merge_short, merge,
        i.x, i.key, i.size, i.down, i.up, i.mask, i.delta, i.a, i.b, tokens, merged_size, match, second, mid,
    )  # fmt: skip


def _launch_forward(
    x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None, dropout_mask: Tensor | None,
    key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None, grid_h: int, grid_w: int,
    num_prefix_tokens: int, scale: float, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (x, key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b)
    numbers = (grid_h, grid_w, num_prefix_tokens, scale, cosine)
    outputs = base.forward_outputs(*tensors, *numbers)
    if x.shape[0] == 0:
        return outputs
    q = _remembered(tensors, numbers, lambda: _Problem(*tensors, *numbers))
    config = q.arch.forward.get((q.item, q.raw, q.short)) if q.short is not None else None
    if config is not None and not q.arch.ordered and config.block_a < q.num_a:
        config = None
    inputs = _Inputs(*tensors, q.traced)
    with _on_device(x.device) if _plain(x) else _NOWHERE:
        if config is None:
            _forward_long(q, inputs, *outputs)
        else:
            _forward_short(q, config, inputs, *outputs)
    return outputs


# --- backward --------------------------------------------------------------------------------------------------------


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
    saved = (tokens, merged_size.contiguous(), match.contiguous(), second.contiguous(), mid.contiguous())
    outputs = base.backward_outputs(grad_tokens, grad_size, *inputs, *saved, *problem, *needs)
    if x.shape[0] == 0:
        for grad in outputs:
            grad.zero_()
        return outputs
    q = _remembered(
        (x, *inputs[1:], split_a, split_b, grad_tokens, grad_size, *saved), (*problem[2:], needs),
        lambda: _Gradient(inputs, problem, needs, grad_tokens, grad_size, tokens),
    )  # fmt: skip
    if q.num_a == 0:  # no source: nothing reaches a key
        for grad in outputs[1:]:
            grad.zero_()
    with _on_device(x.device) if _plain(x) else _NOWHERE:
        _backward(q, _Inputs(*inputs, split_a, split_b, q.traced), grad_tokens, grad_size, *saved, *outputs)
    return outputs


def _backward(
    q: _Gradient, i: _Inputs, grad_tokens: Tensor, grad_size: Tensor | None, tokens: Tensor, merged_size: Tensor, match: Tensor,
    second: Tensor, mid: Tensor, grad_x: Tensor, grad_in_size: Tensor, grad_down: Tensor, grad_up: Tensor,
    grad_refined: Tensor, grad_key: Tensor,
) -> None:  # fmt: skip
    config = q.config
    if grad_size is None:
        grad_size = grad_tokens
    weights = q.need_weights and q.keys
    sums = q.new(i.x, q.pieces, 2, q.channels, q.hidden) if weights else i.key
    if config is not None:
        _backward_short(
            q, config, i, grad_tokens, grad_size, tokens, merged_size, match, second, mid, grad_x, grad_in_size, grad_refined,
            grad_key, sums,
        )  # fmt: skip
    else:
        _backward_long(
            q, i, grad_tokens, grad_size, tokens, merged_size, match, second, mid, grad_x, grad_in_size, grad_refined, grad_key,
            sums,
        )  # fmt: skip
    if weights:
        q.launch(
            long.reduce_partials,
            lambda: (
                (_cdiv(2 * q.channels * q.hidden, 64),), (q.pieces, q.channels, q.hidden),
                {"BP": 16, "BE": 64, "DOUBLE": q.double, "num_warps": 4},
            ),
            sums, grad_down, grad_up,
        )  # fmt: skip


def _backward_short(
    q: _Gradient, config: configs.Short, i: _Inputs, grad_tokens: Tensor, grad_size: Tensor, tokens: Tensor,
    merged_size: Tensor, match: Tensor, second: Tensor, mid: Tensor, grad_x: Tensor, grad_in_size: Tensor, grad_refined: Tensor,
    grad_key: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    # What a program puts aside for itself: k', in the parts that products take, its norm, the mean key; dk̂.
    parts = norm = mean = i.key
    if not q.raw:
        planes, dtype = (3, torch.bfloat16) if q.split else (1, torch.float32)
        parts = i.x.new_empty((q.batch, planes, q.rows, q.channels), dtype=dtype)
    if q.cosine:
        norm = q.new(i.x, q.batch, q.rows)
    if q.mean:
        mean = q.new(i.x, q.batch, q.rows, q.channels)
    unit_grad = q.new(i.x, q.batch, q.rows, q.channels)
    q.launch(
        short.backward_short,
        lambda: (
            (q.batch * (1 + q.spread),),
            (*q.outside(), *q.key_strides(), q.num_a, q.num_b, q.prefix, q.width, q.dim, q.channels, q.heads, q.hidden,
             *q.scale, q.batch),
            {"BA": min(config.block_a, configs.next_power(q.num_a)), "BD": config.block_d,
             "BY": config.block_d * (1 if q.num_b > 128 else 2), "BK": min(config.rows, 8 * config.warps), "BF": config.rows,
             "BS": q.spread_columns, "MEAN": q.mean, **q.spread_flags(), **q.short_flags(), "NEED_WEIGHTS": q.need_weights,
             "NEED_REFINED": q.need_refined, "NEED_KEY": q.need_key, "num_warps": config.warps, "num_stages": config.stages},
        ),
        grad_tokens, grad_size, i.x, i.key, i.size, i.down, i.up, i.mask, i.delta, i.a, i.b, tokens, merged_size, match, second,
        mid, parts, norm, mean, unit_grad, grad_x, grad_in_size, grad_refined, grad_key, sums,
    )  # fmt: skip


def _backward_long(
    q: _Gradient, i: _Inputs, grad_tokens: Tensor, grad_size: Tensor, tokens: Tensor, merged_size: Tensor, match: Tensor,
    second: Tensor, mid: Tensor, grad_x: Tensor, grad_in_size: Tensor, grad_refined: Tensor, grad_key: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    t = q.tiles
    if q.spread:
        q.launch(
            long.spread_gradient_kernel,
            lambda: (
                (q.batch * q.spread,),
                (*q.outside(), q.num_a, q.merged, q.prefix, q.width, q.dim),
                {"BD": q.spread_columns, "DOUBLE": q.double, **q.spread_flags(), "num_warps": 4},
            ),
            grad_tokens, grad_size, i.x, i.size, tokens, merged_size, match, i.a, i.b, grad_x, grad_in_size,
        )  # fmt: skip
    if not q.keys:
        return

    prepared, norm = q.prepared(i.x)
    mean = q.new(i.x, q.batch, q.prefix + q.rows, q.channels) if q.mean else i.key
    gamma = q.new(i.x, q.batch, q.num_b)

    def prepare() -> Call:
        size_programs = q.batch * _cdiv(q.num_b, t.rows)
        return (
            (size_programs + q.batch * _cdiv(q.rows, t.rows),),
            (*q.key_strides(), *q.s_grad, *q.s_gs, *q.s_tok,
             q.num_a, q.rows, q.prefix, q.width, q.dim, q.channels, q.heads, q.hidden, *q.scale, size_programs),
            {"BD": q.spread_columns, "GRAD_SIZE": q.grad_sized, "MEAN": q.mean, **q.key_flags()},
        )  # fmt: skip

    q.launch(
        long.prepare_backward, prepare,
        i.key, i.delta, i.down, i.up, i.mask, i.a, i.b, prepared, norm, mean,
        grad_tokens, grad_size, tokens, merged_size, gamma,
    )  # fmt: skip
    unit_grad = q.new(i.x, q.batch, q.rows, q.channels)
    share = q.new(i.x, q.batch, q.num_a)

    def tiles(blocks: int) -> Call:
        return (
            (q.batch * blocks, _cdiv(q.channels, t.block_c)),
            (*q.s_grad, *q.s_x, *q.s_size, q.num_a, q.num_b, q.prefix, q.width, q.dim, q.channels),
            {"BA": t.block_a, "BB": t.block_b, "BC": t.block_c, "BD": t.block_d, "LISTED": q.listed, "SIZED": q.sized,
             "COSINE": q.cosine, "WHOLE": q.whole, "DOUBLE": q.double, "SPLIT": q.split, "num_warps": t.warps,
             "num_stages": t.stages},
        )  # fmt: skip

    tensors = (grad_tokens, i.x, i.size, merged_size, gamma, prepared, norm, match, second, mid, i.a, share, unit_grad)
    q.launch(long.row_pass, lambda: tiles(_cdiv(q.num_a, t.block_a)), *tensors)
    q.launch(long.column_pass, lambda: tiles(_cdiv(q.num_b, t.block_b)), *tensors)
    q.launch(
        long.refined_gradient,
        lambda: (
            (q.batch * _cdiv(q.prefix + q.rows, t.rows),),
            (q.num_a, q.rows, q.prefix, q.width, q.channels, q.heads),
            {"BR": t.rows, "BC": t.block_c, "LISTED": q.listed, "COSINE": q.cosine, "KEEP": q.through,
             "NEED_REFINED": q.need_refined, "NEED_KEY": q.need_key and not q.refined, "DOUBLE": q.double, "num_warps": t.warps,
             "num_stages": t.stages},
        ),
        unit_grad, prepared, norm, i.a, i.b, grad_refined, grad_key,
    )  # fmt: skip
    if q.need_key and q.refined:
        q.launch(
            long.attached_gradient,
            lambda: (
                (q.batch * _cdiv(q.prefix + q.rows, t.rows),),
                (*q.inner_strides(), q.num_a, q.rows, q.prefix, q.width, q.channels, q.inner_heads, q.heads, q.hidden,
                 *q.scale),
                q.inner_flags(),
            ),
            unit_grad, mean, i.down, i.up, i.mask, i.a, i.b, grad_key,
        )  # fmt: skip
    if q.need_weights:
        q.launch(
            long.weight_partials,
            lambda: (
                (q.pieces, _cdiv(q.hidden, q.block_h), _cdiv(q.channels, t.block_c)),
                (*q.inner_strides(), q.num_a, q.rows, q.prefix, q.width, q.channels, q.inner_heads, q.hidden, *q.scale,
                 q.piece),
                q.inner_flags(),
            ),
            unit_grad, mean, i.down, i.up, i.mask, i.a, i.b, sums,
        )  # fmt: skip


# --- registration ----------------------------------------------------------------------------------------------------


_register = torch.library.custom_op if INTERPRETED.value else torch.library.triton_op
_forward_op = _register("fpet::bdm_forward_triton", _launch_forward, mutates_args=())
_backward_op = _register("fpet::bdm_backward_triton", _launch_backward, mutates_args=())
_forward_op.register_fake(base.forward_outputs)  # type: ignore[attr-defined]
_backward_op.register_fake(base.backward_outputs)  # type: ignore[attr-defined]
register_flop_formula(torch.ops.fpet.bdm_forward_triton)(base.forward_flops)
register_flop_formula(torch.ops.fpet.bdm_backward_triton)(base.backward_flops)


def _seen(x: Tensor) -> bool:
    """Somebody watches operators go by (a tracer, a counter, a subclass), who must see one."""
    return (
        torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()
    ) or not _plain(x)


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
