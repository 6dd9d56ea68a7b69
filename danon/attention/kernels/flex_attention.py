"""PyTorch's FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danon.attention.kernels.base import HALF, HIDDEN, Grads, Kernel, SavedForward, register


@register
class Flex(Kernel):
    """FlexAttention; its backward is autograd's, fed with the branch's share of the merged result.

    CUDA only: on a CPU PyTorch's FlexAttention has no backward.
    """

    name, device = "flex", "cuda"
    dtypes = (torch.float32, *HALF)
    grouped = False

    @staticmethod
    def _run(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import AuxRequest

        full = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

        def score(s: Tensor, t: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if full is not None:
                s = s + full[t, h, i, j]
            return torch.where(j <= i, s, HIDDEN) if causal else s

        mod = score if causal or full is not None else None
        out, aux = _flex(compiled=q.is_cuda)(
            q, k, v, score_mod=mod, scale=scale, return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        with torch.no_grad():
            return self._run(q, k, v, bias, causal, scale)

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        with torch.enable_grad():
            q, k, v = leaves = [
                x.detach().contiguous().requires_grad_() for x in (saved.q, saved.k, saved.v)
            ]
            part, part_lse = self._run(q, k, v, saved.bias, saved.causal, saved.scale)
        share = (part_lse.detach() - saved.lse).exp()
        delta = (grad * saved.out).sum(-1, dtype=share.dtype)
        d_lse = share * ((grad * part.detach()).sum(-1, dtype=share.dtype) - delta)
        d_part = (share[..., None] * grad).to(part.dtype)
        dq, dk, dv = torch.autograd.grad((part, part_lse), leaves, (d_part, d_lse))
        return dq, dk, dv


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as module

    plain: Callable[..., Any] = module.flex_attention
    return torch.compile(plain, dynamic=True) if compiled else plain
