"""Helpers that adapt packages to the contract: imports, random numbers, shapes and dtypes.

Dimension suffixes as in :mod:`danon.attention.base`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "TensorInjector",
    "expand_heads",
    "in_dtype",
    "merge_heads",
    "quiet_import",
    "seeded",
    "split_heads",
]


@contextmanager
def quiet_import() -> Iterator[None]:
    """Ignore deprecation warnings of packages while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed the CPU generator inside the block, and restore it afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
    try:
        yield
    finally:
        torch.set_rng_state(state)


class TensorInjector(nn.Module):
    """Replacement of a package's projection that returns a tensor set before the call.

    Attributes:
        tensor: returned by the next call, then forgotten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensor: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        """Return the tensor, whatever the input."""
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise RuntimeError("TensorInjector was called without a tensor")
        return tensor


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat (B, G, N, D) to (B, heads, N, D), for packages without grouped heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def merge_heads(x: Tensor) -> Tensor:
    """Copy (B, H, N, D) to (B, N, H * D): packages scale their queries in place."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View (B, N, H * D) as (B, H, N, D)."""
    out: Tensor = x.unflatten(2, (heads, -1))
    return out.transpose(1, 2)


def in_dtype(core: nn.Module, dtype: torch.dtype, *args: Tensor) -> Tensor:
    """Call a package's module with its parameters in ``dtype``; gradients reach them."""
    cast = {
        name: p.to(dtype)
        for name, p in core.named_parameters()
        if p.dtype != dtype and not name.startswith("rotary")  # frequencies need their precision
    }
    out: Tensor = functional_call(core, cast, args) if cast else core(*args)
    return out
