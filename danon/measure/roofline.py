"""Rates that this machine reaches now: matrix products, which FLOP/s are compared with; copies."""

from __future__ import annotations

import math
import time

import torch

__all__ = ["copy_rate", "matmul_rate", "matmul_rate_of"]

_PRODUCT_S = 0.4
_LARGEST = 8192
_REPEATED = 20


def matmul_rate(device: torch.device, dtype: torch.dtype, *, samples: int = 4) -> float:
    """Measure the best rate among square matrix products of growing size, in FLOP/s.

    A kernel may compute a narrow dtype in float32, which is faster on processors without units for
    the narrow one: products of both are measured. The size doubles as long as the next product
    should take less than a fraction of a second: some dtypes are a thousand times slower than
    others on the same processor.

    Args:
        device: cpu or cuda.
        dtype: of the tensors that a kernel reads.
        samples: products timed at each size.
    """
    return max(_rate_of(device, product, samples) for product in _product_dtypes(dtype))


def matmul_rate_of(flops: float, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best rate of matrix products with up to about so many FLOPs, in FLOP/s.

    Short calls on a busy machine are compared with products that are as short, repeated. Larger
    ones are left out once they take long.

    Args:
        flops: of the call that is compared.
        device: cpu or cuda.
        dtype: of the tensors that a kernel reads; see :func:`matmul_rate`.
    """
    return max(_short_rate(flops, device, product) for product in _product_dtypes(dtype))


def _product_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which a kernel may multiply."""
    return (dtype,) if dtype.itemsize >= 4 else (dtype, torch.float32)


def _rate_of(device: torch.device, dtype: torch.dtype, samples: int) -> float:
    size, rate = 128, 0.0
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        best = min(_seconds(a) for _ in range(samples))
        rate = max(rate, 2 * size**3 / best)
        size *= 2
        if size > _LARGEST or 2 * size**3 / rate > _PRODUCT_S:
            return rate


def _short_rate(flops: float, device: torch.device, dtype: torch.dtype) -> float:
    rate, size, start = 0.0, 64, time.perf_counter()
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        rate = max(rate, 2 * size**3 / min(_seconds(a) for _ in range(_REPEATED)))
        size *= 2
        if 2 * size**3 > 2 * flops or size > _LARGEST:
            return rate
        if time.perf_counter() - start > _PRODUCT_S:
            return rate


def copy_rate(like: torch.Tensor, *, samples: int = _REPEATED) -> float:
    """Measure the best rate of copies of a tensor: bytes read and written a second.

    Args:
        like: a tensor of the shape and dtype to copy.
        samples: copies timed.
    """
    source, target = torch.zeros_like(like), torch.zeros_like(like)
    best = math.inf
    for _ in range(samples):
        _wait(like.device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(like.device)
        best = min(best, time.perf_counter() - start)
    return 2 * like.nbytes / best


def _seconds(a: torch.Tensor) -> float:
    _wait(a.device)
    start = time.perf_counter()
    a @ a
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
