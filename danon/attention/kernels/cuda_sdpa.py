"""PyTorch's kernels for CUDA: flash, memory-efficient and cuDNN's."""

from __future__ import annotations

import torch
from torch import Tensor

from danon.attention.kernels.base import (
    HALF,
    Grads,
    Kernel,
    SavedForward,
    _aligned,
    _hidden,
    _no_dropout_state,
    aten,
    register,
)


@register
class CUDAFlash(Kernel):
    """FlashAttention-2 as PyTorch ships it."""

    name, device = "cuda-flash", "cuda"
    head_dims = (8, 256)
    dtypes = HALF
    takes_bias = False
    grouped = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        q, k = saved.q, saved.k
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad,
            q,
            k,
            saved.v,
            saved.out,
            saved.lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            saved.causal,
            *_no_dropout_state(q.device),
            scale=saved.scale,
        )
        return dq, dk, dv


@register
class CUDAEfficient(Kernel):
    """Memory-efficient attention (CUTLASS) as PyTorch ships it; takes a bias."""

    name, device = "cuda-efficient", "cuda"
    rounds_bias = True
    head_dims = (8, 1 << 16)
    dtypes = (torch.float32, *HALF)
    grouped = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, _aligned(bias, q, k), True, 0.0, causal, scale=scale
        )
        return out, _hidden(lse[:, :, : q.shape[2]], q)  # rows are rounded up to 32

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        q, k = saved.q, saved.k
        rows = -saved.lse.shape[2] % 32
        lse = torch.nn.functional.pad(saved.lse, (0, rows), value=torch.inf).contiguous()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad,
            q,
            k,
            saved.v,
            _aligned(saved.bias, q, k),
            saved.out,
            lse,
            *_no_dropout_state(q.device),
            0.0,
            [True, True, True, False],
            saved.causal,
            scale=saved.scale,
        )
        return dq, dk, dv


@register
class CUDACuDNN(Kernel):
    """cuDNN's fused attention as PyTorch ships it."""

    name, device = "cuda-cudnn", "cuda"
    head_dims = (8, 256)
    dtypes = HALF
    takes_bias = False
    grouped = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch; see :meth:`Kernel.forward`."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.view(q.shape[:3])

    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v; see :meth:`Kernel.backward`."""
        q, k = saved.q, saved.k
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            saved.v,
            saved.out,
            saved.lse.contiguous()[..., None],
            *_no_dropout_state(q.device),
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            saved.causal,
            scale=saved.scale,
        )
        return dq, dk, dv
