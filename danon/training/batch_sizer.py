"""The size of the next batch, from the bytes that batches took so far.

    sizer = BatchSizer(initial_size=32, max_size=128, growth_rate=1.5, limit_bytes=8 * 2**30)
    sizer.measured(32, peak_bytes=2 * 2**30)
    sizer.next_size()  # 48: expected to take 3 GiB

A step takes ``fixed + per_example * size`` bytes. Two measured sizes give that line; with one, all
of its bytes are taken to grow with the size, which is more than they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["BatchSizer"]

FAILED_SHARE = 2
"""A batch that did not fit is divided by this."""


class BatchSizer:
    """Batch size that grows while the predicted memory is below a limit.

    Example::

        >>> from danon.training.batch_sizer import BatchSizer
        >>> sizer = BatchSizer(initial_size=10, max_size=100, growth_rate=2.0, limit_bytes=1000)
        >>> sizer.measured(10, peak_bytes=300)
        >>> sizer.next_size()
        20
        >>> sizer.measured(20, peak_bytes=500)
        >>> sizer.fixed_bytes, sizer.bytes_per_example, sizer.predicted_bytes(40)
        (100.0, 20.0, 900.0)
        >>> sizer.next_size()
        40

    Args:
        initial_size: examples of the first batch.
        max_size: most examples of a batch.
        growth_rate: factor from one batch to the next, >= 1.
        limit_bytes: most bytes that a step may take beyond those that live before it, or a function
            that returns them.

    Attributes:
        size: examples of the next batch.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self,
        initial_size: int,
        max_size: int,
        growth_rate: float,
        limit_bytes: float | Callable[[], float],
    ) -> None:
        _require(_whole(initial_size), "initial_size", initial_size, "an integer >= 1")
        _require(
            _whole(max_size) and max_size >= initial_size,
            "max_size",
            max_size,
            f"an integer >= initial_size = {initial_size}",
        )
        _require(1 <= growth_rate < math.inf, "growth_rate", growth_rate, "a number >= 1")
        if not callable(limit_bytes):
            _require(limit_bytes > 0, "limit_bytes", limit_bytes, "a number > 0")
        self.size = initial_size
        self._most, self._growth, self._limit = max_size, growth_rate, limit_bytes
        self._low: dict[int, float] = {}
        self._high: dict[int, float] = {}

    @property
    def limit_bytes(self) -> float:
        """Most bytes that a step may take now."""
        return self._limit() if callable(self._limit) else self._limit

    @property
    def bytes_per_example(self) -> float | None:
        """Bytes of one example more; None before two sizes are measured."""
        if len(self._high) < 2:
            return None
        large = max(self._high)
        # Each smaller size gives an upper bound of the slope, as its bytes may have been the low
        # ones and those of the largest the high ones.
        return min(
            max(0.0, self._high[large] - low) / (large - small)
            for small, low in self._low.items()
            if small < large
        )

    @property
    def fixed_bytes(self) -> float | None:
        """Bytes of a batch without an example; None before two sizes are measured."""
        slope = self.bytes_per_example
        if slope is None:
            return None
        large = max(self._high)
        return self._high[large] - slope * large

    def has_measured(self, size: int) -> bool:
        """Return True if a batch of that size was measured.

        Args:
            size: examples.
        """
        return size in self._high

    def measured(self, size: int, peak_bytes: float, kept_bytes: float = 0) -> None:
        """Tell what a step took. Of several steps of one size the largest counts.

        Args:
            size: examples of the step.
            peak_bytes: most bytes at once, beyond those that lived before.
            kept_bytes: those of them that stay, as the states that an optimizer makes in its first
                step. They need not be part of the peak, so the line is drawn to be safe either way.
        """
        high = float(peak_bytes)
        self._high[size] = max(high, self._high.get(size, 0.0))
        self._low[size] = max(high - kept_bytes, self._low.get(size, 0.0))

    def predicted_bytes(self, size: int) -> float | None:
        """Return the bytes that a step is expected to take at most; None before any measurement.

        Args:
            size: examples.
        """
        if not self._high:
            return None
        larger = [high for known, high in self._high.items() if known >= size]
        if larger:
            return min(larger)
        largest = max(self._high)
        slope = self.bytes_per_example
        if slope is None:
            slope = self._high[largest] / largest
        return self._high[largest] + slope * (size - largest)

    def next_size(self) -> int:
        """Set ``size`` for the batch after this one, and return it.

        It grows by the rate, as far as the prediction allows; without a measurement it stays. Where
        the limit has come down it shrinks.
        """
        if not self._high:
            return self.size
        wanted = self.size
        if self._growth > 1:
            wanted = min(self._most, max(self.size + 1, int(self.size * self._growth)))
        self.size = self.largest_size(wanted)
        return self.size

    def failed(self, size: int) -> int:
        """Set ``size`` after a batch that did not fit, and return it.

        Later batches stay below the failed size by the growth rate.

        Args:
            size: examples of that batch, at least two.

        Raises:
            ValueError: one example cannot become fewer.
        """
        _require(_whole(size) and size > 1, "size", size, "an integer >= 2")
        self._most = max(1, min(self._most, size - 1, int(size / self._growth)))
        self.size = max(1, min(size // FAILED_SHARE, self._most))
        return self.size

    def largest_size(self, wanted: int) -> int:
        """Return the largest size up to the wanted one whose prediction is below the limit.

        Args:
            wanted: examples, at least 1; a size was measured.
        """
        limit = self.limit_bytes
        low, high = 1, wanted  # predictions never fall with the size
        while low < high:
            middle = (low + high + 1) // 2
            predicted = self.predicted_bytes(middle)
            assert predicted is not None
            low, high = (middle, high) if predicted <= limit else (low, middle - 1)
        return low


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")
