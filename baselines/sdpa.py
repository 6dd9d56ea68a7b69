"""Dense attention, the reference everybody is compared with: torch's fused SDPA."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from baselines._adapter import Adapter
from baselines._masked import everything, masked_attention
from baselines._parts import expand_heads
from danon.attention.registry import register

__all__ = ["SDPA", "masked_sdpa"]

QUERIES_PER_MASK = 1024


@register("sdpa")
class SDPA(Adapter):
    """``scaled_dot_product_attention`` with the flash kernel.

    Two cases are no work for it, and take another fused kernel by rule: CUDA flash has no
    float32 (memory-efficient kernel), and a causal call with padding has no mask argument (each
    block of 1024 queries gets a boolean mask: linear memory; on CUDA the memory-efficient kernel).
    """

    semantics = "exact (torch SDPA, flash kernel; CUDA float32: memory-efficient)"
    oracle_kind: ClassVar[str] = "definition"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = self.config.is_causal
        if mask is not None:
            return _padded(q, k, v, mask, causal)
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.device.type == "cpu" or half:
            kernel = SDPBackend.FLASH_ATTENTION
        else:
            kernel = SDPBackend.EFFICIENT_ATTENTION
            k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
            )

    def oracle(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return masked_attention(q, k, v, everything(self.config.is_causal), mask, rows)

    def visible_pairs(self, length: int) -> int:
        return length * (length + 1) // 2 if self.config.is_causal else length * length


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Fused SDPA under a boolean mask; a row that sees nothing gets zeros and no NaN gradient.

    Args:
        q: (B, H, N, D); k and v: (B, H, M, D); visible: broadcastable to (B, H, N, M).
    """
    blind = ~visible.any(-1, keepdim=True)
    cpu = q.device.type == "cpu"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if cpu else SDPBackend.EFFICIENT_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible | blind)
    return out.masked_fill(blind, 0.0)


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool) -> Tensor:
    N = q.shape[2]
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    if not causal:
        return masked_sdpa(q, k, v, mask[:, None, None])
    outs = []
    cols = torch.arange(N, device=q.device)
    for start in range(0, N, QUERIES_PER_MASK):
        end = min(N, start + QUERIES_PER_MASK)
        visible = mask[:, None, None, :end] & (cols[:end] <= cols[start:end, None])
        outs.append(masked_sdpa(q[:, :, start:end], k[:, :, :end], v[:, :, :end], visible))
    return torch.cat(outs, dim=2)
