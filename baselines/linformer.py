"""Linformer of the package linformer: keys and values projected along the length."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from baselines._adapter import Adapter
from baselines._bridging import (
    TensorInjector,
    expand_heads,
    in_dtype,
    merge_heads,
    seeded,
    split_heads,
)
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["Linformer"]

SLOTS = 256


@register("linformer")
class Linformer(Adapter):
    """``LinformerSelfAttention`` on given q, k, v; only its length projections are kept.

    They have a row for each of ``max_sequence_length`` positions, and that is the longest input.
    Keys and values of padding are zero when they are projected.
    """

    description = "low rank: keys and values projected to 256 slots; also when causal"
    pools_tokens: ClassVar[bool] = True
    oracle_kind: ClassVar[str] = "definition"
    causal_capable: ClassVar[bool] = False
    package: ClassVar[str] = "linformer"
    module: ClassVar[str] = "linformer"
    # Its projected keys are long and its softmax is not fused: in bfloat16 it errs by 9e-3 where
    # dense attention errs by 2e-3 (N = 1024, real text).
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        with seeded():
            self.core = self.load().LinformerSelfAttention(
                shape.hidden_size, shape.max_sequence_length, k=SLOTS, heads=shape.num_heads
            )
        for name in ("to_q", "to_k", "to_v"):
            setattr(self.core, name, TensorInjector())
        self.core.to_out = nn.Identity()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _, H, N, _ = q.shape
        longest = self.config.max_sequence_length
        if longest < N:
            raise ValueError(f"N = {N}: linformer takes at most max_sequence_length = {longest}")
        fed = [merge_heads(x) for x in (q, expand_heads(k, H), expand_heads(v, H))]
        self.core.to_q.tensor, self.core.to_k.tensor, self.core.to_v.tensor = fed
        return split_heads(in_dtype(self.core, q.dtype, fed[0]), H)

    @classmethod
    def limit(
        cls,
        shape: AttentionConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        longest = shape.max_sequence_length
        return None if length <= longest else f"configured for at most {longest} tokens"

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        projections = 2 * 4 * shape.max_sequence_length * SLOTS
        return (3 if backward else 2) * projections  # themselves, in dtype, their gradients

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        q, k, v = q.double(), k.double(), v.double()
        N = q.shape[2]
        q = q if rows is None else q[:, :, rows]
        down = {name: p[:N].double().T for name, p in self.core.named_parameters()}
        k, v = (expand_heads(x, q.shape[1]) for x in (down["proj_k"] @ k, down["proj_v"] @ v))
        logits: Tensor = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return logits.softmax(-1) @ v

    def visible_pairs(self, length: int) -> int:
        return length * SLOTS
