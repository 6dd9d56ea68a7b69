"""Floating point operations of a call: matrix products and attention kernels.

Loaded by path, like the worker itself, and for the same reason: it imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["count_flops"]


def count_flops(call: Callable[[], object]) -> int:
    """Return the floating point operations of a call, its backward pass included.

    Args:
        call: is called once.
    """
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _two_products,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _five_products,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        call()
    return int(counter.get_total_flops())


def _two_products(q: list[int], k: list[int], *_: object, **__: object) -> int:
    """Count a forward pass, from the shapes (B, H, N, D) of q and k."""
    return 4 * math.prod(q) * k[2]


def _five_products(_: object, q: list[int], k: list[int], *__: object, **___: object) -> int:
    """Count a backward pass; arguments as in a forward pass, behind the gradient."""
    return 10 * math.prod(q) * k[2]
