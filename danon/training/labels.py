"""The labels of a batch, by which its loss counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from danon.training.batch_examples import count_examples

__all__ = ["IGNORED", "count_labels", "labels_of"]

IGNORED = -100
"""Label of a token without a target."""


def labels_of(batch: Any) -> Any:
    """Return the labels of a batch; None without any.

    Args:
        batch: ``(inputs, labels)``, a mapping with ``labels``, or inputs alone.
    """
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def count_labels(batch: Any) -> int:
    """Count the labels of a batch other than ``-100``; without labels its examples.

    Args:
        batch: as in :func:`labels_of`.
    """
    labels = labels_of(batch)
    return int((labels != IGNORED).sum()) if isinstance(labels, Tensor) else count_examples(batch)
