"""The package xformers."""

from __future__ import annotations

import torch
from torch import Tensor

from danon.attention.kernels.base import (
    HALF,
    Grads,
    SavedForward,
    _aligned,
    _hidden,
    _Package,
    register,
)


@register
class XFormers(_Package):
    """xformers' memory-efficient attention; takes a bias."""

    name, package = "xformers", "xformers"
    dtypes = (torch.float32, *HALF)
    takes_bias = rounds_bias = True
    grouped = False

    @staticmethod
    def _bias(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> object:
        if not causal:
            return _aligned(bias, q, k)
        from xformers.ops.fmha.attn_bias import (
            LowerTriangularMask,
            LowerTriangularMaskWithTensorBias,
        )

        if bias is None:
            return LowerTriangularMask()
        return LowerTriangularMaskWithTensorBias(_aligned(bias, q, k))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad as run

        made = self._bias(q, k, bias, causal)
        out, lse = run(*(x.transpose(1, 2) for x in (q, k, v)), made, 0.0, scale)
        return out.transpose(1, 2), _hidden(lse[:, :, : q.shape[2]], q)

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        from xformers.ops.fmha import memory_efficient_attention_backward as run

        made = self._bias(saved.q, saved.k, saved.bias, saved.causal)
        grad, out, q, k, v = (
            x.transpose(1, 2) for x in (grad, saved.out, saved.q, saved.k, saved.v)
        )
        dq, dk, dv = run(grad, out, saved.lse, q, k, v, made, 0.0, saved.scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
