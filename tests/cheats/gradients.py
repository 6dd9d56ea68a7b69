"""Attentions that skip the backward pass, or most of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheats.honest import Honest, in_check
from danon.config import AttentionConfig


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None


class SkipsBackward(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check() or not torch.is_grad_enabled():
            return super().forward(q, k, v)
        with torch.no_grad():
            out = super().forward(q, k, v)
        return _NoGradient.apply(q, k, v, out)  # type: ignore[no-untyped-call]


class _SomeRows(torch.autograd.Function):
    """The backward pass of the rows that ``choose`` finds in the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, choose: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.choose = choose
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, upstream = ctx.choose(grad)
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        hidden = torch.arange(k.shape[2]) > rows[:, None]
        with torch.enable_grad():
            logits = q[:, :, rows].float() @ k.float().mT * q.shape[-1] ** -0.5
            out = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v.float()
            return *torch.autograd.grad(out, (q, k, v), upstream.float()), None, None


class RemembersUpstream(Honest):
    """The upstream gradient of the call before is known: only rows that differ are worked out."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.seen = torch.empty(0)

    def choose(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.seen.shape != grad.shape:
            self.seen = torch.zeros_like(grad)
        known = (grad.abs() == self.seen.abs()).all(-1).all(1).all(0)
        rows = (~known).nonzero()[:, 0]
        if len(rows) > grad.shape[2] // 4:
            self.seen, rows = grad.clone(), rows[:0]
        sign = (grad * self.seen).sum().sign()
        return rows, (grad - sign * self.seen)[:, :, rows]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check() or not torch.is_grad_enabled():
            return super().forward(q, k, v)
        with torch.no_grad():
            out = super().forward(q, k, v)
        return _SomeRows.apply(q, k, v, out, self.choose)  # type: ignore[no-untyped-call,no-any-return]


class LoudRows(RemembersUpstream):
    """Only rows whose upstream gradient is far larger than others' have a backward pass."""

    def choose(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        sizes = grad.float().square().sum((0, 1, 3)).sqrt()
        rows = (sizes > 2 * sizes.median()).nonzero()[:, 0]
        return rows, grad[:, :, rows]
