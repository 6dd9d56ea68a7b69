"""The order in which examples are trained on: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["BatchOrder"]


class BatchOrder(Sampler[list[int]]):
    """Endless batches: one permutation of all examples after the other, without a gap.

    A run that resumes at batch b sees the batches of an uninterrupted one. With several processes
    each gets its share of every batch.

    Args:
        examples: number of examples, at least one.
        batch_size: examples of a batch of all processes together.
        seed: seed of the permutations.
        first: number of the first batch.
        rank: number of this process.
        world: number of processes.

    Raises:
        ValueError: the processes cannot share a batch equally.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size = {batch_size}: must be a multiple of {world} processes")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.first, self.rank, self.world = first, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of this process's examples, batch after batch, without end."""
        at, epoch, order = self.first * self.batch_size, -1, torch.empty(0, dtype=torch.int64)
        while True:
            batch = []
            for position in range(at, at + self.batch_size):
                if position // self.examples != epoch:
                    epoch = position // self.examples
                    g = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
                    order = torch.randperm(self.examples, generator=g)
                batch.append(int(order[position % self.examples]))
            at += self.batch_size
            yield batch[self.rank :: self.world]
