"""UCSA's tree of pooled nodes, as its selection reads it.

A mean key says little of a node in which one token matters. So each node keeps, beside its key k,
the range r = max - min of its tokens' keys in each dimension, and a query scores it by

    s = (q.k + |q * r|) / sqrt(d) + log(mass).

With half ranges the second term would be the length of a typical way from the key to a corner of
the box around the tokens, and their sum of magnitudes in place of |q * r| the bound that Quest
(Tang et al. 2024) takes; docs/log.md has the figures that chose between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.union.tiles import Rows

__all__ = ["Bounds", "Far", "Tree", "widen"]

Bounds = Sequence[tuple[int, int, int]]
"""a, z and n of ``far_leaves``, for blocks of queries."""


class Far(NamedTuple):
    """Leaves [0, a) and [z, n) are outside the near window of T blocks of queries.

    int64 (T, X), or (T, 1) where all of the X rows are equally long.
    """

    a: Tensor
    z: Tensor
    n: Tensor

    @classmethod
    def of(cls, bounds: Bounds, device: torch.device, leaves: Tensor | None = None) -> Self:
        """Build from the bounds of the longest row and, if rows differ, the leaves (X,) of each."""
        by_block = torch.tensor(bounds, device=device).T[..., None]
        return cls(*(by_block if leaves is None else by_block.minimum(leaves)))

    @property
    def leaves(self) -> Tensor:
        """Number of leaves."""
        return self.a + self.n - self.z


@dataclass(frozen=True)
class Tree:
    """Nodes by level; level 0 are the leaves.

    Attributes:
        key: (X, n, D) float32 or wider, of each level.
        log_mass: (X, n) of each level.
        spread: squared ranges of the keys (X, n, D) of each level, in the dtype of the keys.
        first: the node in row 0 of each level.
        keep: nodes of a level that a bounded state holds on to, the last ones; None for all.
        error: relative pooling errors (X, n) of each level, see
            :mod:`danon.attention.ucsa.pooling_error`; empty where nobody asks for them.
        sums: their running sums (X, n, 3) float64 of each level; empty without ``error_alpha``.
    """

    key: Sequence[Tensor]
    log_mass: Sequence[Tensor]
    spread: Sequence[Tensor]
    first: Sequence[int]
    keep: int | None = None
    error: Sequence[Tensor] = ()
    sums: Sequence[Tensor] = ()

    def row(self, level: int, node: Tensor) -> Tensor:
        """Return rows of nodes; a node that does not exist, or not yet, gets another node's."""
        rows = self.key[level].shape[1]
        return (node - self.first[level]).clamp(0, max(0, rows - 1))

    def gather(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (T, X, k, D) and log(mass) (T, X, k) of nodes (T, X, k)."""
        rows = Rows(self.row(level, node))
        key, mass = self.key[level], self.log_mass[level]
        return rows.load(key, 0, rows.count), rows.load(mass, 0, rows.count)

    def scores(self, level: int, node: Tensor, q: Tensor, scale: float) -> Tensor:
        """Score nodes (T, X, k) for queries (T, X, Q, D): (T, X, Q, k)."""
        key, log_mass = self.gather(level, node)
        rows = Rows(self.row(level, node))
        spread = rows.load(self.spread[level], 0, rows.count)
        far = (q.square() @ spread.transpose(-1, -2)).sqrt_()
        return (q @ key.transpose(-1, -2)).add_(far).mul_(scale).add_(log_mass[:, :, None])

    def oldest(self, level: int, far: Tensor, fanout: int) -> Tensor:
        """Return the oldest node held of a level with ``far`` leaves far; it begins a parent."""
        if self.keep is None:
            return torch.zeros_like(far)
        last = (far // fanout**level - self.keep).clamp_min(0)
        first: Tensor = -(-last // fanout) * fanout
        return first


def widen(top: Tensor, bottom: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    """Return largest and smallest keys (X, m, D) of nodes of ``rate`` children (X, n, D).

    Children that do not exist or hold no token have -inf for the largest, inf for the smallest.
    """
    fill = -top.shape[1] % rate
    if fill:
        top = F.pad(top, (0, 0, 0, fill), value=-torch.inf)
        bottom = F.pad(bottom, (0, 0, 0, fill), value=torch.inf)
    return top.unflatten(1, (-1, rate)).amax(2), bottom.unflatten(1, (-1, rate)).amin(2)
