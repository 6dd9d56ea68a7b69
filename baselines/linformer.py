"""Linformer of the package linformer: keys and values projected along the length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from baselines._adapter import Adapter
from baselines._parts import Feed, expand_heads, in_dtype, merge_heads, seeded, split_heads
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["Linformer"]

FIRST_LENGTH = 1024


@register("linformer")
class Linformer(Adapter):
    """``LinformerSelfAttention`` on given q, k, v; only its length projections are kept.

    The projections have one row per position. They grow with the longest input seen, up to the
    configured ``max_sequence_length``, and row t is the same at every length, so that a short
    case does not pay for gradients of positions that it does not have. Padded keys and values
    are set to zero before the projection.
    """

    semantics: ClassVar[str] = "low rank: keys and values projected to 256 slots; also when causal"
    oracle_kind: ClassVar[str] = "definition"
    causal_capable: ClassVar[bool] = False
    package: ClassVar[str] = "linformer"
    module: ClassVar[str] = "linformer"

    def __init__(self, shape: AttentionConfig, slots: int = 256) -> None:
        super().__init__(shape)
        self.slots = slots
        self.core: Any = self._core(min(FIRST_LENGTH, shape.max_sequence_length))

    def _core(self, length: int) -> nn.Module:
        with seeded():
            core: nn.Module = self.load().LinformerSelfAttention(
                self.config.hidden_size, length, k=self.slots, heads=self.config.num_heads
            )
        for name in ("to_q", "to_k", "to_v"):
            setattr(core, name, Feed())
        core.to_out = nn.Identity()
        return core

    def _grow(self, length: int) -> None:
        limit = self.config.max_sequence_length
        if length > limit:
            raise ValueError(f"N = {length}: must be at most max_sequence_length = {limit}")
        old = dict(self.core.named_parameters())
        core = self._core(length).to(next(iter(old.values())))
        with torch.no_grad():
            for name, rows in core.named_parameters():
                rows[: len(old[name])] = old[name]
                rows.requires_grad_(old[name].requires_grad)
        self.core = core

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _, H, N, _ = q.shape
        if N > self.core.seq_len:
            self._grow(N)
        if mask is not None:
            k, v = k * mask[:, None, :, None], v * mask[:, None, :, None]
        fed = [merge_heads(x) for x in (q, expand_heads(k, H), expand_heads(v, H))]
        self.core.to_q.tensor, self.core.to_k.tensor, self.core.to_v.tensor = fed
        return split_heads(in_dtype(self.core, q.dtype, fed[0]), H)

    @classmethod
    def limit(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, device: torch.device,
        backward: bool,
    ) -> str | None:  # fmt: skip
        longest = shape.max_sequence_length
        return None if length <= longest else f"configured for at most {longest} tokens"

    def oracle(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = q.double(), k.double(), v.double()
        N = q.shape[2]
        if N > self.core.seq_len:
            self._grow(N)
        if mask is not None:
            k, v = (x * (mask != 0)[:, None, :, None] for x in (k, v))
        q = q if rows is None else q[:, :, rows]
        down = {name: p[:N].double().T for name, p in self.core.named_parameters()}
        k, v = (expand_heads(x, q.shape[1]) for x in (down["proj_k"] @ k, down["proj_v"] @ v))
        logits: Tensor = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return logits.softmax(-1) @ v

    def visible_pairs(self, length: int) -> int:
        return length * self.slots
