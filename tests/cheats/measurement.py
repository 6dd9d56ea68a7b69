"""Attentions that change the clock, the reference, the inputs or the time of their work."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import danon.measure.timing
from cheats.honest import Honest, in_check


class WritesInputs(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(q, k, v)
        if not in_check():
            with torch.no_grad():
                q.zero_()
        return out


class ReturnsView(Honest):
    """Saves the output's memory."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(q, k, v)
        return out if in_check() or torch.is_grad_enabled() else q.copy_(out).view_as(q)


class _LazyTensor(Tensor):
    """Computed when it is read."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        def known(x: object) -> object:
            return x.compute() if isinstance(x, _LazyTensor) else x

        return func(*map(known, args), **(kwargs or {}))


class Lazy(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        out = torch.Tensor._make_subclass(_LazyTensor, torch.empty_like(q))
        exact, given = super().forward, (q, k, v)
        out.compute = lambda: exact(*given)  # type: ignore[attr-defined]
        return out


class Later(Honest):
    """Computes in a thread, after the call has returned."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        out = torch.empty_like(q)
        exact = super().forward

        def fill() -> None:
            time.sleep(0.002)
            out.copy_(exact(q, k, v))

        threading.Thread(target=fill).start()
        return out


class SlowClock(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if not in_check():
            real = time.perf_counter
            danon.measure.timing.perf_counter = lambda: real() / 10  # type: ignore[attr-defined]
        return super().forward(q, k, v)


class SlowsReference(Honest):
    """Makes what it is compared with slower."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        exact = F.scaled_dot_product_attention
        if not in_check() and exact.__name__ == "scaled_dot_product_attention":

            def slow(*args: Any, **kwargs: Any) -> Tensor:
                time.sleep(0.001)
                return exact(*args, **kwargs)

            F.scaled_dot_product_attention = slow  # type: ignore[assignment]
        return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=self.config.is_causal)


class Boasts(Honest):
    """Says that it sees more than it does."""

    def visible_pairs(self, length: int) -> int:
        return 10**6 * length**2
