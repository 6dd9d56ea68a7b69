"""UCSA's error detection (specification 3.3): which nodes pooling made worse than usual.

The relative error of a node is the rms distance of its tokens' keys from the node's key over their
rms length, tokens weighted as in pooling. With m the mean of their squared lengths,

    e^2 = (m - |key|^2) / m,

so it costs one number per node to carry along. An error below ``error_tolerance`` counts as zero.

mu and sigma are the mean and the deviation of e over the nodes of the same level that lie in the
far past of a block of queries (over the whole sequence when bidirectional): the running statistics
of the specification with t the place in the sequence and equal weights. Being a matter of the
sequence alone they show no query a later token, need no training, are the same when a forward pass
is repeated by gradient checkpointing, and a stream carries them along as three sums per node.
Statistics over training steps would have none of the last three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from danon.attention.ucsa.tree import Far, Tree
from danon.attention.union.tiles import Rows
from danon.config import UCSAConfig

__all__ = ["Verdict", "classify_nodes", "relative_error", "running_sums", "squared_length"]

NO_TOKENS = -1.0
"""Error of a node without a token: neither lossless nor large, and not counted."""


class Verdict(NamedTuple):
    """Bool (T, X, k) of nodes, or None where nothing is asked."""

    lossless: Tensor | None
    forced: Tensor | None


def squared_length(k: Tensor) -> Tensor:
    """Return |k|^2 (X, n) float32 or wider of keys (X, n, D)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(k.detach(), dim=-1, dtype=wide)
    return length.square()


def relative_error(square: Tensor, key: Tensor, mass: Tensor | None, tolerance: float) -> Tensor:
    """Return the relative error e of nodes (X, n).

    Args:
        square: mean squared length of the keys under each node (X, n).
        key: of the nodes (X, n, D).
        mass: tokens under each node (X, n); None where all have some.
        tolerance: see ``UCSAConfig.error_tolerance``.
    """
    tiny = torch.finfo(square.dtype).tiny
    e2 = (square - squared_length(key)) / square.clamp_min(tiny)
    e = torch.where(e2 < tolerance * tolerance, 0.0, e2.clamp_min(0).sqrt())
    return e if mass is None else torch.where(mass > 0, e, NO_TOKENS)


def running_sums(e: Tensor, before: Tensor | None = None) -> Tensor:
    """Return count, sum and sum of squares of errors (X, n) up to each: (X, n, 3) float64.

    Args:
        e: errors (X, n).
        before: the sums (X, 3) up to the node before the first of these.
    """
    e = e.double()
    counted = (e >= 0).double()
    sums = torch.stack((counted, e * counted, e * e * counted), -1).cumsum(1)
    return sums if before is None else sums + before[:, None]


def classify_nodes(c: UCSAConfig, tree: Tree, level: int, node: Tensor, far: Far) -> Verdict:
    """Classify nodes (T, X, k) by their errors.

    Args:
        c: the configuration.
        tree: holds errors and their running sums.
        level: of the nodes.
        node: numbers (T, X, k).
        far: leaves outside the near windows of the T blocks of queries.

    Returns:
        lossless: e below ``error_tolerance``; forced: e above mu + alpha sigma.
    """
    if not tree.error:
        return Verdict(None, None)
    e = Rows(tree.row(level, node)).load(tree.error[level], 0, len(node))
    lossless = e == 0 if c.error_tolerance else None
    if not tree.sums:
        return Verdict(lossless, None)
    whole = ((far.a if c.is_causal else far.n) // c.fanout**level).expand(node.shape[:2])
    last = tree.row(level, whole - 1).T[..., None].expand(-1, -1, 3)
    count, total, squares = tree.sums[level].gather(1, last).transpose(0, 1).unbind(-1)
    mean = total / count.clamp_min(1)
    deviation = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
    assert c.error_alpha is not None
    limit = mean + c.error_alpha * deviation
    limit = limit.masked_fill((whole <= 0) | (count == 0), torch.inf)
    return Verdict(lossless, e.double() > limit[..., None])
