"""Block-local attention of the package local-attention."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from baselines._adapter import Adapter
from baselines._bridging import expand_heads
from baselines._oracles import Visible, masked_attention, only_padding
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.config import AttentionConfig
from danon.tuned.search_space import Categorical, Space

__all__ = ["LocalAttention"]


@register("local-attention")
class LocalAttention(Adapter):
    """A query sees its own block of 256 and the one before (bidirectional: and the one after)."""

    description = "exact within its block of 256 and the block before (after)"
    oracle_kind: ClassVar[str] = "definition"
    package: ClassVar[str] = "local-attention"
    module: ClassVar[str] = "local_attention"

    def __init__(self, shape: AttentionConfig, width: int = 256) -> None:
        super().__init__(shape)
        self.width = width
        self.description = type(self).description.replace("256", str(width))
        self.core = self.load().LocalAttention(
            window_size=width, causal=shape.is_causal, autopad=True, use_rotary_pos_emb=False
        )

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        """Build an instance of that budget: a query sees a block and a half on average."""
        return cls(shape, width=max(1, 2 * entries // 3))

    @classmethod
    def search_space(cls) -> Space:
        return Space({"width": Categorical((32, 64, 128, 256, 512, 1024, 2048))}, {"width": 256})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, _, N, _ = q.shape
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        if mask is None:
            if not self.config.is_causal and N % self.width:
                # The package pads to whole blocks and hides what it added only with a mask.
                mask = torch.ones(B, N, dtype=torch.bool, device=q.device)
            out: Tensor = self.core(q, k, v, mask=mask)
            return out
        out = self.core(q, k, v, mask=mask)
        blind = only_padding(mask, *self._span(torch.arange(N, device=q.device)))
        return out.masked_fill(blind[:, None, :, None], 0.0)

    def _span(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        block = rows // self.width
        first = (block - 1) * self.width
        return first, (rows + 1 if self.config.is_causal else (block + 2) * self.width)

    def _visible(self) -> Visible:
        def visible(rows: Tensor, cols: Tensor) -> Tensor:
            first, end = self._span(rows)
            return (cols >= first) & (cols < end)

        return visible

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return masked_attention(q, k, v, self._visible(), rows)

    def visible_pairs(self, length: int) -> int:
        first, end = self._span(torch.arange(length))
        return int((end.clamp_max(length) - first.clamp_min(0)).sum())
