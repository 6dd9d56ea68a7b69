"""The readable reference, in plain operations."""

from __future__ import annotations

import torch
from torch import Tensor

from danon.attention.kernels.base import (
    HALF,
    HIDDEN,
    Grads,
    Kernel,
    SavedForward,
    _accumulator,
    register,
)


@register
class Dense(Kernel):
    """Plain matrices, any device and dtype: the reference, and the only one for odd cases."""

    name, device = "dense", None
    dtypes = (torch.float64, torch.float32, *HALF)
    grouped = False

    @staticmethod
    def _logits(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
        s = (q @ k.transpose(-1, -2)).to(_accumulator(q.dtype)) * scale
        if bias is not None:
            s = s + bias
        if causal:
            later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
            s = s.masked_fill(later, HIDDEN)
        return s

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        s = self._logits(q, k, bias, causal, scale)
        lse = s.logsumexp(-1)
        return (s - lse[..., None]).exp().to(v.dtype) @ v, lse

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        q, k, v, scale = saved.q, saved.k, saved.v, saved.scale
        logits = self._logits(q, k, saved.bias, saved.causal, scale)
        p = (logits - saved.lse[..., None]).exp()
        delta = (grad * saved.out).sum(-1, keepdim=True, dtype=p.dtype)
        ds = (p * ((grad @ v.transpose(-1, -2)).to(p.dtype) - delta) * scale).to(q.dtype)
        return ds @ k, ds.transpose(-1, -2) @ q, p.to(v.dtype).transpose(-1, -2) @ grad
