"""A bounded cache of raw blocks of tokens: what of a long past stays at full resolution."""

from __future__ import annotations

import torch
from torch import Tensor

from danon.attention.stream_state import Span, StateTensor, span_of, tensor_of

__all__ = ["BlockCache"]


class BlockCache:
    """The blocks (leaves of UCSA's tree) that sequences and heads hold, each its own.

    Works on a copy of a stream's parts, which are never written to: states that share a past, in
    any number of threads, do not disturb each other. What is evicted depends on positions and on
    choices made before, never on how the stream is cut into chunks.

    Args:
        parts: of an earlier cache, or empty for a new one.
        size: blocks per sequence and head, or None for any number.
        strategy: ``lru``, ``lfu`` or ``fifo``.
    """

    def __init__(self, parts: dict[str, StateTensor], size: int | None, strategy: str) -> None:
        """Wrap the parts of a state that hold the cache."""
        self.size, self.strategy = size, strategy
        self.k, self.v = span_of(parts, "slot_k"), span_of(parts, "slot_v")
        self.block, self.use = tensor_of(parts, "slot_block"), tensor_of(parts, "slot_use")
        self._mine = False  # True if k and v may be written to
        self._order: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def empty(like: Tensor, width: int) -> dict[str, StateTensor]:
        """Return parts of an empty cache for keys (X, 0, D), in rows of ``width`` numbers."""
        rows = like.new_empty(like.shape[0], 0, width)
        none = torch.empty(like.shape[0], 0, dtype=torch.int64, device=like.device)
        return {
            "slot_k": Span.of(rows),
            "slot_v": Span.of(rows),
            "slot_block": none,
            "slot_use": none,
        }

    def parts(self) -> dict[str, StateTensor]:
        """Return the parts that the stream keeps."""
        return {"slot_k": self.k, "slot_v": self.v, "slot_block": self.block, "slot_use": self.use}

    def insert(self, first: int, k: Tensor, v: Tensor, now: Tensor) -> None:
        """Take in blocks ``first``, ``first`` + 1, ... (X, n, width); used at ``now`` (n,)."""
        if self.size is not None and k.shape[1] > self.size:
            gone = k.shape[1] - self.size
            first, k, v, now = first + gone, k[:, gone:], v[:, gone:], now[gone:]
        X, n = k.shape[:2]
        block = torch.arange(first, first + n, device=k.device).expand(X, n)
        use = torch.zeros_like(block) if self.strategy != "lru" else now.expand(X, n)
        room = n if self.size is None else min(n, self.size - self.k.size)
        if room < n:
            self._replace(block[:, room:], use[:, room:], k[:, room:], v[:, room:])
        if room:
            self.k, self.v = self.k.append(k[:, :room]), self.v.append(v[:, :room])
            self.block = torch.cat((self.block, block[:, :room]), 1)
            self.use = torch.cat((self.use, use[:, :room]), 1)
        self._order = None

    def find(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return slots of blocks (T, X, n), and bool: True if they are held."""
        if self._order is None:
            held, slot = self.block.sort(1)
            self._order = held.contiguous(), slot
        held, slot = self._order
        blocks = block.transpose(0, 1).flatten(1).contiguous()
        at = torch.searchsorted(held, blocks).clamp_max(held.shape[1] - 1)
        hit, slot = held.gather(1, at) == blocks, slot.gather(1, at)
        T, X, n = block.shape
        return slot.view(X, T, n).transpose(0, 1), hit.view(X, T, n).transpose(0, 1)

    def used(self, slot: Tensor, times: Tensor, now: Tensor) -> None:
        """Record that slots (T, X, n) were refined so many times (T, X, n), at ``now`` (T,)."""
        slot = slot.transpose(0, 1).flatten(1)
        if self.strategy == "lru":
            last = torch.where(times > 0, now[:, None, None], 0).transpose(0, 1).flatten(1)
            self.use = self.use.scatter_reduce(1, slot, last, "amax")
        elif self.strategy == "lfu":
            self.use = self.use.scatter_add(1, slot, times.transpose(0, 1).flatten(1))

    def _replace(self, block: Tensor, use: Tensor, k: Tensor, v: Tensor) -> None:
        """Put blocks in the place of those that the strategy gives up."""
        rank = self.use * (1 << 32) + self.block  # the older one of equals
        slot = rank.topk(block.shape[1], 1, largest=False).indices
        if not self._mine:
            self.k, self.v = Span.of(self.k.rows), Span.of(self.v.rows)
            self._mine = True
        row = torch.arange(len(slot), device=slot.device)[:, None]
        self.k.rows[row, slot] = k
        self.v.rows[row, slot] = v
        self.block, self.use = self.block.scatter(1, slot, block), self.use.scatter(1, slot, use)
