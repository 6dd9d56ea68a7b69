"""A data loader that reads the next batches while a model works on the current one.

    loader = DataLoader(dataset, batch_size=32, num_workers=4, prefetch_factor=2)
    loader.set_prefetch(num_prefetch=2, pin_prefetch=True)
    for batch in loader:  # the next two are read meanwhile
        train(batch)

Worker processes prefetch single batches already. A thread beside them collates, receives and pins
batches off the training's own thread.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils import data
from torch.utils.data._utils.pin_memory import pin_memory

__all__ = ["DataLoader"]

_T_co = TypeVar("_T_co", covariant=True)
_log = logging.getLogger(__name__)


class DataLoader(data.DataLoader[_T_co]):
    """Torch's ``DataLoader`` with :meth:`set_prefetch`.

    It yields the same batches in the same order as torch's, and raises a worker's error in the
    place of its batch. With ``num_workers=0`` a dataset must not draw from the global random
    generators while prefetching: the training's own draws come between. Workers have generators of
    their own.

    Example::

        >>> import torch
        >>> from danon.training import DataLoader
        >>> loader = DataLoader(torch.arange(6), batch_size=4)
        >>> loader.set_prefetch(num_prefetch=2)
        >>> [batch.tolist() for batch in loader]
        [[0, 1, 2, 3], [4, 5]]

    Args:
        args: as torch's, ``dataset`` first.
        kwargs: as torch's. ``pin_memory=True`` without an accelerator is noted in the log once, and
            nothing is pinned.

    Attributes:
        num_prefetch: batches that are read ahead; 0: none.
        pin_prefetch: True if they are pinned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_prefetch, self.pin_prefetch = 0, False
        self._last: weakref.ref[_Prefetching] | None = None
        if self.pin_memory:
            self.pin_memory = _can_pin()

    def set_prefetch(self, num_prefetch: int = 2, pin_prefetch: bool = True) -> None:
        """Read batches ahead in a thread, from the next iteration on.

        Args:
            num_prefetch: batches that are ready or being read beside the current one; 0: none.
            pin_prefetch: copy them into pinned memory, from which an accelerator copies without
                waiting. Without an accelerator a note in the log says so, once.

        Raises:
            ValueError: ``num_prefetch`` is no integer >= 0.
        """
        if type(num_prefetch) is not int or num_prefetch < 0:
            raise ValueError(f"num_prefetch = {num_prefetch!r}: must be an integer >= 0")
        self.num_prefetch = num_prefetch
        self.pin_prefetch = pin_prefetch and _can_pin()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Return an iterator over the batches."""
        last = None if self._last is None else self._last()
        if last is not None:  # torch resets the workers that it reads from
            last.close()
        batches = super().__iter__()
        if self.num_prefetch == 0:
            return batches
        made = _Prefetching(batches, self.num_prefetch, self.pin_prefetch)
        if self.persistent_workers:
            self._last = weakref.ref(made)
        return made


class _Prefetching(Iterator[Any]):
    """Batches of an iterator, read ahead by a thread that ends with this object."""

    def __init__(self, batches: Iterator[Any], count: int, pin: bool) -> None:
        self._first: Iterator[Any] | None = batches
        self._buffer = _Buffer(count)
        self._pin = pin
        device = torch.accelerator.current_device_index() if pin else None
        self._thread = threading.Thread(
            target=_fill,
            args=(batches, self._buffer, device, torch.is_grad_enabled()),
            name="danon-prefetch",
            daemon=True,
        )
        # The thread has no reference to this object, so a loop that breaks ends it.
        self.close = weakref.finalize(self, _end, self._buffer, self._thread)

    def __next__(self) -> Any:
        if self._first is not None:
            # What torch draws as an iteration begins is drawn here, not at some later time.
            batches, self._first = self._first, None
            try:
                batch = next(batches)
            except StopIteration:
                self._buffer.close()
                raise
            except Exception:
                self._thread.start()
                raise
            self._thread.start()
            return pin_memory(batch) if self._pin else batch
        try:
            return self._buffer.take()
        except StopIteration:
            self.close()
            raise


class _Buffer:
    """Batches and errors between two threads.

    Args:
        size: most of them at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[tuple[Any, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._closed = self._complete = False

    def has_room(self) -> bool:
        """Wait for room and return True; return False once the buffer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            return not self._closed

    def put(self, batch: Any, error: BaseException | None = None) -> None:
        """Add a batch, or an error in its place; a closed buffer drops it."""
        with self._changed:
            if self._closed:
                return
            self._items.append((batch, error))
            self._changed.notify_all()

    def complete(self) -> None:
        """Add nothing more."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def close(self) -> None:
        """Drop what there is, and want nothing more."""
        with self._changed:
            self._closed = self._complete = True
            self._items.clear()
            self._changed.notify_all()

    def take(self) -> Any:
        """Wait for the next batch and return it, or raise its error.

        Raises:
            StopIteration: there are no more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._complete)
            if not self._items:
                raise StopIteration
            batch, error = self._items.popleft()
            self._changed.notify_all()
        if error is not None:
            raise error
        return batch


def _fill(batches: Iterator[Any], buffer: _Buffer, device: int | None, gradients: bool) -> None:
    """Read batches into a buffer until there are no more, or nobody wants them."""
    # Settings of this thread alone: those of the thread that iterates.
    torch.set_grad_enabled(gradients)
    if device is not None:
        torch.accelerator.set_device_index(device)
    try:
        while buffer.has_room():
            try:
                batch = next(batches)
                buffer.put(batch if device is None else pin_memory(batch))
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - raised where the batch is asked for
                buffer.put(None, error)
    except BaseException as error:  # noqa: BLE001 - an exit too
        buffer.put(None, error)
    finally:
        del batches  # its workers end now, though an error that was raised here holds this frame
        buffer.complete()


def _end(buffer: _Buffer, thread: threading.Thread) -> None:
    """Let the thread end, and wait until it has."""
    buffer.close()
    # The collector of garbage may run in that very thread.
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()


@functools.cache
def _can_pin() -> bool:
    """Return True if memory can be pinned here; say once why not."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and kind.type != "mps":
        return True
    _log.warning(
        "pinned memory needs an accelerator such as a CUDA GPU, and there is %s: batches are not "
        "pinned",
        "none" if kind is None else f"only {kind.type}",
    )
    return False
