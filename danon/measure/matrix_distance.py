"""Distances of an effective attention matrix from dense attention's, on some of its rows.

Shapes: weights and dense (B, H, R, N) float64, the rows R of an N x N matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dense_weights", "distances", "spread_rows"]

ROUNDING = 1e-9
"""Smaller distances are zero: both matrices are float64, their difference is not exact."""


def spread_rows(length: int, count: int = 64, *, seed: int = 0) -> Tensor:
    """Draw one row from each of ``count`` equal stretches, (R,) int64; all rows of short inputs.

    A sum over them times length / R is an unbiased estimate of the sum over all rows.

    Args:
        length: tokens N.
        count: rows R.
        seed: of the draw.
    """
    if length <= count:
        return torch.arange(length)
    edge = torch.arange(count + 1) * length // count
    generator = torch.Generator().manual_seed(seed)
    fraction = torch.rand(count, generator=generator, dtype=torch.float32)
    return edge[:-1] + (fraction * (edge[1:] - edge[:-1])).long()


def dense_weights(q: Tensor, k: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
    """Compute rows of dense attention's matrix A.

    Args:
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        rows: positions (R,).
        causal: a query sees no later token.

    Returns:
        (B, H, R, N) float64.
    """
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits: Tensor = q[:, :, rows].double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        later = torch.arange(k.shape[2], device=k.device) > rows.to(k.device)[:, None]
        logits = logits.masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def distances(
    weights: Tensor, dense: Tensor, exact: Tensor | None, head_dim: int
) -> dict[str, float]:
    """Measure the distances of the specification's section 5.2 on these rows, means over heads.

    - ``eps``: ||A^ - A||_F sqrt(d / log n), the norm estimated for all n rows;
    - ``frobenius``: ||A^ - A||_F / ||A||_F;
    - ``total_variation``: of a row, half the sum of |A^ - A|, the mean over rows. Mass that A^
      has on no token counts as on one more token, which dense attention gives none;
    - with ``exact``: ``gamma``: ||Sparse(A) - A||_F / ||A||_F. Sparse(A) is A on the tokens that
      are seen as themselves, not renormalised;
    - with ``exact``: ``dense_mass_covered``: the sum of Sparse(A) over a row, the mean over rows.

    Args:
        weights: the effective matrix A^, (B, H, R, N) float64.
        dense: dense attention's matrix A, (B, H, R, N) float64.
        exact: bool, as broad as the weights: tokens that are seen as themselves. None: there are
            none.
        head_dim: d.

    Returns:
        Distances by name.
    """
    n, rows = weights.shape[-1], weights.shape[-2]
    gap = weights - dense
    away, whole = _norm(gap), _norm(dense)
    nowhere = (weights.sum(-1) - 1).abs()
    scale = math.sqrt(n / rows * head_dim / math.log(max(n, 2)))
    by_name = {
        "eps": float(away.mean()) * scale,
        "frobenius": float((away / whole).mean()),
        "total_variation": float((gap.abs().sum(-1) + nowhere).mean()) / 2,
    }
    if exact is not None:
        unseen = dense.masked_fill(exact, 0.0)
        by_name["gamma"] = float((_norm(unseen) / whole).mean())
        by_name["dense_mass_covered"] = 1 - float(unseen.sum(-1).mean())
    return {name: 0.0 if abs(x) < ROUNDING else x for name, x in by_name.items()}


def _norm(x: Tensor) -> Tensor:
    """Return the Frobenius norm of each head's rows: (B, H)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm
