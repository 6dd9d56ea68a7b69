"""Dense attention of xformers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from baselines._bridging import expand_heads
from baselines.sdpa import SDPA
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["XFormers"]


@register("xformers")
class XFormers(SDPA):
    """``memory_efficient_attention``, the operator left to xformers' own choice."""

    streams: ClassVar[bool] = False
    description = "exact (xformers memory_efficient_attention)"
    takes_mask: ClassVar[bool] = False
    package: ClassVar[str] = "xformers"
    module: ClassVar[str] = "xformers.ops"
    extra: ClassVar[str] = "cuda"

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        ops = self.load()
        self.attention = ops.memory_efficient_attention
        self.bias = ops.LowerTriangularMask() if shape.is_causal else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in self.once(q, k, v))
        out: Tensor = self.attention(q, k, v, attn_bias=self.bias)
        return out.transpose(1, 2)

    @classmethod
    def limit(
        cls,
        shape: AttentionConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        """Return the reason that xformers gives in a call on 16 tokens."""
        tokens = torch.zeros(1, shape.num_heads, 16, shape.head_dim, dtype=dtype, device=device)
        tokens.requires_grad_(backward)
        attention = cls(shape)
        try:
            attention.attend(tokens, tokens, tokens, None)
        except NotImplementedError as error:
            text = " ".join(str(error).split())
            _, cut, why = text.partition(" p : 0.0 ")  # before it: the shapes of the 16 tokens
            return f"no operator: {why}" if cut else text
        return None
