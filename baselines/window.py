"""Exact sliding window with sink tokens, in blocks of queries: the strongest baseline.

Each block of C queries is given the keys that any of them can see, ``back`` tokens before the
block, the block, ``ahead`` tokens after it, and the sinks; a mask cuts the exact band. Blocks are
handed to SDPA some thousands of queries at a time, so memory stays linear and small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from baselines._adapter import Adapter
from baselines._bridging import expand_heads
from baselines._oracles import Band, masked_attention
from baselines.sdpa import masked_sdpa
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.attention.sizing import SINKS
from danon.attention.stream_state import Span, StateTensor, span_of
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig
from danon.tuned.search_space import Categorical, Space

__all__ = ["Window"]

BLOCK = 256
QUERIES_PER_CALL = 4096


@register("window")
class Window(Adapter, StreamingAttention):
    """Query i sees tokens i-w+1 .. i (bidirectional: .. i+w-1) and the first g tokens."""

    description = "exact window 512 + 64 sinks (bidirectional: 512 on both sides)"
    oracle_kind: ClassVar[str] = "definition"

    def __init__(self, shape: AttentionConfig, width: int = 512, sinks: int = 64) -> None:
        super().__init__(shape)
        if width < 1 or sinks < 0:
            raise ValueError(f"width = {width}, sinks = {sinks}: must be >= 1 and >= 0")
        description = type(self).description.replace("512", str(width))
        self.description = description.replace("64 sinks", f"{sinks} sinks")
        causal = shape.is_causal
        self.band = Band(width - 1, 0 if causal else width - 1, sinks, causal)

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        return cls(shape, width=max(1, entries - SINKS), sinks=SINKS)

    @classmethod
    def search_space(cls) -> Space:
        return Space(
            {
                "width": Categorical((64, 128, 256, 512, 1024, 2048, 4096)),
                "sinks": Categorical((0, 4, 16, 64, 256)),
            },
            {"width": 512, "sinks": 64},
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        B, _, N, _ = q.shape
        C = min(BLOCK, N)
        back, ahead = self._reach(N)
        tail = -N % C
        real = torch.ones(B, N, dtype=torch.bool, device=q.device) if mask is None else mask
        q = pad(q, (0, 0, 0, tail))
        k_sink, v_sink = k[:, :, : self.band.sinks], v[:, :, : self.band.sinks]
        k, v = pad(k, (0, 0, back, tail + ahead)), pad(v, (0, 0, back, tail + ahead))
        outs = []
        step = max(1, QUERIES_PER_CALL // C) * C
        for start in range(0, N, step):
            end = min(start + step, N + tail)
            if mask is None and start - back >= self.band.sinks and end + ahead <= N:
                visible = self._visible(start, start + C, C, real[:1])  # all blocks look alike
            else:
                visible = self._visible(start, end, C, real)
            span = slice(start, end + back + ahead)
            out = masked_sdpa(
                _blocks(q[:, :, start:end], C, C),
                _with_sinks(_blocks(k[:, :, span], C + back + ahead, C), k_sink),
                _with_sinks(_blocks(v[:, :, span], C + back + ahead, C), v_sink),
                visible,
            )
            outs.append(out.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3))
        return torch.cat(outs, dim=2)[:, :, :N]

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        return {name: Span.of(empty) for name in ("sink_k", "sink_v", "k", "v")}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        after, new = dict(parts), max(0, min(self.band.sinks - start, k.shape[1]))
        for name, x in (("k", k), ("v", v)):
            after[name] = span_of(after, name).append(x)
            after[f"sink_{name}"] = span_of(after, f"sink_{name}").append(x[:, :new])
        near = span_of(after, "k")
        seen = [
            torch.cat(
                (span_of(after, f"sink_{name}").rows, span_of(after, name).rows), 1
            ).unflatten(0, (-1, self.config.kv_heads))
            for name in ("k", "v")
        ]
        sinks = span_of(after, "sink_k").size
        position = torch.arange(near.start, near.stop, device=q.device)
        position = torch.cat((torch.arange(sinks, device=q.device), position))
        # The first tokens are among the near ones, too, and must count once.
        near_ones = torch.arange(len(position), device=q.device) >= sinks
        shown = ~(near_ones & (position < sinks))
        q = q.unflatten(0, (-1, self.config.num_heads))
        heads, outs = q.shape[1], []
        for at in range(0, q.shape[2], BLOCK):
            rows = torch.arange(start + at, start + min(at + BLOCK, q.shape[2]), device=q.device)
            visible = self.band(rows[:, None], position) & shown
            columns = visible.any(0).nonzero().flatten()
            k_, v_ = (expand_heads(x[:, :, columns], heads) for x in seen)
            outs.append(
                masked_sdpa(q[:, :, at : at + BLOCK], k_, v_, visible[None, None, :, columns])
            )
        for name in ("k", "v"):
            after[name] = span_of(after, name).since(start + q.shape[2] - self.band.back)
        return torch.cat(outs, 2).flatten(0, 1), after

    def _reach(self, length: int) -> tuple[int, int]:
        return min(self.band.back, length - 1), min(self.band.ahead, length - 1)

    def _visible(self, start: int, end: int, C: int, real: Tensor) -> Tensor:
        """Return the visible keys of the blocks of ``start .. end``: near keys, then sinks.

        Args:
            start: first query.
            end: after the last query.
            C: queries of a block.
            real: (B, N) boolean, False for padding.

        Returns:
            (B * blocks, 1, C, keys) boolean.
        """
        N = real.shape[1]
        back, ahead = self._reach(N)
        first = torch.arange(start, end, C, device=real.device)[:, None, None] - back
        width = back + C + ahead  # near keys of a block: positions first .. first + width - 1
        row = first + back + torch.arange(C, device=real.device)[:, None]
        near = first + torch.arange(width, device=real.device)
        sink = torch.arange(min(self.band.sinks, N), device=real.device).expand(len(first), 1, -1)
        seen_near = self.band(row, near) & (near >= 0) & (near < N)
        seen_sink = self.band(row, sink) & ((sink < first) | (sink >= first + width))
        real_near, real_sink = real[:, near.clamp(0, N - 1)], real[:, sink]
        seen = torch.cat([seen_near & real_near, seen_sink & real_sink], dim=-1)
        return seen.flatten(0, 1)[:, None]

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return masked_attention(q, k, v, self.band, rows)

    def visible_pairs(self, length: int) -> int:
        return self.band.pairs(length)


def _blocks(x: Tensor, size: int, step: int) -> Tensor:
    """Cut (B, H, M, D) into (B * blocks, H, size, D), each ``step`` tokens after the last."""
    return x.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _with_sinks(x: Tensor, sinks: Tensor) -> Tensor:
    each = x.shape[0] // sinks.shape[0]
    return torch.cat([x, sinks.repeat_interleave(each, dim=0)], dim=2)
