"""Streaming: attention over a sequence that arrives in chunks, with a bounded state.

States are values: a step returns a new one and leaves the old one as it was, so a failed step
costs nothing and a stream can be forked.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from danon.attention.base import BaseAttention, check_inputs, without_autocast

__all__ = [
    "Group",
    "Span",
    "StateTensor",
    "StreamState",
    "StreamingAttention",
    "span_of",
    "tensor_of",
]


FORMAT = 3
"""Of saved states: one more whenever a mechanism keeps other parts."""

STEP = 64
"""Storage grows in multiples of this many rows, so that blocks of rows tile it."""


class _Tape:
    """Storage that only grows: rows up to ``filled`` are never written again."""

    def __init__(self, data: Tensor, filled: int) -> None:
        self.data, self.filled = data, filled
        self.lock = Lock()

    def claim(self, end: int, n: int) -> bool:
        """Take the n rows from ``end`` on, if they are free."""
        with self.lock:
            if end != self.filled or end + n > self.data.shape[1]:
                return False
            self.filled = end + n
            return True


@dataclass(frozen=True, eq=False)
class Span:
    """Rows [start, start + size) of an endless (X, rows, ...) sequence.

    Appending writes behind the last row, where no older span looks; two spans that continue the
    same one differently part ways by a copy.
    """

    tape: _Tape
    first: int  # place of row ``start`` on the tape
    start: int
    size: int

    @classmethod
    def of(cls, x: Tensor, start: int = 0) -> Self:
        """The rows of x (X, n, ...), copied."""
        X, n = x.shape[:2]
        room = STEP * (2 * n // STEP + 1)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside
            data = x.new_empty(X, room, *x.shape[2:])
        data[:, :n] = x
        return cls(_Tape(data, n), 0, start, n)

    def __reduce__(self) -> tuple[Callable[..., Span], tuple[Tensor, int]]:
        """Copy and pickle the rows alone, without the spare room of their storage."""
        return Span.of, (self.rows.clone(), self.start)

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare room included."""
        return self.tape.data.nbytes

    @property
    def rows(self) -> Tensor:
        """(X, size, ...): a view."""
        return self.tape.data[:, self.first : self.first + self.size]

    def append(self, x: Tensor) -> Span:
        """The span with the rows of x (X, n, ...) behind it."""
        end, n = self.first + self.size, x.shape[1]
        if not self.tape.claim(end, n):
            return Span.of(torch.cat((self.rows, x), 1), self.start)
        self.tape.data[:, end : end + n] = x
        return Span(self.tape, self.first, self.start, self.size + n)

    def since(self, start: int) -> Span:
        """The span without the rows before ``start``; storage that is mostly unused is given up."""
        gone = min(max(0, start - self.start), self.size)
        span = Span(self.tape, self.first + gone, self.start + gone, self.size - gone)
        if self.tape.data.shape[1] > 4 * max(STEP, span.size):
            return Span.of(span.rows, span.start)
        return span


StateTensor = Tensor | Span
"""What a mechanism keeps, under a name of its own; dimension 0 is batch * key/value heads."""


def span_of(parts: Mapping[str, StateTensor], name: str) -> Span:
    """The part of that name, which is a span."""
    part = parts[name]
    assert isinstance(part, Span)
    return part


def tensor_of(parts: Mapping[str, StateTensor], name: str) -> Tensor:
    """The part of that name, which is a tensor."""
    part = parts[name]
    assert isinstance(part, Tensor)
    return part


def _compact(parts: Mapping[str, StateTensor]) -> dict[str, StateTensor]:
    """The same with tensors in memory of their own: a view keeps all that it was taken from."""

    def compact(part: StateTensor) -> StateTensor:
        if isinstance(part, Span) or part.untyped_storage().nbytes() == part.nbytes:
            return part
        return part.clone(memory_format=torch.contiguous_format)

    return {name: compact(part) for name, part in parts.items()}


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences of a batch that are equally long and so step together."""

    rows: tuple[int, ...]
    length: int
    parts: Mapping[str, StateTensor]

    def pick(self, members: list[int], heads: int) -> Group:
        """The group of some members, by place in ``rows``."""
        if members == list(range(len(self.rows))):
            return self
        index = torch.tensor([m * heads + h for m in members for h in range(heads)])

        def some(part: StateTensor) -> StateTensor:
            if isinstance(part, Span):
                return Span.of(part.rows[index.to(part.rows.device)], part.start)
            return part[index.to(part.device)]

        return Group(
            tuple(self.rows[m] for m in members),
            self.length,
            {name: some(part) for name, part in self.parts.items()},
        )


@dataclass(frozen=True, eq=False)
class StreamState:
    """All that :meth:`StreamingAttention.step` needs of the tokens seen so far.

    Attributes:
        owner: the attention class it belongs to.
        config: that attention's configuration.
        dtype: of the tokens.
        device: where it lives.
        groups: every sequence of the batch once.
    """

    owner: str
    config: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    groups: tuple[Group, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens seen, by sequence."""
        by_row = {row: group.length for group in self.groups for row in group.rows}
        return tuple(by_row[row] for row in sorted(by_row))

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds on to."""
        return sum(part.nbytes for group in self.groups for part in group.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and text: for ``torch.save`` and ``torch.load``."""

        def plain(part: StateTensor) -> Any:
            if isinstance(part, Span):
                return {"start": part.start, "rows": part.rows.clone()}
            return part

        return {
            "format": FORMAT,
            "owner": self.owner,
            "config": dict(self.config),
            "dtype": str(self.dtype).removeprefix("torch."),
            "groups": [
                {
                    "rows": list(group.rows),
                    "length": group.length,
                    "parts": {name: plain(part) for name, part in group.parts.items()},
                }
                for group in self.groups
            ],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """The state that :meth:`to_dict` described.

        Raises:
            ValueError: something is missing, or another version saved it; says what.
        """
        device = torch.device(device)

        def part(x: Any) -> StateTensor:
            if isinstance(x, Mapping):
                return Span.of(x["rows"].to(device), int(x["start"]))
            out: Tensor = x.to(device)
            return out

        try:
            if "groups" in saved and (found := saved.get("format", 1)) != FORMAT:
                raise ValueError(
                    f"the state was saved in format {found}: must be {FORMAT}; begin with "
                    "init_state and feed the tokens again"
                )
            groups = tuple(
                Group(
                    tuple(g["rows"]),
                    int(g["length"]),
                    {name: part(x) for name, x in g["parts"].items()},
                )
                for g in saved["groups"]
            )
            dtype = getattr(torch, saved["dtype"])
            return cls(saved["owner"], dict(saved["config"]), dtype, device, groups)
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not a saved stream state: {error!r}") from error


class StreamingAttention(BaseAttention):
    """An attention that can also be fed in chunks, for inference.

    Feeding a sequence in any chunks gives what ``forward`` gives on the whole. A subclass defines
    :meth:`init_parts` and :meth:`step_parts`.
    """

    streams: ClassVar[bool] = True
    """False in a subclass whose own kernel takes whole sequences only."""

    def init_state(
        self,
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StreamState:
        """The state before the first token.

        Args:
            batch: sequences that step together, of whatever lengths.
            dtype: of q, k and v; None takes that of the parameters (float32 without any).
            device: of q, k and v; None takes that of the parameters (the CPU without any).

        Raises:
            ValueError: batch below 1, or a configuration that is not causal.
        """
        if not self.streams:
            raise ValueError(f"{type(self).__name__} takes whole sequences only")
        if batch < 1:
            raise ValueError(f"batch = {batch}: must be at least 1")
        if not self.config.is_causal:
            raise ValueError(
                f"{type(self).__name__} is not causal: a stream cannot see later tokens"
            )
        like = next(self.parameters(), torch.zeros((), dtype=torch.float32))
        c = self.config
        empty = torch.empty(
            batch * c.kv_heads,
            0,
            c.head_dim,
            dtype=dtype or like.dtype,
            device=device or like.device,
        )
        group = Group(tuple(range(batch)), 0, self.init_parts(empty))
        return StreamState(type(self).__name__, c.to_dict(), empty.dtype, empty.device, (group,))

    @torch.no_grad()
    @without_autocast
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: StreamState, mask: Tensor | None = None
    ) -> tuple[Tensor, StreamState]:
        """Attend with the next tokens of each sequence.

        Args:
            q: (B, H, n, D) for n >= 1 new tokens.
            k: (B, G, n, D).
            v: (B, G, n, D).
            state: from :meth:`init_state` or a step before; it is left as it is.
            mask: (B, n), 1 or True for tokens that there are. The others are no part of their
                sequence, which so may be longer or shorter than its neighbours; they get zeros.

        Returns:
            (B, H, n, D) in the dtype of q, without gradients; and the state after these tokens.

        Raises:
            ValueError: wrong shapes, or a state of another attention, batch, dtype or device.
        """
        check_inputs(self.config, q, k, v, mask)
        self.check_state(state, q)
        H, D, heads = q.shape[1], q.shape[3], k.shape[1]
        if mask is None and len(state.groups) == 1:  # all step together, nothing to sort out
            (group,) = state.groups
            q_, k_, v_ = (x.reshape(-1, x.shape[2], D).contiguous() for x in (q, k, v))
            out, parts = self.step_parts(q_, k_, v_, group.length, group.parts)
            after = Group(group.rows, group.length + q.shape[2], _compact(parts))
            return out.view(q.shape), self._after(state, (after,))
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask != 0
        places = [row.nonzero().flatten() for row in real.to(q.device)]
        out = torch.zeros_like(q)
        groups: list[Group] = []
        for group in state.groups:
            by_count: dict[int, list[int]] = {}
            for member, row in enumerate(group.rows):
                by_count.setdefault(len(places[row]), []).append(member)
            for count, members in by_count.items():
                some = group.pick(members, heads)
                if count == 0:
                    groups.append(some)
                    continue
                q_, k_, v_ = (
                    torch.stack([x[row, :, places[row]] for row in some.rows]).view(-1, count, D)
                    for x in (q, k, v)
                )
                got, parts = self.step_parts(q_, k_, v_, some.length, some.parts)
                for row, rows in zip(some.rows, got.view(-1, H, count, D), strict=True):
                    out[row, :, places[row]] = rows
                groups.append(Group(some.rows, some.length + count, _compact(parts)))
        return out, self._after(state, groups)

    def absorb(self, q: Tensor, k: Tensor, v: Tensor, state: StreamState) -> StreamState:
        """The state after tokens whose outputs nobody wants; arguments as in :meth:`step`."""
        return self.step(q, k, v, state)[1]

    @abstractmethod
    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        """The parts of an empty state, for keys like ``empty`` (X, 0, D)."""

    @abstractmethod
    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        """Attend with tokens [start, start + n) of sequences of one length.

        Args:
            q: (batch * H, n, D), contiguous; k and v: (batch * G, n, D).
            parts: the state, which must not be changed.

        Returns:
            (batch * H, n, D) and the new parts.
        """

    def _after(self, state: StreamState, groups: Iterable[Group]) -> StreamState:
        return StreamState(state.owner, state.config, state.dtype, state.device, tuple(groups))

    def check_state(self, state: StreamState, q: Tensor) -> None:
        """Reject a state that is not of this attention, or not for q (B, H, n, D).

        Raises:
            ValueError: naming what differs.
        """
        if not isinstance(state, StreamState):
            raise ValueError(f"state is a {type(state).__name__}: must be what init_state returns")
        if state.owner != type(self).__name__:
            raise ValueError(f"state is of {state.owner}: must be of {type(self).__name__}")
        differ = [f for f, x in state.config.items() if getattr(self.config, f, None) != x]
        if differ:
            theirs = ", ".join(f"{f} = {state.config[f]!r}" for f in differ)
            ours = ", ".join(f"{f} = {getattr(self.config, f, None)!r}" for f in differ)
            raise ValueError(f"state is of a configuration with {theirs}: must have {ours}")
        batch = len(state.lengths)
        if batch != q.shape[0]:
            raise ValueError(f"q has batch {q.shape[0]}: must be {batch} like the state")
        if (state.dtype, state.device) != (q.dtype, q.device):
            raise ValueError(
                f"q is {q.dtype} on {q.device}: must be {state.dtype} on {state.device} "
                "like the state"
            )
