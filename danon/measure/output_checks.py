"""Checks of an output beside its values: type, shape, memory; and NaN in memory that is free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["POISONED_BLOCKS", "WRITTEN", "output_fault", "poison_free_memory"]

WRITTEN = "writes into q, k or v: inputs must stay as they are"
POISONED_BLOCKS = 8
"""Blocks of memory that are filled and freed before a call."""


def output_fault(out: object, inputs: Sequence[Tensor]) -> str:
    """Return the fault of an output beside its values, in one line; empty if there is none.

    It must be a plain tensor (a subclass may compute when it is read), like q, in memory of its
    own.

    Args:
        out: the result of a call.
        inputs: q, k, v of that call.
    """
    q = inputs[0]
    if type(out) is not Tensor:
        return f"output is a {type(out).__name__}: must be a plain torch.Tensor"
    if out.shape != q.shape or out.dtype != q.dtype:
        return f"output is {tuple(out.shape)} {out.dtype}: must be {tuple(q.shape)} {q.dtype}"
    if out.device != q.device:
        return f"output is on {out.device}: must be on {q.device} like q"
    memory = out.untyped_storage().data_ptr()
    if any(memory == x.untyped_storage().data_ptr() for x in inputs):
        return "output shares memory with q, k or v: it must have its own"
    return ""


def poison_free_memory(like: Tensor) -> None:
    """Fill memory that the next call may get with NaN.

    The blocks are as large as ``like``. A call that reads memory which it has not written, such as
    an earlier output, finds NaN there.
    """
    for block in [torch.empty_like(like, requires_grad=False) for _ in range(POISONED_BLOCKS)]:
        block.fill_(math.nan)
