"""Small parts that bring packages to the contract: their imports, seeds, shapes and dtypes.

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
    "Feed",
    "expand_heads",
    "in_dtype",
    "merge_heads",
    "quiet_import",
    "seeded",
    "split_heads",
]


@contextmanager
def quiet_import() -> Iterator[None]:
    """Old packages use APIs that Python or torch deprecate; that is not for us to act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Fixed random numbers inside; the global CPU generator is as before afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Feed(nn.Module):
    """Takes the place of a package's projection: hands over a tensor set before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise RuntimeError("Feed was called without a tensor")
        return tensor


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """(B, G, N, D) -> (B, heads, N, D), for packages without grouped heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D), always a copy: packages scale their queries in place."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D), a view."""
    out: Tensor = x.unflatten(2, (heads, -1))
    return out.transpose(1, 2)


def in_dtype(core: nn.Module, dtype: torch.dtype, *args: Tensor) -> Tensor:
    """Call a package's module with its trained parameters in ``dtype``; gradients reach them."""
    cast = {
        name: p.to(dtype)
        for name, p in core.named_parameters()
        if p.dtype != dtype and not name.startswith("rotary")  # frequencies need their precision
    }
    out: Tensor = functional_call(core, cast, args) if cast else core(*args)
    return out
