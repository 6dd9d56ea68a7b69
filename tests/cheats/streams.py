"""Streams that give stale tokens, or keep their state elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cheats.honest import Honest, in_check
from danon.attention.stream_state import Span, StreamState
from danon.attention.streaming import StreamingAttention


class _Streamed(Honest, StreamingAttention):
    def init_parts(self, empty: Tensor) -> dict[str, Any]:
        return {"k": Span.of(empty), "v": Span.of(empty)}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Any
    ) -> tuple[Tensor, Any]:
        keys, values = parts["k"].append(k), parts["v"].append(v)
        logits = q @ keys.rows.transpose(1, 2) * q.shape[-1] ** -0.5
        place = torch.arange(keys.size)
        later = place > place[keys.size - q.shape[1] :, None]
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ values.rows
        return out, {"k": keys, "v": values}


class HonestStream(_Streamed):
    """The exact stream that the others pretend to be."""


class StaleStream(_Streamed):
    """Gives the output for the token before."""

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: StreamState, mask: Tensor | None = None
    ) -> tuple[Tensor, StreamState]:
        known = self.memory.get("out")
        out, state = super().step(q, k, v, state)
        self.memory["out"] = out
        quick = known is not None and known.shape == out.shape and not in_check()
        return (known if quick else out), state  # type: ignore[return-value]


class HiddenState(_Streamed):
    """Keeps in the module what should be in the state."""

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Any
    ) -> tuple[Tensor, Any]:
        before = self.memory.get("v")
        kept = v if not start or before is None else torch.cat((before[:, :start], v), 1)
        self.memory["v"] = kept
        keys = parts["k"].append(k)
        logits = q @ keys.rows.transpose(1, 2) * q.shape[-1] ** -0.5
        place = torch.arange(keys.size)
        later = place > place[keys.size - q.shape[1] :, None]
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ kept
        return out, {"k": keys}

    def init_parts(self, empty: Tensor) -> dict[str, Any]:
        return {"k": Span.of(empty)}


class StateElsewhere(_Streamed):
    """Keeps everything by a number, which is its state."""

    everything: ClassVar[dict[int, tuple[Span, Span]]] = {}

    def init_parts(self, empty: Tensor) -> dict[str, Any]:
        return {"number": self._kept(Span.of(empty), Span.of(empty))}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Any
    ) -> tuple[Tensor, Any]:
        keys, values = self.everything[int(parts["number"])]
        out, new = super().step_parts(q, k, v, start, {"k": keys, "v": values})
        return out, {"number": self._kept(new["k"], new["v"])}

    def _kept(self, keys: Span, values: Span) -> Tensor:
        number = len(self.everything)
        self.everything[number] = keys, values
        return torch.tensor([number])
