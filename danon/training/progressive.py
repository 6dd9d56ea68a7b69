"""Progressive training: short examples first.

In pass e over the data the first ``min(max_size, start_size * growth^e)`` of each example's tokens
are read. Short examples cost less, and long ones are easier for a model that has seen them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from danon.training.config import TrainingConfig

__all__ = ["crop", "size_in_epoch"]


def size_in_epoch(config: TrainingConfig, epoch: int) -> float:
    """Return the share of each example's tokens that are read.

    Args:
        config: sizes and growth.
        epoch: passes over the data that are done.
    """
    # The power overflows long before an epoch that anybody reaches.
    growth = config.size_growth ** min(epoch, 1000) if config.size_growth > 1 else 1.0
    return min(config.max_size, config.start_size * growth)


def crop(batch: Any, size: float) -> Any:
    """Return a batch with the first tokens of every example.

    Args:
        batch: ``(input_ids, labels)`` or a mapping. What has the tokens' dimension is cut.
        size: share of the tokens, above 0; at least one token stays.

    Raises:
        ValueError: examples without a dimension of tokens.
    """
    if size >= 1:
        return batch
    values = batch.values() if isinstance(batch, Mapping) else batch
    first = next((x for x in values if isinstance(x, Tensor)), None)
    if first is None or first.dim() < 2:
        shape = None if first is None else tuple(first.shape)
        raise ValueError(
            f"start_size < 1 with inputs of shape {shape}: examples must have a dimension of tokens"
        )
    length = first.shape[1]
    kept = max(1, math.ceil(size * length))

    def cut(x: Any) -> Any:
        fits = isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == length
        return x[:, :kept] if fits else x

    if isinstance(batch, Mapping):
        return {name: cut(x) for name, x in batch.items()}
    return [cut(x) for x in batch]
