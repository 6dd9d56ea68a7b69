"""Batches that grow while memory allows, whatever batches a loader makes.

    processor = DynamicBatchProcessor(initial_batch_size=32, max_batch_size=128, growth_rate=1.5)
    for batch in processor(dataloader):  # 32 examples, then 48, 72, 108, 128 ...
        loss = model(batch)
        loss.backward()

The memory of a larger batch is predicted from those that ran (:mod:`danon.training.batch_sizer`),
not found out by failing. A GPU can run out of memory all the same, as other processes use it too:
then the examples come again in smaller batches.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from danon.measure.memory_limit import SHARE
from danon.measure.step_memory import StepMeter
from danon.training.batch_examples import count_examples, form, join_examples, take_examples
from danon.training.batch_sizer import BatchSizer

__all__ = ["DynamicBatchProcessor"]

_T = TypeVar("_T")


class DynamicBatchProcessor:
    """Regroups the examples of a loader into batches of a size that adapts to the memory.

    Every example comes once, in the order of the loader. The size grows after each batch and stays
    from one loader to the next. A batch ends early where the loader's next examples have another
    shape.

    Between one batch and the next the memory is measured: on a GPU by the allocator, at no cost; on
    a CPU by a trace of the first batch of each size, which is a quarter slower.

    Example::

        >>> import torch
        >>> from danon.optimization import DynamicBatchProcessor
        >>> loader = torch.utils.data.DataLoader(torch.arange(20.0), batch_size=4)
        >>> processor = DynamicBatchProcessor(initial_batch_size=4, max_batch_size=8)
        >>> [len(batch) for batch in processor(loader)]
        [4, 6, 8, 2]

    Args:
        initial_batch_size: examples of the first batch.
        max_batch_size: most examples of a batch.
        growth_rate: factor from one batch to the next, >= 1.
        memory_limit_bytes: most bytes that a batch may take beyond those that live before it, on
            ``device``; None: four fifths of those that are free.
        device: where the model runs; None: the CUDA GPU if there is one, else the CPU.

    Attributes:
        sizer: decides on the size; has the measured line.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self,
        initial_batch_size: int = 32,
        max_batch_size: int = 128,
        growth_rate: float = 1.5,
        *,
        memory_limit_bytes: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._meter = StepMeter(torch.device(device))
        self._free_at_start = self._kept = 0
        self.sizer = BatchSizer(
            initial_batch_size,
            max_batch_size,
            growth_rate,
            self._free_share if memory_limit_bytes is None else memory_limit_bytes,
        )
        self._current: _Current | None = None

    def __call__(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield batches until the loader ends.

        Args:
            loader: yields tensors whose first dimension is that of the examples, or tuples, lists
                or mappings of them; lists of other objects go along.

        Raises:
            ValueError: a batch whose examples cannot be counted.
        """
        examples = _Examples(iter(loader))
        self._free_at_start, self._kept = self._meter.free_bytes(), 0
        while (count := examples.available(self.sizer.size)) > 0:
            current = self._current = _Current(count)
            if not (self._meter.costly and self.sizer.has_measured(count)):
                self._meter.start()
            try:
                yield examples.first(count)
            finally:
                memory = self._meter.stop()
            if current.failed:
                self.sizer.failed(count)
                if self._meter.device.type == "cuda":
                    torch.cuda.empty_cache()  # its blocks have the sizes of larger batches
                continue
            examples.drop(count)
            if memory is not None:
                self._kept += memory.kept
                self.sizer.measured(count, memory.peak, memory.kept)
            if count == self.sizer.size:
                self.sizer.next_size()

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Return a context for the work on the current batch, which may run out of GPU memory.

        Then the work is left off, the size shrinks, and the same examples come again. What was done
        before the failure stays: clear the gradients inside of it, and step last. Do not use it
        with sharded models or several ranks, where the others would wait.

        Example::

            for batch in processor(loader):
                with processor.attempt():
                    optimizer.zero_grad()
                    model(batch).backward()
                    optimizer.step()

        Raises:
            ValueError: outside of a loop over batches.
            torch.OutOfMemoryError: a single example does not fit.
        """
        current = self._current
        if current is None:
            raise ValueError("attempt() has no batch: use it in a loop over processor(loader)")
        try:
            yield
        except torch.OutOfMemoryError:
            if current.count == 1:
                raise
            current.failed = True

    def run(self, loader: Iterable[Any], step: Callable[[Any], _T]) -> Iterator[_T]:
        """Yield what a function returns for each batch, repeating what does not fit in parts.

        Args:
            loader: see :meth:`__call__`.
            step: does the work on a batch; see :meth:`attempt`.
        """
        for batch in self(loader):
            current = self._current
            assert current is not None
            with self.attempt():
                result = step(batch)
            if not current.failed:
                yield result

    def _free_share(self) -> float:
        """Return the default limit in bytes."""
        if self._meter.device.type == "cuda":
            return SHARE * self._meter.free_bytes()
        # The C library keeps freed pages for the next batch, and the system calls them used: what
        # was free before the first batch counts.
        return SHARE * self._free_at_start - self._kept


@dataclass
class _Current:
    """The batch that was yielded last.

    Attributes:
        count: its examples.
        failed: it did not fit.
    """

    count: int
    failed: bool = False


class _Examples:
    """The examples of a loader that are not done yet.

    Args:
        batches: of the loader.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._pieces: deque[tuple[Any, int]] = deque()  # with their numbers of examples

    def available(self, most: int) -> int:
        """Read on, and return how many examples the next batch can have.

        Args:
            most: no more than these.
        """
        while (have := self._alike()) < most:
            if have < sum(count for _, count in self._pieces):
                break  # those of another form wait
            batch = next(self._batches, None)
            if batch is None:
                break
            if (count := count_examples(batch)) > 0:
                self._pieces.append((batch, count))
        return min(have, most)

    def first(self, count: int) -> Any:
        """Return a batch of the first examples."""
        parts = []
        for piece, size in self._pieces:
            taken = min(count, size)
            parts.append(piece if taken == size else take_examples(piece, 0, taken))
            count -= taken
            if count == 0:
                break
        return join_examples(parts)

    def drop(self, count: int) -> None:
        """Remove the first examples."""
        while count > 0:
            piece, size = self._pieces.popleft()
            if size > count:
                self._pieces.appendleft((take_examples(piece, count, size), size - count))
            count -= size

    def _alike(self) -> int:
        """Count the examples from the first on that have one form."""
        count, common = 0, None
        for piece, size in self._pieces:
            if count > 0 and form(piece) != common:
                break
            count, common = count + size, form(piece)
        return count
