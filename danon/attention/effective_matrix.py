"""The effective attention matrix, and the tokens in it that are seen one by one.

Shapes: q (B, H, N, D), k and v (B, G, N, D), rows (R,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["EffectiveAttention", "Level", "near_tokens", "pooling_loss", "value_weights"]


@dataclass(frozen=True)
class EffectiveAttention:
    """Effective attention of some queries over the tokens.

    Attributes:
        weights: the effective attention matrix, (B, H, R, N) float64: how much of the value of
            token j is in the output of row i, with all that decides it held fixed.
        exact: bool, as broad: tokens that a row sees as themselves, not through a summary of
            several. None where no token is, or nobody can tell.
        pooling_loss: ||X - X^|| / ||X|| of keys, and of values: X are the tokens that the rows see,
            in X^ those under a node are the node. None if nothing is pooled into nodes.
    """

    weights: Tensor
    exact: Tensor | None
    pooling_loss: tuple[float, float] | None = None


class Level(NamedTuple):
    """Nodes over ``span`` tokens each.

    Attributes:
        k: keys (B, G, m, D) float64; v values, the same.
        seen: which of them rows see, bool, broadcastable to (B, G, R, m).
    """

    k: Tensor
    v: Tensor
    span: int
    seen: Tensor


def value_weights(oracle: Callable[[Tensor], Tensor], v: Tensor, heads: int) -> Tensor:
    """Return d o_i / d v_j of an output that is linear in the values, column by column.

    Each column of the values carries one row: D rows of the matrix in one backward pass. What else
    depends on the values moves with them: learned pooling scores, once they are not zero.

    Args:
        oracle: values -> (B, H, R, D) float64, differentiable.
        v: (B, G, N, D).
        heads: H.

    Returns:
        (B, H, R, N) float64.

    Raises:
        ValueError: the output does not depend on v by a gradient.
    """
    v = v.detach().double().requires_grad_()
    with torch.enable_grad():
        out = oracle(v)
    (B, _, R, D), group = out.shape, heads // v.shape[1]
    weights = v.new_zeros(B, heads, R, v.shape[2])
    for head in range(group):  # the heads of a group would add up
        for first in range(0, R, D):
            at = torch.arange(first, min(first + D, R), device=v.device)
            up = torch.zeros_like(out)
            up[:, head::group, at, at - first] = 1.0
            gradient = None
            if out.requires_grad:
                (gradient,) = torch.autograd.grad(out, v, up, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise ValueError("the output has no gradient in v, from which the matrix is read")
            weights[:, head::group, at] = gradient[..., : len(at)].transpose(-1, -2)
    return weights


def near_tokens(rows: Tensor, length: int, window: int, sinks: int, causal: bool) -> Tensor:
    """Return bool (R, N): the first tokens, and the block of each row and those beside it."""
    i, j = rows[:, None], torch.arange(length, device=rows.device)
    row_block, token_block = (
        (i - sinks).clamp_min(0) // window,
        (j - sinks).div(window, rounding_mode="floor"),
    )
    near = (j < sinks) | ((token_block - row_block).abs() <= 1)
    return near & (j <= i) if causal else near


def pooling_loss(
    k: Tensor, v: Tensor, levels: Sequence[Level], rows: Tensor, sinks: int, causal: bool
) -> tuple[float, float]:
    """Compute :attr:`EffectiveAttention.pooling_loss` of rows.

    They see every token once, as itself or under a node.

    Args:
        k: (B, G, N, D); v the same.
        v: (B, G, N, D).
        levels: nodes over the tokens past the first ``sinks``.
        rows: query positions (R,).
        sinks: first tokens, which are under no node.
        causal: rows see no later token.
    """
    losses = []
    for tokens, name in ((k.double(), "k"), (v.double(), "v")):
        size = tokens.square().sum(-1).cumsum(-1)  # (B, G, N)
        whole = float(size[..., rows].sum() if causal else size[..., -1].sum() * len(rows))
        gaps = sum(
            float(
                (
                    _gaps(tokens[:, :, sinks:], getattr(level, name), level.span)[:, :, None]
                    * level.seen
                ).sum()
            )
            for level in levels
        )
        losses.append(math.sqrt(gaps / whole) if whole else 0.0)
    return losses[0], losses[1]


def _gaps(tokens: Tensor, nodes: Tensor, span: int) -> Tensor:
    """Sum squared distances of tokens (B, G, n, D) from their node (B, G, m, D): (B, G, m)."""
    n, m = tokens.shape[2], nodes.shape[2]
    gap = (tokens - nodes.repeat_interleave(span, 2)[:, :, :n]).square().sum(-1)
    under: Tensor = F.pad(gap, (0, m * span - n)).unflatten(2, (m, span))
    return under.sum(-1)
