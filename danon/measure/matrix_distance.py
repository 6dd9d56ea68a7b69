"""How far an effective attention matrix is from dense attention's, on some rows of it.

Shapes: weights and dense (B, H, R, N) float64, the rows R of an N x N matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dense_weights", "distances", "spread_rows"]

ROUNDING = 1e-9
"""What is smaller is zero: both matrices are float64, their difference is not exact."""


def spread_rows(length: int, count: int = 64, *, seed: int = 0) -> Tensor:
    """One random row of each of ``count`` equal stretches, (R,) int64; all rows of short inputs.

    So a sum over them times length / R is an unbiased estimate of the sum over all rows.
    """
    if length <= count:
        return torch.arange(length)
    edge = torch.arange(count + 1) * length // count
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(count, generator=g, dtype=torch.float32)
    return edge[:-1] + (place * (edge[1:] - edge[:-1])).long()


def dense_weights(q: Tensor, k: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
    """Dense attention's matrix A of q (B, H, N, D) and k (B, G, N, D): (B, H, R, N) float64."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits: Tensor = q[:, :, rows].double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        later = torch.arange(k.shape[2], device=k.device) > rows.to(k.device)[:, None]
        logits = logits.masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def distances(
    weights: Tensor, dense: Tensor, exact: Tensor | None, head_dim: int
) -> dict[str, float]:
    """Specification 5.2 on these rows, means over heads.

    - ``eps``: ||A^ - A||_F sqrt(d / log n), the norm estimated for all n rows;
    - ``frobenius``: ||A^ - A||_F / ||A||_F;
    - ``total_variation``: of a row, half the sum of |A^ - A|, the mean over rows. Mass that A^
      has on no token counts as on one more token, which dense attention gives none;
    - with ``exact``: ``gamma``: ||Sparse(A) - A||_F / ||A||_F, Sparse(A) what A has on tokens
      that are seen as themselves, not renormalised; ``dense_mass_covered``: the sum of that, mean
      over rows.

    Args:
        exact: bool, as broad as the weights, or None where no token is seen as itself.
        head_dim: d.
    """
    n, rows = weights.shape[-1], weights.shape[-2]
    gap = weights - dense
    away, whole = _norm(gap), _norm(dense)
    nowhere = (weights.sum(-1) - 1).abs()
    scale = math.sqrt(n / rows * head_dim / math.log(max(n, 2)))
    found = {
        "eps": float(away.mean()) * scale,
        "frobenius": float((away / whole).mean()),
        "total_variation": float((gap.abs().sum(-1) + nowhere).mean()) / 2,
    }
    if exact is not None:
        unseen = dense.masked_fill(exact, 0.0)
        found["gamma"] = float((_norm(unseen) / whole).mean())
        found["dense_mass_covered"] = 1 - float(unseen.sum(-1).mean())
    return {name: 0.0 if abs(x) < ROUNDING else x for name, x in found.items()}


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each head's rows: (B, H)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm
