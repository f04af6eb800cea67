"""The operators ``fpet::bdm_forward_triton`` and ``fpet::bdm_backward_triton``: arguments and results as ``fpet::bdm_forward``.

They are ``torch.library.triton_op``s, so Inductor sees the kernels. Calls that nobody traces skip the dispatcher. What a call
needs besides its tensors is worked out once per shape, strides and types (:class:`_Problem`), under the names that the kernels'
arguments have; a kernel that Triton has compiled is launched without going through Triton's search for it again
(:class:`_Launch`). Under ``TRITON_INTERPRET=1`` the operators are opaque, since there is nothing to compile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .. import ops as base
from . import backward as tiled
from . import configs, long, short
from .primitives import INTERPRETED

__all__ = ["backward", "forward"]

Plan = tuple[tuple[int, ...], dict[str, Any], int, int]  # grid; arguments of this kernel alone; warps; stages


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _shared_out(blocks: int, most: int) -> tuple[int, int]:
    """``blocks`` shared out among as many as ``most``: how many take part, and how many blocks each one has."""
    steps = max(1, _cdiv(blocks, max(1, min(blocks, most))))
    return _cdiv(blocks, steps), steps


def _two_floats(value: float) -> tuple[float, float]:
    """value as the sum of two float32, which a kernel argument is rounded to."""
    high = ctypes.c_float(value).value
    return high, (value - high if abs(high) != float("inf") else 0.0)


# --- launching -------------------------------------------------------------------------------------------------------


_recorded: list[tuple[Any, tuple, dict[str, Any], tuple[int, ...]]] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple, dict[str, Any], tuple[int, ...]]]]:
    """Launches are noted, as (kernel, arguments, compile-time arguments, grid), instead of made."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# The versions whose launch of a compiled kernel takes the arguments that _Launch gives it, which a test compares with Triton's.
_KNOWN = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
_SHORTCUT = _KNOWN and os.environ.get("FPET_TRITON_SHORTCUT", "1") != "0"  # 0: every launch is Triton's own, to debug


class _Launch:
    """One kernel, and everything of its call but the tensors, whose ``names`` come first among its arguments.

    What a kernel calls p_NAME is a tensor, and what it writes in capitals a compile-time constant.

    ``traced``: Inductor watches. ``device``: the index of an NVIDIA GPU, where launches after the first take the short cut;
    what else Triton would look at, the types and the alignment of the tensors, is part of a problem's key. AMD's
    specialisations depend on the size of a tensor's storage too.
    """

    __slots__ = ("compiled", "device", "grid", "kernel", "meta", "names", "numbers", "rest", "traced")

    def __init__(self, kernel: Any, plan: Plan, values: dict[str, Any], traced: bool, device: int | None) -> None:
        grid, own, warps, stages = plan
        values = values | own
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.names = tuple(name[2:] for name in kernel.arg_names if name.startswith("p_"))
        rest = kernel.arg_names[len(self.names) :]
        self.numbers = tuple(values[name] for name in rest if not name.isupper())
        self.rest = tuple(values[name] for name in rest)
        self.meta = {name: values[name] for name in rest if name.isupper()} | {"num_warps": warps, "num_stages": stages}
        if not traced:  # Inductor does not know the option; Triton's default changes in 3.10, and with it the last bits
            self.meta["enable_fp_fusion"] = True
        self.traced, self.device, self.compiled = traced, device, None

    def __call__(self, *tensors: Tensor) -> None:
        if _recorded is not None:
            _recorded.append((self.kernel, (*tensors, *self.numbers), self.meta, self.grid))
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


def _strides(name: str, axes: str, t: Tensor | None) -> dict[str, int]:
    """``stride_NAME_AXIS`` of every axis; 0 for a tensor that is absent."""
    return {f"stride_{name}_{axis}": 0 if t is None else t.stride(at) for at, axis in enumerate(axes)}


class _Problem:
    """Sizes, strides, flags and configuration of a forward, by the names of the kernels' arguments; its launches, once each."""

    def __init__(
        self, x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None,
        dropout_mask: Tensor | None, key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None,
        grid_h: int, grid_w: int, prefix: int, scale: float, cosine: bool,
    ) -> None:  # fmt: skip
        self.num_a, self.num_b = base._counts(split_a, split_b, grid_h, grid_w)
        self.rows = self.num_a + self.num_b
        self.merged = prefix + self.num_b
        self.batch, _, self.dim = x.shape
        self.item = x.element_size()
        self.heads, self.channels = key.shape[1] if key.dim() == 4 else 1, key.shape[-1]
        self.refined, self.cosine = w_down is not None, cosine
        self.hidden = 0 if w_down is None else w_down.shape[0]
        self.score_dtype = base.reference.compute_dtype(x, key, size, w_down, w_up, key_delta)  # type: ignore[attr-defined]
        self.double = self.score_dtype == torch.float64
        # A 16-bit key that nothing is added to is multiplied as it is.
        half = key.dtype in (torch.float16, torch.bfloat16) and not self.double
        self.raw = bool(half and not self.refined and key_delta is None and self.heads == 1)  # bool(): heads may be symbolic
        self.key_dtype = key.dtype
        self.arch = configs.table(x.device.type, x.device.index)
        self.tiles = self.arch.tiles_double if self.double else self.arch.tiles
        self.block_h = min(self.tiles.block_c, configs.next_power(max(self.hidden, 1)))
        self.short = None if self.double else configs.short_class(self.num_a, self.num_b, self.channels, self.hidden)
        self.parts = 3 if self.arch.split_float32 and not self.double else 0
        high, low = _two_floats(float(scale))
        self.values: dict[str, Any] = {
            "num_a": self.num_a, "num_b": self.num_b, "num_rows": self.rows, "merged": self.merged, "prefix": prefix,
            "width": grid_w, "dim": self.dim, "channels": self.channels, "heads": self.heads, "hidden": self.hidden,
            "batch": self.batch, "scale_high": high, "scale_low": low,
            **_strides("x", "bnd", x), **_strides("size", "bn", size),
            **_strides("key", "bhnc", key if key.dim() == 4 else key[:, None]),
            **_strides("delta", "bnc", key_delta), **_strides("down", "hc", w_down), **_strides("up", "ch", w_up),
            **_strides("mask", "bnh", dropout_mask),
            "LISTED": split_a is not None, "SIZED": size is not None, "REFINED": self.refined,
            "MASKED": dropout_mask is not None, "DELTA": key_delta is not None, "COSINE": cosine, "RAW": self.raw,
            "DOUBLE": self.double, "WHOLE": bool(self.channels <= self.tiles.block_c and self.hidden <= self.block_h),
            "BR": self.tiles.rows, "BC": self.tiles.block_c, "BH": self.block_h,
        }  # fmt: skip
        self.set_parts(self.parts)
        self.traced = not _plain(x)
        nvidia = x.device.type == "cuda" and torch.version.hip is None
        self.device = x.device.index if nvidia and _SHORTCUT and not self.traced and not INTERPRETED.value else None
        self.launches: dict[Any, _Launch] = {}

    def set_parts(self, parts: int) -> None:
        """How many bfloat16 parts a float32 operand has; a prepared k' has a plane for each."""
        self.parts, self.planes = parts, 1 if self.raw or not parts else parts
        self.values |= {"PARTS": parts, "PLANES": self.planes}

    def launch(self, kernel: Any, tensors: dict[str, Tensor], plan: Callable[[], Plan], nth: int = 0) -> None:
        """Runs ``kernel`` on those of ``tensors`` that it names; ``plan`` is asked once, for the ``nth`` launch of a kernel."""
        found = self.launches.get((kernel, nth))
        if found is None:
            found = _Launch(kernel, plan(), self.values, self.traced, self.device)
            self.launches[kernel, nth] = found
        found(*[tensors[name] for name in found.names])

    def tiled(self, programs: int, **own: Any) -> Plan:
        """The plan of a kernel that takes its warps and stages from the table of tiles."""
        return (programs,), own, self.tiles.warps, self.tiles.stages

    def capacity(self) -> int:
        """Programs of the tiled kernels that the GPU runs at once."""
        return self.arch.multiprocessors * self.tiles.fit

    def new(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, in the precision of scores by default."""
        return like.new_empty(shape, dtype=dtype or self.score_dtype)

    def prepared(self, like: Tensor) -> dict[str, Tensor]:
        """Room for the planes of k' of every row, (B, planes, N_A + N_B, C), and its norm."""
        dtype = torch.bfloat16 if self.planes > 1 else self.key_dtype if self.raw else self.score_dtype
        return {
            "prepared": self.new(like, self.batch, self.planes, self.rows, self.channels, dtype=dtype),
            "norm": self.new(like, self.batch, self.rows if self.cosine else 1),
        }


class _Gradient(_Problem):
    """The same of a backward."""

    def __init__(
        self, inputs: tuple, problem: tuple, needs: tuple, grad: Tensor, grad_size: Tensor | None, tokens: Tensor
    ) -> None:
        super().__init__(*inputs, *problem)
        need_x, need_size, self.need_weights, self.need_refined, self.need_key = needs
        self.keys = bool((self.need_weights or self.need_refined or self.need_key) and self.num_a > 0)
        # The gather: programs per image.
        self.spread = _cdiv(self.merged + self.num_a, self.tiles.rows) if need_x or need_size else 0
        # What goes on through the refinement reads the key again: rather its mean than all of its heads.
        self.through = self.refined and (self.need_weights or self.need_key)
        self.mean = bool(self.through and self.heads > 1)
        t = self.tiles
        # Programs of an image that share its pairs out, by the shape of an image alone, because it decides the order of sums.
        self.pair_rows, self.row_steps = _shared_out(_cdiv(self.num_a, t.block_a), configs.PAIR_PROGRAMS)
        self.pair_columns, self.column_steps = _shared_out(_cdiv(self.num_b, t.block_b), configs.PAIR_PROGRAMS)
        self.planes_out = max(self.pair_rows, self.pair_columns)
        # Every program sums the weight gradients of some rows of one image: as many rows as leave enough programs.
        pieces, steps = _shared_out(_cdiv(self.rows, t.rows), 4 * self.capacity() // max(self.batch, 1))
        self.pieces, self.piece = self.batch * pieces, steps * t.rows
        if self.parts and self.item == 2:
            self.set_parts(2)  # y, of which γ' is made, was rounded to 16 bits: more accuracy would be lost on it
        mean = ((self.merged + self.num_a) * self.channels, 0, self.channels, 1) if self.mean else None
        self.values |= {
            **_strides("grad", "bed", grad), **_strides("gs", "be", grad_size), **_strides("tok", "bed", tokens),
            **{f"stride_mean_{a}": mean[at] if mean else self.values[f"stride_key_{a}"] for at, a in enumerate("bhnc")},
            "mean_heads": 1 if self.mean else self.heads,
            "planes_out": self.planes_out, "rows": self.pair_rows, "columns": self.pair_columns,
            "row_steps": self.row_steps, "column_steps": self.column_steps,
            "GRAD_SIZE": grad_size is not None, "MEAN": self.mean, "KEEP": self.through, "NEED_X": need_x,
            "NEED_SIZE": need_size, "NEED_REFINED": self.need_refined, "NEED_KEY": self.need_key and not self.refined,
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


def _inputs(
    x: Tensor, key: Tensor, size: Tensor | None, w_down: Tensor | None, w_up: Tensor | None, dropout_mask: Tensor | None,
    key_delta: Tensor | None, split_a: Tensor | None, split_b: Tensor | None, traced: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a call by the kernels' names. An absent one still takes an argument: any pointer will do.

    Positions lead to where kernels write, so torch's analysis takes their lists for written, and Inductor would copy x if it
    stood in for them.
    """
    mask = key if dropout_mask is None else dropout_mask
    a, b = (x.new_empty(1), x.new_empty(1)) if traced else (x, x)
    if split_a is not None and split_b is not None:
        a, b = split_a.contiguous(), split_b.contiguous()
    return {
        "x": x, "key": key, "size": x if size is None else size, "down": key if w_down is None else w_down,
        "up": key if w_up is None else w_up, "mask": mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        "delta": key if key_delta is None else key_delta, "split_a": a, "split_b": b,
    }  # fmt: skip


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward_long(q: _Problem, t: dict[str, Tensor]) -> None:
    tiles, x = q.tiles, t["x"]
    if q.num_a:
        t |= q.prepared(x)
        q.launch(long.prepare_keys, t, lambda: q.tiled(q.batch * _cdiv(q.rows, tiles.rows)))
        blocks = _cdiv(q.num_a, tiles.block_a)
        # With few images, destinations are shared out too: joined, the two best are the same whoever found them.
        parts, steps = _shared_out(_cdiv(q.num_b, tiles.block_b), q.capacity() // (q.batch * blocks))
        several = parts > 1
        t["scores"] = q.new(x, 2, q.batch, parts, q.num_a) if several else t["mid"]
        t["columns"] = q.new(x, *((2, q.batch, parts, q.num_a) if several else (1,)), dtype=torch.int32)
        q.launch(
            long.match_tiles,
            t,
            lambda: q.tiled(q.batch * blocks * parts, parts=parts, steps=steps, BA=tiles.block_a, BB=tiles.block_b),
        )
        if several:
            q.launch(long.join_matches, t, lambda: ((q.batch * _cdiv(q.num_a, 128),), {"parts": parts, "BA": 128}, 4, 1))
    match = t["match"]
    by_destination, t["order"] = match.to(torch.int32).sort(dim=1, stable=True)
    bounds = torch.arange(q.merged + 1, dtype=torch.int32, device=match.device).expand(q.batch, -1).contiguous()
    t["start"] = torch.searchsorted(by_destination, bounds, out_int32=True)
    block_d = min(1024, configs.next_power(q.dim))
    q.launch(long.merge_lists, t, lambda: ((q.batch * q.merged * _cdiv(q.dim, block_d),), {"BT": 4, "BD": block_d}, 4, 3))


def _forward_short(q: _Problem, config: configs.Short, t: dict[str, Tensor]) -> None:
    block_a = min(config.block_a, configs.next_power(q.num_a))
    one = bool(block_a >= q.num_a)
    # The batch decides only how many programs share an image's columns; what each one computes stays the same.
    parts, steps = _shared_out(_cdiv(q.dim, config.block_d), q.arch.multiprocessors * config.fit // q.batch)
    t["own_match"] = t["match"] if one else q.new(t["x"], q.batch * parts, q.num_a, dtype=torch.int32)
    q.launch(
        short.merge_short, t,
        lambda: (
            (q.batch * parts,),
            {"parts": parts, "steps": steps, "BA": block_a, "BB": q.short, "BC": configs.next_power(q.channels),
             "BH": configs.next_power(max(q.hidden, 1)), "BD": config.block_d, "ONE": one},
            config.warps, config.stages,
        ),
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
    tokens, merged_size, match, second, mid = outputs
    t = _inputs(*tensors, q.traced)
    t |= {"tokens": tokens, "merged_size": merged_size, "match": match, "second": second, "mid": mid}
    with _on_device(x.device) if _plain(x) else _NOWHERE:
        if config is None:
            _forward_long(q, t)
        else:
            _forward_short(q, config, t)
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
        (x, *inputs[1:], split_a, split_b, grad_tokens, grad_size, *saved),
        (*problem[2:], needs),
        lambda: _Gradient(inputs, problem, needs, grad_tokens, grad_size, tokens),
    )
    if q.num_a == 0:  # no source: nothing reaches a key
        for grad in outputs[1:]:
            grad.zero_()
    t = _inputs(*inputs, split_a, split_b, q.traced)
    t |= dict(zip(("tokens", "merged_size", "match", "second", "mid"), saved, strict=True))
    t |= dict(zip(("grad_x", "grad_in_size", "grad_down", "grad_up", "grad_refined", "grad_key"), outputs, strict=True))
    t |= {"grad": grad_tokens, "grad_size": grad_tokens if grad_size is None else grad_size}
    with _on_device(x.device) if _plain(x) else _NOWHERE:
        if q.keys:
            _backward_keys(q, t)
        elif q.spread:
            q.launch(tiled.spread_gradient, t, lambda: ((q.batch * q.spread,), {"BD": _columns(q)}, 4, 3))
    return outputs


def _columns(q: _Problem) -> int:
    """Columns of x in one step of the gather."""
    return min(256, configs.next_power(q.dim))


def _backward_keys(q: _Gradient, t: dict[str, Tensor]) -> None:
    """The backward where a gradient reaches the key path; the gather comes with the first launch."""
    tiles, x = q.tiles, t["x"]
    t |= q.prepared(x)
    t["mean"] = q.new(x, q.batch, q.merged + q.num_a, q.channels) if q.mean else t["key"]
    t["gamma"] = q.new(x, q.batch, q.num_b)

    def prepare() -> Plan:
        of_rows, of_sizes = q.batch * _cdiv(q.rows, tiles.rows), q.batch * _cdiv(q.num_b, tiles.rows)
        return q.tiled(
            of_rows + of_sizes + q.batch * q.spread, row_programs=of_rows, size_programs=of_sizes, BK=tiles.rows, BD=_columns(q)
        )

    q.launch(tiled.prepare_backward, t, prepare)
    t["share"] = q.new(x, q.batch, q.pair_columns, q.num_a)
    t["partial"] = q.new(x, q.batch, q.planes_out, q.rows, q.channels)
    blocks_c = _cdiv(q.channels, tiles.block_c)

    def pairs(step: int) -> Plan:
        own = {"step": step, "BA": tiles.block_a, "BB": tiles.block_b, "BD": tiles.block_d}
        return (q.batch * q.pair_rows * q.pair_columns, blocks_c), own, tiles.warps, tiles.stages

    for step in range(q.row_steps):
        q.launch(tiled.pair_pass, t, lambda step=step: pairs(step), step)  # type: ignore[misc]
    of_tokens = q.batch * _cdiv(q.merged + q.num_a, tiles.rows)
    t["refined_grad"] = q.new(x, q.batch, q.rows, q.channels) if q.through else t["partial"]
    q.launch(tiled.refined_gradient, t, lambda: q.tiled(of_tokens, BI=tiles.block_a))
    if q.need_key and q.refined:
        q.launch(tiled.attached_gradient, t, lambda: q.tiled(of_tokens))
    if q.need_weights:
        t["sums"] = q.new(x, q.pieces, 2, q.channels, q.hidden)

        def weights() -> Plan:
            grid = (q.pieces, _cdiv(q.hidden, q.block_h), blocks_c)
            return grid, {"rows_per_program": q.piece}, tiles.warps, tiles.stages

        q.launch(tiled.weight_partials, t, weights)
        grid = (_cdiv(2 * q.channels * q.hidden, 64),)
        q.launch(tiled.reduce_partials, t, lambda: (grid, {"pieces": q.pieces, "BP": 16, "BE": 64}, 4, 3))


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
