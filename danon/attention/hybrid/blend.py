"""The weighted sum of a blend, its loss terms, and the names of its branches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from danon.attention.union.op import observe_branches, observer

__all__ = ["label_branches", "loss_terms", "weighted_sum"]


def loss_terms(
    beta: Tensor,
    w: Tensor,
    start: Tensor,
    mask: Tensor | None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return L_div and L_reg (specification 4.2), means over examples of their real queries.

    By example, so that the loss of a batch is the mean of its examples' losses, wherever they are
    computed; the entropy of a mean over the batch is not.

    Args:
        beta: (B, H, N, M) of M mechanisms.
        w: (B, H, N, M) their weights.
        start: (M,), what beta starts from.
        mask: (B, N) padding, or None.
        total: sums a tensor over the processes that have other queries of the examples; None: these
            are all.
    """
    real = torch.ones_like(w[:, :, :, 0]) if mask is None else mask.to(w)[:, None]
    real = real.expand(w.shape[:3])[..., None]
    away = ((beta - start.to(beta)).square() * real).sum((1, 2, 3))
    sums = torch.cat(((w * real).sum((1, 2)), real.sum((1, 2)), away[:, None]), -1)
    sums = sums if total is None else total(sums)
    count = sums[:, -2:-1].clamp_min(1)  # (B, 1)
    mean = sums[:, :-2] / count  # (B, M)
    entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(-1)
    # An example without a query has no weights, and nothing to keep in use.
    missing = math.log(w.shape[-1]) - entropy.where(mean.sum(-1) > 0, math.log(w.shape[-1]))
    return missing.mean(), (sums[:, -1] / (count[:, 0] * w.shape[-1])).mean()


def weighted_sum(parts: list[Tensor], w: Tensor) -> Tensor:
    """Return sum_i w_i o_i of outputs (..., D) and weights (..., M), in the dtype of w."""
    out = w[..., :1] * parts[0]
    for i, part in enumerate(parts[1:], start=1):
        out = out + w[..., i : i + 1] * part
    return out


@contextlib.contextmanager
def label_branches(name: str, share: Tensor | None) -> Iterator[None]:
    """Report the softmax mass of a mechanism's branches as ``name.branch``, times share (X, N)."""
    outer = observer()
    if outer is None:
        yield
        return

    def watch(branches: Sequence[str], mass: Tensor) -> None:
        part = mass if share is None else mass * share.detach()
        outer([f"{name}.{branch}" for branch in branches], part)

    with observe_branches(watch):
        yield
