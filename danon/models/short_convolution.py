"""A short convolution in the place of an attention: lets a token know its predecessors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention.base import BaseAttention
from danon.attention.padding import right_padded
from danon.config import AttentionConfig

__all__ = ["ShortConvolution"]

TAPS = 4


class ShortConvolution(BaseAttention):
    """Each channel of v, over the last few tokens.

    It stands in the first layer of every model of the quality suites, as in the hybrids of Arora
    et al. (2023): with it recall takes one attention, and what is compared is that attention.
    """

    description = f"convolution of {TAPS} tokens"

    def __init__(self, config: AttentionConfig) -> None:
        """Build the convolution."""
        super().__init__()
        self.setup_attention(config)
        self.weight = nn.Parameter(torch.randn(config.hidden_size, 1, TAPS) * TAPS**-0.5)

    @right_padded
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve each channel of v (B, G, N, D) over its last tokens."""
        B, H, N, D = v.shape
        x = F.pad(v.transpose(2, 3).reshape(B, H * D, N), (TAPS - 1, 0))
        out = F.conv1d(x, self.weight, groups=H * D)
        return out.view(B, H, D, N).transpose(2, 3)
