"""The workload of decoding: read a context in chunks, then one token after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from danon.attention.base import BaseAttention
from danon.attention.stream_state import StreamState
from danon.attention.streaming import StreamingAttention
from danon.bench.shapes import build_for
from danon.bench.timed_workload import FEW_CALLS, SLACK
from danon.bench.workload import Workload
from danon.data.qkv import text_qkv
from danon.measure.correctness import check_rows, dense_rows, relative_error
from danon.measure.output_checks import WRITTEN, output_fault
from danon.measure.spot_checks import KEPT_CALLS
from danon.measure.timing import TimedCall
from danon.measure.varied_inputs import SIZES
from danon.runs.case import Case

__all__ = ["DecodeWorkload"]

CHUNK = 8192
"""Tokens of the context in one chunk."""
NEW = 8
"""Tokens after the context that are compared with dense attention."""
CHECKED = 8192
"""Longest context at which checked tokens are compared with the oracle."""
REPLAYED_AT_ONCE = 64
"""Timed tokens that a replay reads in one step."""
SELECTED_ANEW = 0.1
"""Allowed error of a replay if rounding may select other tokens; a wrong output has about 1."""


class _Token(NamedTuple):
    """A timed token: its position in the text, and the factor of its query.

    Without the factor, the query would be one that the context already contained.
    """

    at: int
    scale: float


@dataclass(frozen=True)
class _KeptToken:
    """A timed token: its number, from 0, and the output for it."""

    number: int
    output: Tensor


class DecodeWorkload:
    """An attention in its streaming form, built for one case, with its inputs and its state.

    Args:
        case: attention, context length in tokens, dtype, device and shape.
        beside: workload of the same length, dtype and device whose inputs are shared.

    Attributes:
        module: the attention.
        q: queries (B, H, N, D), in the dtype and on the device of the case; so are k and v.
        state: state of the stream, after the context or after the last timed token.
    """

    def __init__(self, case: Case, beside: DecodeWorkload | None = None) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.module = cast("StreamingAttention", build_for(case))
        if beside is None:
            dtype = getattr(torch, case.dtype)
            text = text_qkv(case.batch, case.heads, case.length + NEW, case.head_dim)
            self.q, self.k, self.v = (x.to(self.device, dtype) for x in text)
        else:
            self.q, self.k, self.v = beside.q, beside.k, beside.v
        self.state = self._empty()
        self._random = random.SystemRandom()
        self._token: tuple[Tensor, ...] = ()
        self._read: list[_Token] = []  # after the context
        self._start, self._untimed = self.state, 0
        self._kept: list[_KeptToken] = []
        self._fault = ""

    def read(self) -> None:
        """Read the context."""
        self.state = self._absorb(self.case.length)

    def timed_call(self) -> TimedCall:
        """Begin a timing: each call reads one more token; some outputs are kept for the check."""
        self._start, self._untimed, self._kept = self.state, len(self._read), []
        return TimedCall(self._one_more, self._draw, self._observe)

    def fault(self, tolerance: float) -> str:
        """Check tokens that have been timed.

        Another instance of the attention reads them again from the state before, many at once.
        Up to a context of ``CHECKED`` tokens they are compared with the oracle, too.

        Args:
            tolerance: relative error of an output that rounding explains.

        Returns:
            The wrong token and the reason, in one line; empty if none was wrong.
        """
        if self._fault or not self._kept:
            return self._fault
        kept = self._random.sample(self._kept, len(self._kept))
        selects = type(self.module).undecided_rows is not BaseAttention.undecided_rows
        allowed = SELECTED_ANEW if selects else SLACK * tolerance
        replayed = self._replay(1 + max(one.number for one in kept))
        for one in kept:
            error = relative_error(one.output, replayed[:, :, one.number : one.number + 1])
            if not error <= allowed:
                return (
                    f"timed token {one.number + 1}: relative error {error:.1e}, tolerance "
                    f"{allowed:.1e} (the same tokens, read again from the state before them)"
                )
        if self.case.length + len(self._read) > CHECKED:
            return ""
        whole = [
            torch.cat((x[:, :, : self.case.length], read), 2)
            for x, read in zip((self.q, self.k, self.v), self._tokens(self._read), strict=True)
        ]
        subject = Workload(replace(self.case, length=NEW), self.module).subject()
        for one in kept[:FEW_CALLS]:
            row = self.case.length + self._untimed + one.number
            rows = torch.tensor([row], device=self.device)
            if reason := check_rows(subject, whole, rows, one.output, SLACK * tolerance):
                return f"timed token {one.number + 1}: {reason}"
        return ""

    def _replay(self, count: int) -> Tensor:
        """Return the outputs for the first timed tokens, (B, H, count, D)."""
        stream = DecodeWorkload(self.case, beside=self)
        state, outs = self._start, []
        timed = self._read[self._untimed : self._untimed + count]
        for at in range(0, count, REPLAYED_AT_ONCE):
            tokens = self._tokens(timed[at : at + REPLAYED_AT_ONCE])
            out, state = stream.module.step(*tokens, state)
            outs.append(out)
        return torch.cat(outs, 2)

    def _draw(self) -> None:
        scale = SIZES ** self._random.uniform(-1, 1)
        self._read.append(_Token(self._random.randrange(self.q.shape[2]), scale))
        self._token = self._tokens(self._read[-1:])

    def _tokens(self, drawn: Sequence[_Token]) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of q, k and v of these tokens."""
        places = [one.at for one in drawn]
        q, k, v = (x[:, :, places] for x in (self.q, self.k, self.v))
        return q * torch.tensor([[one.scale] for one in drawn]).to(q), k, v

    def _one_more(self) -> object:
        q, k, v = self._token
        out, self.state = self.module.step(q, k, v, self.state)
        return out

    def _observe(self, out: object) -> None:
        """Keep the output if it is drawn; each output has the same chance."""
        number = len(self._read) - self._untimed - 1
        drawn = number if number < KEPT_CALLS else self._random.randrange(number + 1)
        if drawn >= KEPT_CALLS:
            return
        fault = output_fault(out, self._token)
        unchanged = self._tokens(self._read[-1:])
        if not fault and not all(map(torch.equal, self._token, unchanged)):
            fault = WRITTEN
        if fault:
            self._fault = f"timed token {number + 1}: {fault}"
            return
        assert isinstance(out, Tensor)
        one = _KeptToken(number, out.clone())
        if drawn < len(self._kept):
            self._kept[drawn] = one
        else:
            self._kept.append(one)

    def error_vs_dense(self) -> float:
        """Return the relative error of the outputs for new tokens against dense attention."""
        state, outs = self.state, []
        rows = torch.arange(self.case.length, self.case.length + NEW)
        for at in rows.tolist():
            out, state = self._step(state, at, at + 1)
            outs.append(out)
        exact = []
        for h in range(self.q.shape[1]):  # a head at a time: the context in float64 is large
            q, k, v = (x[:, h : h + 1].double() for x in (self.q, self.k, self.v))
            exact.append(dense_rows(q, k, v, rows, causal=True))
        return relative_error(torch.cat(outs, 2), torch.cat(exact, 1))

    def checked(self) -> Workload:
        """Return a workload for the check, with a context of at most ``CHECKED`` tokens.

        Up to that length the stream must equal the parallel form, whatever its state drops later.
        """
        length = min(self.case.length, CHECKED)
        workload = Workload(replace(self.case, length=length))
        workload.attend = self._attend  # type: ignore[method-assign]
        return workload

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the stream's outputs: from chunks of growing size, the last tokens one by one."""
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
            end = min(stop, at + CHUNK)
            # In memory of their own: a state that keeps views of them is as large as they are.
            q, k, v = (x[:, :, at:end].clone() for x in (self.q, self.k, self.v))
            state = self.module.absorb(q, k, v, state)
        return state

    def _step(self, state: StreamState, at: int, end: int) -> tuple[Tensor, StreamState]:
        q, k, v = (x[:, :, at:end] for x in (self.q, self.k, self.v))
        return self.module.step(q, k, v, state)
