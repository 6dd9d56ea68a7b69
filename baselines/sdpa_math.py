"""Dense attention as matrix products, the N x N matrix in memory: torch's SDPA, math kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from baselines._bridging import expand_heads
from baselines.sdpa import SDPA
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["SDPAMath"]


@register("sdpa-math")
class SDPAMath(SDPA):
    """``scaled_dot_product_attention`` with the math kernel: quadratic memory."""

    streams: ClassVar[bool] = False
    description = "exact (torch SDPA, math kernel, N x N matrix)"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        with sdpa_kernel(SDPBackend.MATH):
            if mask is None:
                return scaled_dot_product_attention(q, k, v, is_causal=self.config.is_causal)
            visible = mask[:, None, None]
            blind = ~visible.any(-1, keepdim=True)
            out = scaled_dot_product_attention(q, k, v, attn_mask=visible | blind)
        return out.masked_fill(blind, 0.0)

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        matrices = 4 if backward else 3  # logits, weights, a temporary; their gradient
        return matrices * 4 * shape.num_heads * length**2
