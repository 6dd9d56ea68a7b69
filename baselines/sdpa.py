"""Dense attention, the reference of every comparison: torch's fused SDPA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from baselines._adapter import Adapter
from baselines._bridging import expand_heads
from baselines._oracles import all_tokens, masked_attention
from danon.attention.base import check_inputs
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.attention.stream_state import Group, Span, StateTensor, StreamState, span_of
from danon.attention.streaming import StreamingAttention

__all__ = ["SDPA", "masked_sdpa"]

QUERIES_PER_MASK = 1024


@register("sdpa")
class SDPA(Adapter, StreamingAttention):
    """``scaled_dot_product_attention`` with the flash kernel.

    On CUDA it cannot serve two cases, which take the memory-efficient kernel by rule: float32, and
    padding in a bidirectional call, which needs a mask.
    """

    description = "exact (torch SDPA, flash kernel; CUDA float32: memory-efficient)"
    oracle_kind: ClassVar[str] = "definition"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = self.config.is_causal
        if mask is not None:
            k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
            return masked_sdpa(q, k, v, mask[:, None, None])
        kernel = _fused(q)
        if kernel is SDPBackend.EFFICIENT_ATTENTION:
            k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
            )

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        return {"k": Span.of(empty), "v": Span.of(empty)}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        after = {"k": span_of(parts, "k").append(k), "v": span_of(parts, "v").append(v)}
        heads, groups = self.config.num_heads, self.config.kv_heads
        q, k, v = (
            x.unflatten(0, (-1, h))
            for x, h in ((q, heads), (after["k"].rows, groups), (after["v"].rows, groups))
        )
        if start == 0:
            return self.attend(q, k, v, None).flatten(0, 1), after
        if q.shape[2] == 1:  # sees everything
            with sdpa_kernel(_fused(q)):
                out = scaled_dot_product_attention(q, k, v, enable_gqa=heads != groups)
            return out.flatten(0, 1), after
        return _late_rows(q, k, v, start).flatten(0, 1), after

    def absorb(self, q: Tensor, k: Tensor, v: Tensor, state: StreamState) -> StreamState:
        check_inputs(self.config, q, k, v, None)
        self.check_state(state, q)
        if len(state.groups) > 1:
            return super().absorb(q, k, v, state)
        (group,) = state.groups
        parts = {
            name: span_of(group.parts, name).append(x.flatten(0, 1))
            for name, x in (("k", k), ("v", v))
        }
        after = Group(group.rows, group.length + k.shape[2], parts)
        return replace(state, groups=(after,))

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return masked_attention(q, k, v, all_tokens(self.config.is_causal), rows)

    def visible_pairs(self, length: int) -> int:
        return length * (length + 1) // 2 if self.config.is_causal else length * length


def _fused(q: Tensor) -> SDPBackend:
    half = q.dtype in (torch.bfloat16, torch.float16)
    flash = q.device.type == "cpu" or half
    return SDPBackend.FLASH_ATTENTION if flash else SDPBackend.EFFICIENT_ATTENTION


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attend by fused SDPA under a mask; a row that sees nothing gets zeros and no NaN gradient.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        visible: boolean, broadcastable to (B, H, N, M).
    """
    blind = ~visible.any(-1, keepdim=True)
    cpu = q.device.type == "cpu"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if cpu else SDPBackend.EFFICIENT_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible | blind)
    return out.masked_fill(blind, 0.0)


def _late_rows(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """Attend causally with queries (B, H, n, D) from position ``first`` on, in blocks."""
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    outs = []
    cols = torch.arange(k.shape[2], device=q.device)
    for start in range(0, q.shape[2], QUERIES_PER_MASK):
        end = min(q.shape[2], start + QUERIES_PER_MASK)
        stop = first + end
        visible = (cols[:stop] <= cols[first + start : stop, None])[None, None]
        outs.append(masked_sdpa(q[:, :, start:end], k[:, :, :stop], v[:, :, :stop], visible))
    return torch.cat(outs, dim=2)
