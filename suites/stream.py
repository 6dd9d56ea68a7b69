"""An attention that reads the context of one case in chunks, and then token after token."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from danon.attention.stream import StreamingAttention, StreamState
from danon.measure.case import Case
from danon.measure.correctness import dense_rows, relative_error
from suites.attentions import build
from suites.inputs import text_qkv
from suites.specimen import Specimen

__all__ = ["Stream"]

CHUNK = 8192
"""Tokens of the context read at once."""
NEW = 8
"""Different tokens after the context; timing goes round them."""
CHECKED = 8192
"""Up to this context every checked token is compared with the oracle at its place."""


class Stream:
    """Attributes: the module; its state, first after the context, then after what was timed."""

    def __init__(self, case: Case, beside: Stream | None = None) -> None:
        """``beside``: a stream of the same length, dtype and device, whose inputs are shared."""
        self.case, self.device = case, torch.device(case.device)
        self.module = cast("StreamingAttention", build(case))
        if beside is None:
            dtype = getattr(torch, case.dtype)
            text = text_qkv(case.batch, case.heads, case.length + NEW, case.head_dim)
            self.q, self.k, self.v = (x.to(self.device, dtype) for x in text)
        else:
            self.q, self.k, self.v = beside.q, beside.k, beside.v
        self.state = self._empty()
        self._turn = 0

    def read(self) -> None:
        """Read the context."""
        self.state = self._absorb(self.case.length)

    def call(self) -> object:
        """What is timed: one more token."""
        at = self.case.length + self._turn % NEW
        self._turn += 1
        out, self.state = self._step(self.state, at, at + 1)
        return out

    def error_vs_dense(self) -> float:
        """Of the outputs for the new tokens, one by one."""
        state, outs = self.state, []
        rows = torch.arange(self.case.length, self.case.length + NEW)
        for at in rows.tolist():
            out, state = self._step(state, at, at + 1)
            outs.append(out)
        exact = [  # a head at a time: the context in float64 is large
            dense_rows(*(x[:, h : h + 1].double() for x in (self.q, self.k, self.v)), rows,
                       causal=True)
            for h in range(self.q.shape[1])
        ]  # fmt: skip
        return relative_error(torch.cat(outs, 2), torch.cat(exact, 1))

    def checked(self) -> Specimen:
        """For the correctness check: the same stream over a context no longer than ``CHECKED``.

        Within that the stream promises the parallel form, whatever its state forgets later.
        """
        length = min(self.case.length, CHECKED)
        specimen = Specimen(replace(self.case, length=length))
        specimen.attend = self._attend  # type: ignore[method-assign]
        return specimen

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Half in chunks, of all sizes; the last tokens one by one."""
        state, outs, at, n = self._empty(), [], 0, q.shape[2]
        size = 1
        while at < n:
            end = min(n, at + size)
            out, state = self.module.step(q[:, :, at:end], k[:, :, at:end], v[:, :, at:end], state)
            outs.append(out)
            at, size = end, 1 if n - end <= 4 * NEW else 3 * size
        return torch.cat(outs, 2)

    def _empty(self) -> StreamState:
        return self.module.init_state(self.case.batch, dtype=self.q.dtype, device=self.device)

    def _absorb(self, stop: int) -> StreamState:
        state = self._empty()
        for at in range(0, stop, CHUNK):
            q, k, v = (x[:, :, at : min(stop, at + CHUNK)] for x in (self.q, self.k, self.v))
            state = self.module.absorb(q, k, v, state)
        return state

    def _step(self, state: StreamState, at: int, end: int) -> tuple[Tensor, StreamState]:
        q, k, v = (x[:, :, at:end] for x in (self.q, self.k, self.v))
        return self.module.step(q, k, v, state)
