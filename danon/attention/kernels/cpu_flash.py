"""PyTorch's flash attention for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from danon.attention.kernels.base import HALF, Grads, Kernel, SavedForward, aten, register


@register
class CPUFlash(Kernel):
    """PyTorch's native flash attention for CPUs."""

    name, device = "cpu-flash", "cpu"
    dtypes = (torch.float64, torch.float32, *HALF)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, lse

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        # The kernel reads lse with the layout its own forward writes: heads innermost.
        lse = saved.lse.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            saved.q,
            saved.k,
            saved.v,
            saved.out,
            lse,
            0.0,
            saved.causal,
            attn_mask=saved.bias,
            scale=saved.scale,
        )
        return dq, dk, dv
