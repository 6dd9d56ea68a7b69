"""Attentions whose timed outputs are remembered, guessed, partial or of low precision."""

from __future__ import annotations

import torch
from torch import Tensor

from cheats.honest import Honest, in_check
from danon.measure.correctness import sample_rows


class _Remembers(Honest):
    """Gives the output that it gave for the same key."""

    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        key = self.key(q, k, v)
        if key not in self.memory:
            self.memory[key] = super().forward(q, k, v)
        return self.memory[key]


class RemembersIdentity(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return id(q), id(k), id(v)


class RemembersAddress(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return q.data_ptr(), k.data_ptr(), v.data_ptr()


class RemembersCorner(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return tuple(x[0, 0, 0, :8].sum().item() for x in (q, k, v))


class KnowsShape(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(q, k, v) if q.shape[2] < 64 else v.cumsum(2)


class KnowsGradientMode(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        return v.clone()


class KnowsStack(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(q, k, v) if in_check() else v.clone()


class KnowsWarmUp(Honest):
    """Right at first, and from then on quick."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        calls = self.calls = getattr(self, "calls", 0) + 1
        return super().forward(q, k, v) if calls < 2 else v.clone()


class LowPrecision(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check():
            return super().forward(q, k, v)
        return super().forward(*(x.bfloat16() for x in (q, k, v))).to(q.dtype)


class SampledRows(Honest):
    """Computes the rows that a check with a known seed would look at."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check() or torch.is_grad_enabled():
            return super().forward(q, k, v)
        rows = sample_rows(q.shape[2], 16)
        out = torch.zeros_like(q)
        out[:, :, rows] = super().forward(q, k, v)[:, :, rows]
        return out


class SeesTheFirstThird(Honest):
    """The first third of the tokens see each other, by its own definition too."""

    def compute_attention(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        later[: length // 3, : length // 3] = False
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.compute_attention(q, k).softmax(-1) @ v
