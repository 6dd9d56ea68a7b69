"""The state of a stream: spans of rows and tensors, by name, for groups of equally long sequences.

States are values: a step returns a new one and leaves the old one as it was, so a failed step
costs nothing and a stream can be forked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Group", "Span", "StateTensor", "StreamState", "compact", "span_of", "tensor_of"]


FORMAT = 3
"""Format number of saved states; raise it when a mechanism keeps other parts."""

STEP = 64
"""Storage grows in multiples of this many rows, so that blocks of rows tile it."""


class _Tape:
    """Storage that only grows: rows up to ``filled`` are never written again."""

    def __init__(self, data: Tensor, filled: int) -> None:
        """Wrap (X, rows, ...) storage, the first ``filled`` rows of which are written."""
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

    Appending writes behind the last row, where no older span looks. Two spans that continue the
    same one differently part by a copy.

    Attributes:
        tape: storage, shared by spans.
        first: place of row ``start`` on the tape.
        start: number of the first row.
        size: rows.
    """

    tape: _Tape
    first: int
    start: int
    size: int

    @classmethod
    def of(cls, x: Tensor, start: int = 0) -> Self:
        """Copy rows.

        Args:
            x: (X, n, ...).
            start: number of the first row.
        """
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
        """Number of the row after the last."""
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
        """Return the span with more rows behind it.

        Args:
            x: (X, n, ...).
        """
        end, n = self.first + self.size, x.shape[1]
        if not self.tape.claim(end, n):
            return Span.of(torch.cat((self.rows, x), 1), self.start)
        self.tape.data[:, end : end + n] = x
        return Span(self.tape, self.first, self.start, self.size + n)

    def since(self, start: int) -> Span:
        """Return the span without its first rows; give up storage that is mostly unused.

        Args:
            start: number of the first row that stays.
        """
        gone = min(max(0, start - self.start), self.size)
        span = Span(self.tape, self.first + gone, self.start + gone, self.size - gone)
        if self.tape.data.shape[1] > 4 * max(STEP, span.size):
            return Span.of(span.rows, span.start)
        return span


StateTensor = Tensor | Span
"""A named part of a state; dimension 0 is batch * key/value heads."""


def span_of(parts: Mapping[str, StateTensor], name: str) -> Span:
    """Return a part that is a span.

    Args:
        parts: name -> part.
        name: of the part.
    """
    part = parts[name]
    assert isinstance(part, Span)
    return part


def tensor_of(parts: Mapping[str, StateTensor], name: str) -> Tensor:
    """Return a part that is a tensor.

    Args:
        parts: name -> part.
        name: of the part.
    """
    part = parts[name]
    assert isinstance(part, Tensor)
    return part


def compact(parts: Mapping[str, StateTensor]) -> dict[str, StateTensor]:
    """Give tensors memory of their own: a view keeps all that it was taken from.

    Args:
        parts: name -> part.
    """

    def owned(part: StateTensor) -> StateTensor:
        if isinstance(part, Span) or part.untyped_storage().nbytes() == part.nbytes:
            return part
        return part.clone(memory_format=torch.contiguous_format)

    return {name: owned(part) for name, part in parts.items()}


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences of a batch that are equally long and so step together.

    Attributes:
        rows: places of the sequences in the batch.
        length: tokens of each.
        parts: name -> part.
    """

    rows: tuple[int, ...]
    length: int
    parts: Mapping[str, StateTensor]

    def pick(self, members: list[int], heads: int) -> Group:
        """Return the group of some members.

        Args:
            members: places in ``rows``.
            heads: key/value heads G.
        """
        if members == list(range(len(self.rows))):
            return self
        index = torch.tensor([m * heads + h for m in members for h in range(heads)])

        def chosen(part: StateTensor) -> StateTensor:
            if isinstance(part, Span):
                return Span.of(part.rows[index.to(part.rows.device)], part.start)
            return part[index.to(part.device)]

        return Group(
            tuple(self.rows[m] for m in members),
            self.length,
            {name: chosen(part) for name, part in self.parts.items()},
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
        """Return plain tensors, numbers and text, for ``torch.save`` and ``torch.load``."""

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
        """Rebuild the state that :meth:`to_dict` described.

        Args:
            saved: the dictionary.
            device: where the state shall live.

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
            if "groups" in saved and (number := saved.get("format", 1)) != FORMAT:
                raise ValueError(
                    f"the state was saved in format {number}: must be {FORMAT}; begin with "
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
