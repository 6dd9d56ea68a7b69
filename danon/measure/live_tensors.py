"""Tensors that Python objects hold: they show a stream that keeps more than its state says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["LiveTensors", "hidden_state"]

STATE_SHARE = 0.1
STATE_BYTES = 2**20
"""Allowance beside a state: this share of it, or so many bytes (tables of positions)."""


class SizedState(Protocol):
    """A state of a stream. The gate loads this file alone, by its path."""

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""


class LiveTensors:
    """Tensors of a device that Python objects hold at one moment.

    Objects that were frozen before (``gc.freeze``) are not among them.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: torch.device) -> None:
        """Collect the tensors of now."""
        self._device, self._frozen = device, gc.get_freeze_count()
        # Holds them, so that no address is used twice.
        self._versions = [(x, _version(x)) for x in _held(device)]

    def bytes_since(self) -> int:
        """Return the bytes of all storages that were made or written since that moment."""
        if gc.get_freeze_count() > self._frozen:
            gc.unfreeze()  # what was frozen meanwhile would not be seen
        old = {_address(x) for x, _ in self._versions}
        made = [x for x in _held(self._device) if _address(x) not in old]
        # Tensors of one storage may count versions apart: a parameter, and what it is made of.
        written = [x for x, version in self._versions if _version(x) != version]
        storages = {_address(x): x.untyped_storage().nbytes() for x in (*made, *written)}
        return sum(storages.values())


def hidden_state(before: LiveTensors, state: SizedState) -> str:
    """Return why a state is not all that a stream keeps, in one line; empty if it is.

    Args:
        before: the tensors before the stream began.
        state: after the context.
    """
    allowed = state.nbytes + max(STATE_SHARE * state.nbytes, STATE_BYTES)
    if before.bytes_since() <= allowed:
        return ""
    gc.collect()  # what nothing holds any more may not have been collected yet
    if (kept := before.bytes_since()) <= allowed:
        return ""
    return (
        f"keeps {kept / 2**20:,.1f} MiB of its context, of which its state says "
        f"{state.nbytes / 2**20:,.1f} MiB"
    )


def _held(device: torch.device) -> Iterator[Tensor]:
    tensor_types = set(_subclasses(Tensor))
    for item in gc.get_objects():
        if type(item) not in tensor_types:  # isinstance may run code of the object
            continue
        if item.layout == torch.strided and item.untyped_storage().device.type == device.type:
            yield item


def _subclasses(base: type) -> Iterator[type]:
    yield base
    subclass: type
    for subclass in type.__subclasses__(base):
        yield from _subclasses(subclass)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
