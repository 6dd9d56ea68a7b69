"""The order in which examples are trained on: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["BatchOrder"]

NEXT_EPOCH, PARTNERS = 1_000_003, 500_009
"""Distances of the seeds of two permutations."""


class BatchOrder(Sampler[list[Any]]):
    """Endless batches: one permutation of all examples after the other, without a gap.

    A run that resumes after so many examples sees the batches of an uninterrupted one. With several
    processes each gets its share of every batch, which is the same for any number of them.

    Args:
        examples: number of examples, at least one.
        batch_size: examples of a batch of all processes together, or a function of the number of
            passes over all examples that lie behind its first one.
        seed: seed of the permutations.
        first: examples of all processes before the first batch.
        rank: number of this process.
        world: number of processes.
        pairs: True to yield pairs of an index and that of a partner for :mod:`.mixup`.

    Raises:
        ValueError: a batch has fewer examples than there are processes.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int | Callable[[int], int],
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        pairs: bool = False,
    ) -> None:
        self._size = batch_size if callable(batch_size) else lambda _: batch_size
        if self._size(0) < world:
            raise ValueError(
                f"batch_size = {self._size(0)}: must be at least {world}, an example a process"
            )
        self.examples, self.seed, self.first = examples, seed, first
        self.rank, self.world, self.pairs = rank, world, pairs

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the indices of this process's examples, batch after batch, without end."""
        at, epoch = self.first, -1
        order = partners = torch.empty(0, dtype=torch.int64)
        while True:
            batch: list[Any] = []
            size = self._size(at // self.examples)
            for position in range(at, at + size):
                if position // self.examples != epoch:
                    epoch = position // self.examples
                    order = self._permutation(epoch)
                    partners = self._permutation(epoch, PARTNERS) if self.pairs else order
                index = position % self.examples
                one = int(order[index])
                batch.append((one, int(partners[index])) if self.pairs else one)
            at += size
            yield batch[self.rank :: self.world]

    def _permutation(self, epoch: int, distance: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + NEXT_EPOCH * epoch + distance)
        return torch.randperm(self.examples, generator=g)
