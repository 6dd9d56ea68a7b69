"""A cache of what a model has read: prompts with a common beginning are read once."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from danon.config import ConfigError
from danon.models.backbone import Backbone
from danon.models.state import ModelState

__all__ = ["PrefixCache"]


@dataclass
class _Entry:
    """A prefix: its state, once somebody has computed it."""

    state: Future[ModelState] = field(default_factory=Future)
    last_use: int = 0
    uses: int = 0
    made: int = 0


class PrefixCache:
    """States of prompt prefixes, one for every whole block of tokens; safe for many threads.

    Threads that ask for the same prefix at once wait for the one that computes it. An error while
    computing reaches all that wait, and nothing is kept.

    Args:
        model: what reads the prompts; its parameters must not change meanwhile.
        max_cache_size: tokens whose blocks are kept, over all prompts.
        cache_strategy: which block is given up: ``lru`` the one not asked for the longest, ``lfu``
            the one asked for least often, ``fifo`` the one made first.
        block_size: tokens of a block.

    Raises:
        ConfigError: a size below one block, or an unknown strategy.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        max_cache_size: int = 65_536,
        cache_strategy: Literal["lru", "lfu", "fifo"] = "lru",
        block_size: int = 512,
    ) -> None:
        """Make an empty cache."""
        if block_size < 1:
            raise ConfigError(f"block_size = {block_size}: must be >= 1")
        if max_cache_size < block_size:
            raise ConfigError(
                f"max_cache_size = {max_cache_size}: must be >= block_size = {block_size}"
            )
        if cache_strategy not in ("lru", "lfu", "fifo"):
            raise ConfigError(
                f"cache_strategy = {cache_strategy!r}: must be 'lru', 'lfu' or 'fifo'"
            )
        self._model, self._size, self._block = model, max_cache_size // block_size, block_size
        self._strategy = cache_strategy
        self._entries: dict[bytes, _Entry] = {}
        self._lock = Lock()
        self._clock = 0
        self.computed_blocks = 0
        """Blocks that the model has read for this cache."""

    def __len__(self) -> int:
        """Count the blocks kept or being computed."""
        return len(self._entries)

    def prefill(self, input_ids: Tensor) -> tuple[ModelState, Tensor]:
        """Read the whole blocks of a prompt, as far as nobody has.

        Args:
            input_ids: one prompt (1, n).

        Returns:
            The state after its last whole block, and the tokens after that (1, 1 ... block_size):
            at least one, for ``generate``.

        Raises:
            ValueError: more than one prompt, or tokens the model does not know.
        """
        if input_ids.dim() != 2 or len(input_ids) != 1 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: must be (1, n), n >= 1"
            )
        whole = (input_ids.shape[1] - 1) // self._block * self._block
        state, digest = self._model.init_state(), hashlib.sha256()
        for ids in input_ids[:, :whole].split(self._block, 1) if whole else ():
            digest.update(ids.to("cpu", torch.int64).numpy().tobytes())
            state = self._after(digest.digest(), ids, state)
        return state, input_ids[:, whole:]

    def _after(self, key: bytes, ids: Tensor, before: ModelState) -> ModelState:
        with self._lock:
            self._clock += 1
            entry, mine = self._entries.get(key), False
            if entry is None:
                self._make_room()
                entry, mine = _Entry(made=self._clock), True
                self._entries[key] = entry
            entry.last_use, entry.uses = self._clock, entry.uses + 1
        if not mine:
            return entry.state.result()
        try:
            _, state = self._model.step(ids, before)
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            entry.state.set_exception(error)
            raise
        with self._lock:
            self.computed_blocks += 1
        entry.state.set_result(state)
        return state

    def _make_room(self) -> None:
        """Give up blocks until there is room for one; the lock is held."""
        done = [(key, e) for key, e in self._entries.items() if e.state.done()]
        while len(self._entries) >= self._size and done:
            key, entry = min(done, key=lambda one: self._rank(one[1]))
            done.remove((key, entry))
            del self._entries[key]

    def _rank(self, entry: _Entry) -> tuple[int, int]:
        first = {"lru": entry.last_use, "lfu": entry.uses, "fifo": entry.made}[self._strategy]
        return first, entry.made
