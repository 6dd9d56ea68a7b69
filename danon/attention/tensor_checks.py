"""Tensors that our attentions cannot compute with, refused in words that say what to use."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["refuse_meta", "refuse_transforms"]


def refuse_transforms(*grads: Tensor | None) -> None:
    """Refuse to run inside a transform of torch.func, or on batched gradients.

    Args:
        grads: gradients that a backward pass was given.

    Raises:
        ValueError: says what to use.
    """
    if torch.compiler.is_compiling():
        return
    batched = torch._C._functorch.is_legacy_batchedtensor
    if torch._C._are_functorch_transforms_active() or any(
        x is not None and batched(x) for x in grads
    ):
        raise ValueError(
            "torch.func.grad, vmap, jvp and batched gradients: attention kernels know none of "
            "them; use torch.autograd.grad, for gradients of each sample once per sample, and give "
            "batches as dimension B"
        )


def refuse_meta(name: str, x: Tensor) -> None:
    """Refuse a tensor without values.

    Raises:
        ValueError: names the tensor, and says what to use.
    """
    if x.is_meta:
        raise ValueError(
            f"{name} is on meta, where there are no values: must have some, since they decide what "
            "is seen; for shapes alone, the output of an attention is like q"
        )
