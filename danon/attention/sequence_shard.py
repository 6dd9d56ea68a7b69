"""A part of a sequence, whose other parts other processes have, as an attention sees it.

    k, v = shard.fetch((k, v), shard.up_to_own_end)     # keys of all tokens up to the own last one
    mass = shard.total(mass)                            # a sum over the tokens of all parts

Queries stay where they are, keys and values come: an attention that can do with a part defines
:meth:`~danon.attention.base.BaseAttention.attend_shard`. How rows travel is a matter of
:mod:`danon.distributed`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danon.attention.keyed_draws import DrawKey

if TYPE_CHECKING:
    from danon.attention.base import BaseAttention

__all__ = ["Range", "SequenceShard", "Wanted", "on_shard"]

Range = tuple[int, int]
"""Rows [a, z)."""
Wanted = Callable[[int, int], Sequence[Range]]
"""Rows that the process with tokens [start, stop) wants; the same function on every process."""


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
        """Return a context for one attention's :meth:`fetch` and :meth:`total`; used by on_shard.

        Its value is called with the output of the attention and returns it: with it, the backward
        pass goes through every exchange, whether or not this process used what it fetched.
        """

    @abstractmethod
    def fetch(
        self, tensors: Sequence[Tensor], wanted: Wanted, edges: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """Return rows of tensors whose rows are spread over the processes.

        The gradients of what was fetched go back to the process that has the rows, and add up.

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
    def draw_key(self, attention: BaseAttention) -> DrawKey:
        """Return the key of an attention's draws in this forward pass, the same everywhere.

        Args:
            attention: its own key, where it has one, is taken.
        """


def on_shard(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check what an attend_shard(self, q, k, v, shard) gets, and hide its padding; a decorator."""

    @functools.wraps(attend)
    def run(self: Any, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        from danon.attention.base import check_inputs  # base knows this module

        check_inputs(self.config, q, k, v, None)
        if not self.config.is_causal:
            raise ValueError(
                f"{type(self).__name__} is bidirectional: only a causal attention works on parts "
                "of a sequence"
            )
        if q.shape[2] != shard.stop - shard.start:
            raise ValueError(
                f"q has {q.shape[2]} tokens: must have {shard.stop - shard.start} like the shard"
            )
        with shard.one_attention() as tied:
            out = tied(attend(self, q, k, v, shard))
        real = shard.real(shard.start, shard.stop, q.device)
        return out if real is None else torch.where(real[:, None, :, None], out, 0.0)

    return run
