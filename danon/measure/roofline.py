"""What this machine's matrix multiplication reaches now: the yardstick of the FLOP/s columns."""

from __future__ import annotations

import time

import torch

__all__ = ["matmul_rate"]

_PRODUCT_S = 0.4
_LARGEST = 8192


def matmul_rate(device: torch.device, dtype: torch.dtype, *, samples: int = 4) -> float:
    """The best rate among square matrix products of growing size, in FLOP/s.

    The size doubles as long as the next product should take less than a fraction of a second:
    some dtypes are a thousand times slower than others on the same processor.

    Args:
        device: cpu or cuda.
        dtype: of the factors and of the product.
        samples: products timed at each size.
    """
    size, rate = 128, 0.0
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        best = min(_seconds(a) for _ in range(samples))
        rate = max(rate, 2 * size**3 / best)
        size *= 2
        if size > _LARGEST or 2 * size**3 / rate > _PRODUCT_S:
            return rate


def _seconds(a: torch.Tensor) -> float:
    _wait(a.device)
    start = time.perf_counter()
    a @ a
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
