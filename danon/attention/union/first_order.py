"""Gradients of kernels that have no second derivative: an error instead of a silent zero.

A backward pass in foreign kernels is for autograd a constant, unless somebody says what it depends
on. PyTorch's ``once_differentiable`` says so only where an upstream gradient requires a gradient:
that of a plain sum does not, and a penalty on gradients then adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order_only", "without_second"]


class _Once(torch.autograd.Function):
    """Hands gradients on, and raises when somebody differentiates them."""

    @staticmethod
    def forward(ctx: Any, words: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.words = words
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(ctx.words)


def without_second(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], words: str
) -> list[Tensor | None]:
    """Return gradients whose own gradient, in any of the inputs, is an error.

    Args:
        grads: what a backward pass found.
        inputs: all that they were made of.
        words: of the error: what has no second derivative, and what has.
    """
    there = [x for x in grads if x is not None]
    given = (x for x in inputs if x is not None)
    made = iter(_Once.apply(words, len(there), *there, *given))  # type: ignore[no-untyped-call]
    return [None if x is None else next(made) for x in grads]


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, words: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.words = words
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, *grads
        return None, *without_second(grads, (*grads, *ctx.saved_tensors), ctx.words)


def first_order_only(words: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors for a kernel whose backward pass cannot be differentiated.

    Args:
        words: of the error that doing so becomes.
        tensors: the kernel's inputs.
    """
    guarded: tuple[Tensor, ...] = _Guard.apply(words, *tensors)  # type: ignore[no-untyped-call]
    return guarded
