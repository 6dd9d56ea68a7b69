"""The examples of a batch: count, cut out and join them, whatever a loader makes of them.

    batch = {"input_ids": torch.zeros(8, 64), "name": ["a", "b", ...]}
    count_examples(batch)  # 8
    join_examples([take_examples(batch, 6, 8), take_examples(batch, 0, 1)])  # three examples

A batch is a tensor whose first dimension is that of the examples, a list of objects that are no
tensors, or a tuple, list or mapping of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_examples", "form", "join_examples", "move_batch", "take_examples"]


def count_examples(batch: Any) -> int:
    """Return the number of examples.

    Args:
        batch: see the module.

    Raises:
        ValueError: parts of different numbers of examples, or something that has none.
    """
    counts = {len(part) for part in _parts(batch)}
    if len(counts) != 1:
        raise ValueError(
            f"a batch has parts of {sorted(counts)} examples: all must have the same number"
            if counts
            else f"a batch is {batch!r}: must hold at least one tensor or list of examples"
        )
    return counts.pop()


def take_examples(batch: Any, start: int, stop: int) -> Any:
    """Return some examples of a batch, as views of its tensors.

    Args:
        batch: see the module.
        start: first example.
        stop: example after the last one.
    """
    return _rebuilt([batch], lambda parts: parts[0][start:stop])


def join_examples(batches: Sequence[Any]) -> Any:
    """Return one batch with the examples of several, in order.

    Args:
        batches: of one :func:`form`, at least one.
    """
    if len(batches) == 1:
        return batches[0]

    def joined(parts: list[Any]) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return type(parts[0])(item for part in parts for item in part)

    return _rebuilt(batches, joined)


def form(batch: Any) -> object:
    """Return what two batches must have in common to be joined, comparable by ``==``.

    Args:
        batch: see the module.
    """
    if isinstance(batch, Tensor):
        return batch.dtype, batch.device, batch.shape[1:]
    if isinstance(batch, Mapping):
        return {name: form(part) for name, part in batch.items()}
    if _is_container(batch):
        return type(batch), [form(part) for part in batch]
    return type(batch)


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device.

    Args:
        batch: see the module.
        device: of its tensors.
    """
    return _rebuilt([batch], lambda parts: _moved(parts[0], device))


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else part


def _is_container(batch: Any) -> bool:
    """Return True for a list or tuple of batches; one of plain objects is a part itself."""
    return isinstance(batch, list | tuple) and any(
        isinstance(item, Tensor | Mapping | list | tuple) for item in batch
    )


def _parts(batch: Any) -> Iterator[Any]:
    """Yield the tensors and lists of a batch.

    Raises:
        ValueError: something else is in it.
    """
    if isinstance(batch, Mapping):
        for part in batch.values():
            yield from _parts(part)
    elif _is_container(batch):
        for part in batch:
            yield from _parts(part)
    elif isinstance(batch, list | tuple) or (isinstance(batch, Tensor) and batch.dim() > 0):
        yield batch
    else:
        raise ValueError(
            f"a batch holds {_described(batch)}: must be a tensor with a dimension of examples, a "
            "list, or a tuple, list or mapping of them"
        )


def _described(batch: Any) -> str:
    return "a tensor of no dimension" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"


def _rebuilt(batches: Sequence[Any], make: Any) -> Any:
    """Return a batch of the same structure, each part made of those of the batches."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: _rebuilt([batch[name] for batch in batches], make) for name in first}
    if not _is_container(first):
        return make(list(batches))
    made = [_rebuilt(parts, make) for parts in zip(*batches, strict=True)]
    return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
