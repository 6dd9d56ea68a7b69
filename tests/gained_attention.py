"""Dense causal attention with a learned gain per head, its inputs, and masks that are wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from danon.measure.correctness import Attend, dense_rows

N, HEADS, D = 160, 2, 32


def gained(out: Tensor, gain: Tensor) -> Tensor:
    return (out.float() * gain[:, None, None]).to(out.dtype)


class Gained(torch.nn.Module):
    """Dense causal attention with one learned gain per head, so that parameters are checked too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.8, 1.3]))
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gained(sdpa(q, k, v, is_causal=True), self.gain)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        plain = dense_rows(q.double(), k.double(), v.double(), rows, causal=True)
        return plain * self.gain.double()[:, None, None]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, N, D, generator=draw).mul(1.4).to(dtype) for _ in range(3))
    return q, k, v


def masked(model: Gained, change: Callable[[Tensor], None]) -> Attend:
    """Return the model's attention with a changed mask (N, N)."""
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    change(seen)
    return lambda q, k, v: gained(sdpa(q, k, v, seen), model.gain)


def off_by_one(seen: Tensor) -> None:
    seen.copy_(torch.ones_like(seen).tril(1))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)
