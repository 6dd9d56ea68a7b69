"""Batches that grow by half with each pass over the data, as far as memory allows.

A larger batch does for training what a smaller learning rate does (Smith et al. 2018, arXiv
1711.00489), in fewer steps. Its memory is predicted from that of smaller ones, on each process; the
smallest answer counts for all.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

from danon.measure.memory_limit import SHARE
from danon.measure.step_memory import StepMeter
from danon.training.batch_sizer import BatchSizer
from danon.training.config import TrainingConfig
from danon.training.ranks import Ranks

__all__ = ["BatchGrowth", "wanted_size"]

GROWTH = 1.5
"""Factor of the batch from one pass over the data to the next."""
MOST_PASSES = 1000
"""Passes after which the power of the factor is not computed: it would overflow."""

_log = logging.getLogger(__name__)


def wanted_size(config: TrainingConfig, epoch: int) -> int:
    """Return the examples of a forward pass of all processes, whatever memory there is.

    Args:
        config: first and largest size.
        epoch: passes over the data that are done.
    """
    if config.max_batch_size is None:
        return config.batch_size
    return min(config.max_batch_size, int(config.batch_size * GROWTH ** min(epoch, MOST_PASSES)))


class BatchGrowth:
    """Size of the batches of a training.

    Args:
        config: first and largest size.
        ranks: processes that share a batch.

    Attributes:
        allowed: largest batch of all processes that fits; part of a checkpoint, as a resumed
            training must see the same batches.
    """

    def __init__(self, config: TrainingConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.allowed = config.max_batch_size or config.batch_size
        self._measured = set[int]()
        self._meter: StepMeter | None = None
        if self.allowed > config.batch_size and ranks.device.type in ("cpu", "cuda"):
            self._meter = StepMeter(ranks.device)
            free = SHARE * self._meter.free_bytes()
            self._sizer = BatchSizer(1, self._share(self.allowed), GROWTH, free)

    def size(self, epoch: int) -> int:
        """Return the examples of a forward pass of all processes.

        Args:
            epoch: passes over the data that are done.
        """
        return min(wanted_size(self.config, epoch), self.allowed)

    @contextlib.contextmanager
    def measure(self, examples: int) -> Iterator[None]:
        """Measure the memory of a forward and backward pass, once for each size.

        Every process enters it for the same passes.

        Args:
            examples: of all processes in the pass.
        """
        if self._meter is None or examples in self._measured or self.allowed <= examples:
            yield
            return
        self._measured.add(examples)
        self._meter.start()
        try:
            yield
        finally:
            memory = self._meter.stop()
        most = self._share(self.allowed)
        if memory is not None:  # None beside a trace of somebody else's
            self._sizer.measured(self._share(examples), memory.peak, memory.kept)
            most = self._sizer.largest_size(most)
        fits = min(self.ranks.gather(most)) * self.ranks.world_size
        if fits < self.allowed:
            self.allowed = max(fits, examples)
            _log.warning(
                "max_batch_size = %d would not fit into memory: batches grow to %d",
                self.config.max_batch_size,
                self.allowed,
            )

    def _share(self, examples: int) -> int:
        """Return the examples of a process that has the most of a batch."""
        return math.ceil(examples / self.ranks.world_size)
