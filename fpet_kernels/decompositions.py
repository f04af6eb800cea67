"""The operators ``torch.ops.fpet.*`` in PyTorch's own operators, for exported programs that must run without this package.

The tables below go into :meth:`torch.export.ExportedProgram.run_decompositions`. What comes out needs no backend: ONNX
exporters and other compilers know every operator in it. It computes the match and the merged tokens as
:mod:`fpet_kernels.reference` does, without what only a gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import Inputs, Problem, forward_outputs
from .reference import average_heads, compute_dtype, match_scores, positions, refine_key

__all__ = ["inference_decompositions"]


def inference_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators of this package, each with a function of the same signature that calls PyTorch's operators alone.

    >>> program = torch.export.export(model.eval(), (images,))
    >>> program = program.run_decompositions({**torch.export.default_decompositions(), **inference_decompositions()})

    Programs for inference: the results that only a backward reads (``second``, ``mid``) are left empty. The matching matrix
    of N_A × N_B elements is made here, as no kernel takes its place.
    """
    named: dict[str, Callable[..., Any]] = {
        "bdm_forward": _forward, "bdm_forward_triton": _forward, "bdm_unmerge": _unmerge, "average_heads": _average,
        "merge": lambda *args: _forward(*args[:-1]), "unmerge": _unmerge,
    }  # fmt: skip
    return {getattr(torch.ops.fpet, name).default: f for name, f in named.items() if hasattr(torch.ops.fpet, name)}


def _place(
    device: torch.device, split_a: Tensor | None, split_b: Tensor | None, grid_h: int, grid_w: int
) -> tuple[Tensor, Tensor]:
    if split_a is not None and split_b is not None:
        return split_a, split_b
    return positions((grid_h, grid_w), device)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, key, size, w_down, w_up, dropout_mask, key_delta = Inputs(*args[:7])
    problem: Any = Problem(*args[7:14])
    p, scale = problem.num_prefix_tokens, problem.scale
    dtype = compute_dtype(x, key, size, w_down, w_up, key_delta)
    a, b = _place(x.device, *problem[:4])
    refined = refine_key(average_heads(key, dtype), w_down, w_up, scale, dropout_mask, key_delta)
    scores = match_scores(refined, a, b, p, "cosine" if problem.cosine else "dot")
    best = torch.where(scores.isnan(), float("-inf"), scores).argmax(dim=-1)
    # Sources are summed by a product with the one-hot match: runtimes scatter one element at a time.
    hard = (best[..., None] == torch.arange(scores.shape[-1], device=x.device)).to(dtype)
    weighted = x.to(dtype) if size is None else x.to(dtype) * size.to(dtype)
    sizes = torch.ones_like(x[..., :1], dtype=dtype) if size is None else size.to(dtype)

    def merged(values: Tensor) -> Tensor:
        kept = values[:, b + p] + hard.mT @ values[:, a + p]
        return torch.cat((values[:, :p], kept), dim=1)

    total = merged(sizes)
    like = forward_outputs(*args[:14])
    tokens = (merged(weighted) / total).to(x.dtype)
    return tokens, total.to(like[1].dtype), best + p, like[3], like[4]


def _unmerge(tokens: Tensor, match: Tensor, *places: Any) -> Tensor:
    p = places[4]
    a, b = _place(tokens.device, *places[:4])
    rows = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    stands_for = torch.cat((rows[:, :p], match, rows[:, p:]), dim=1)  # prefix, sources, destinations
    first = torch.arange(p, device=tokens.device)
    order = torch.cat((first, a + p, b + p)).argsort()
    origin = stands_for[:, order]
    return tokens.gather(1, origin[..., None].expand(-1, -1, tokens.shape[2]))


def _average(key: Tensor, wide: bool) -> Tensor:
    return average_heads(key, torch.float64 if wide or key.dtype == torch.float64 else torch.float32)
