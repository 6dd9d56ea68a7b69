"""A part of a sequence, whose other parts other processes have, as an attention sees it.

    k, v = shard.fetch((k, v), shard.up_to_own_end)     # keys of all tokens up to the own last one
    mass = shard.total(mass)                            # a sum over the tokens of all parts

Queries stay where they are, keys and values come: an attention that can do with a part defines
:meth:`~danon.attention.base.BaseAttention.attend_shard`. How rows travel is a matter of
:mod:`danon.distributed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from danon.attention.keyed_draws import DrawKey

__all__ = ["Drawing", "Range", "SequenceShard", "Wanted"]

Range = tuple[int, int]
"""Rows [a, z)."""
Wanted = Callable[[int, int], Sequence[Range]]
"""Rows that the process with tokens [start, stop) wants; the same function on every process."""


class Drawing(Protocol):
    """An attention that may draw random numbers in training."""

    draw_key: DrawKey | None
    draw_stream: int | None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return an iterator over the parameters."""


class SequenceShard(ABC):
    """Tokens [start, stop) of sequences, and the way to those of other processes.

    All processes must call :meth:`fetch` and :meth:`total` equally often and in the same order.

    Args:
        edges: process r has tokens [edges[r], edges[r + 1]).
        rank: of this process.
        lengths: real tokens of each row of the batch, (B,); the others are padding behind them.
            None: all are real.

    Attributes:
        start: place of the first token of this process.
        stop: place after its last one.
        length: tokens of the whole sequence.
    """

    def __init__(self, edges: Sequence[int], rank: int, lengths: Sequence[int] | None) -> None:
        """Keep the places."""
        self.edges, self.rank = tuple(edges), rank
        self.start, self.stop, self.length = edges[rank], edges[rank + 1], edges[-1]
        self.lengths = None if lengths is None else tuple(lengths)

    @property
    def last(self) -> bool:
        """True on the process that has the last tokens, and so sees all."""
        return self.rank == len(self.edges) - 2

    def real(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        """Return which of tokens [start, stop) are no padding, (B, stop - start); None: all.

        Args:
            start: place of the first one.
            stop: place after the last one.
            device: of the result.
        """
        if self.lengths is None:
            return None
        place = torch.arange(start, stop, device=device)
        return place < torch.tensor(self.lengths, device=device)[:, None]

    @staticmethod
    def up_to_own_end(start: int, stop: int) -> Sequence[Range]:
        """Want all tokens that a causal query of [start, stop) may see."""
        return ((0, stop),)

    @abstractmethod
    def one_attention(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Return a context for one attention's :meth:`fetch` and :meth:`total`.

        Its value is called with the output of the attention and returns it: with it, the backward
        pass goes through every exchange, whether or not this process used what it fetched.
        """

    @abstractmethod
    def fetch(
        self, tensors: Sequence[Tensor], wanted: Wanted, edges: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """Return rows of tensors whose rows are spread over the processes.

        The gradients of what was fetched go back to the process that has the rows, and add up. So
        the tensors must need a gradient on all processes or on none, even where they have no rows.

        Args:
            tensors: each (B, heads, rows, ...) of one dtype, with the rows of this process.
            wanted: which rows a process wants, in this order.
            edges: process r has rows [edges[r], edges[r + 1]); None: as of the tokens.

        Returns:
            Each (B, heads, wanted rows, ...), contiguous.
        """

    @abstractmethod
    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over all processes, the same on each.

        Its gradient is that of the own x: summed over the processes, gradients of parameters are
        whole.

        Args:
            x: of the same shape everywhere.
        """

    @abstractmethod
    def draw_key(self, attention: Drawing) -> DrawKey:
        """Return the key of an attention's draws in this forward pass, the same everywhere.

        Args:
            attention: its own key, where it has one, is taken.
        """
