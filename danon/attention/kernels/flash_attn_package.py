"""The package flash-attn."""

from __future__ import annotations

import torch
from torch import Tensor

from danon.attention.kernels.base import Grads, SavedForward, _Package, register


@register
class FlashAttn(_Package):
    """The flash-attn package."""

    name, package = "flash-attn", "flash_attn"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward as run

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = run(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
        return out.transpose(1, 2), lse

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward as run

        grad, q, k, v, out = (
            x.transpose(1, 2).contiguous() for x in (grad, saved.q, saved.k, saved.v, saved.out)
        )
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run(
            grad,
            q,
            k,
            v,
            out,
            saved.lse.contiguous(),
            dq,
            dk,
            dv,
            0.0,
            saved.scale,
            saved.causal,
            -1,
            -1,
            0.0,
            None,
            False,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
