"""Counting multiplications and additions of whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["flop_counter"]


def _forward(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def flop_counter() -> FlopCounterMode:
    """torch's counter, also where torch (before 2.15) has no formula for the fused attention of CPUs.

    A multiply and an add count as two.
    """
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)
