"""In which order examples are trained on: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["BatchOrder"]


class BatchOrder(Sampler[list[int]]):
    """Endless batches: one permutation of all examples after the other, without a gap.

    A run that goes on at batch b so sees what an uninterrupted one sees. Of several processes
    each gets its share of every batch.

    Args:
        examples: how many there are, at least one.
        batch_size: of all processes together.
        seed: of the permutations.
        first: the batch to begin with.
        rank: of this process.
        world: number of processes.
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
        at, epoch, order = self.first * self.batch_size, -1, torch.empty(0, dtype=torch.int64)
        while True:
            batch = []
            for place in range(at, at + self.batch_size):
                if place // self.examples != epoch:
                    epoch = place // self.examples
                    g = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
                    order = torch.randperm(self.examples, generator=g)
                batch.append(int(order[place % self.examples]))
            at += self.batch_size
            yield batch[self.rank :: self.world]
