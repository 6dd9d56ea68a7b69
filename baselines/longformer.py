"""Longformer's sliding window, from transformers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from baselines._adapter import Adapter
from baselines._bridging import TensorInjector, expand_heads, merge_heads, seeded, split_heads
from baselines._oracles import Band, masked_attention
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["Longformer"]

WIDTH = 512


@register("longformer")
class Longformer(Adapter):
    """``LongformerSelfAttention`` on given q, k, v: its projections hand them over unchanged.

    Local attention only: without global tokens, which a task would have to choose.
    """

    description = "bidirectional window 512 (256 to each side), also when causal"
    oracle_kind: ClassVar[str] = "definition"
    causal_capable: ClassVar[bool] = False
    package: ClassVar[str] = "transformers"
    module: ClassVar[str] = "transformers.models.longformer.modeling_longformer"

    def __init__(self, shape: AttentionConfig, width: int = WIDTH) -> None:
        super().__init__(shape)
        self.width = width
        self.band = Band(width // 2, width // 2)
        modeling = self.load()
        with seeded():
            self.core = modeling.LongformerSelfAttention(
                modeling.LongformerConfig(
                    hidden_size=shape.hidden_size,
                    num_attention_heads=shape.num_heads,
                    attention_window=[width],
                    attention_probs_dropout_prob=0.0,
                ),
                layer_id=0,
            )
        for name in ("query", "key", "value"):
            setattr(self.core, name, TensorInjector())
            setattr(self.core, f"{name}_global", nn.Identity())  # no parameter without a use

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, H, N, _ = q.shape
        tail = -N % self.width
        real = torch.ones(B, N, dtype=torch.bool, device=q.device) if mask is None else mask
        blind = torch.zeros_like(real) if mask is None else self.band.sees_only_padding(mask)
        if mask is not None:
            # Zero logits stay finite when the package adds its most negative number to all.
            q = q.masked_fill(blind[:, None, :, None], 0.0)
        k, v = expand_heads(k, H), expand_heads(v, H)
        fed = [merge_heads(pad(x, (0, 0, 0, tail))).transpose(0, 1) for x in (q, k, v)]
        self.core.query.tensor, self.core.key.tensor, self.core.value.tensor = fed
        out: Tensor = self.core(
            fed[0].transpose(0, 1),  # read for its shape only
            attention_mask=pad(~real, (0, tail), value=True),
            is_index_masked=pad(blind, (0, tail)),
            is_global_attn=False,
        )[0]
        return split_heads(out, H)[:, :, :N]

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        copies = 9 if backward else 5  # of the (N, WIDTH + 1) weights, their softmax in float32
        return copies * 4 * shape.num_heads * length * (WIDTH + 1)

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return masked_attention(q, k, v, self.band, rows)

    def visible_pairs(self, length: int) -> int:
        return self.band.pairs(length)
