"""The quantities of specification 5, measured on the inputs of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from danon.attention.union.op import observe_branches
from danon.bench.workload import Workload
from danon.measure.correctness import relative_error
from danon.measure.matrix_distance import dense_weights, distances, spread_rows

__all__ = ["bounds"]


def bounds(workload: Workload) -> dict[str, float]:
    """Distances from dense attention's matrix, and where the softmax mass goes, on sampled rows.

    Beside what :func:`danon.measure.matrix_distance.distances` gives:

    - ``delta``: ||X - X^|| / ||X||, root mean square of ``delta_keys`` and ``delta_values``;
    - ``mass_<branch>``: share of softmax mass of a branch of a union;
    - ``unexplained_output``: ||o - A^ v|| / ||o||, what of the output the matrix does not explain.

    Raises:
        ValueError: the output has no gradient in v.
    """
    q, k, v, module = workload.q, workload.k, workload.v, workload.module
    rows = spread_rows(workload.case.length).to(workload.device)
    out, shares = _observed(workload, rows)
    effective = module.effective_attention(q, k, v, rows)
    with torch.no_grad():
        dense = dense_weights(q, k, rows, causal=module.config.is_causal)
        metrics = distances(effective.weights, dense, effective.exact, q.shape[-1])
        values = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        metrics["unexplained_output"] = relative_error(effective.weights @ values, out)
    if effective.pooling_loss is not None:
        keys, of_values = effective.pooling_loss
        metrics |= {"delta_keys": keys, "delta_values": of_values}
        metrics["delta"] = math.sqrt((keys**2 + of_values**2) / 2)
    return metrics | {f"mass_{name.replace(' ', '_')}": x for name, x in shares.items()}


def _observed(workload: Workload, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The attention's own output on the rows, and the mean share of mass of each branch."""
    shares: dict[str, float] = {}

    def watch(branches: Sequence[str], mass: Tensor) -> None:
        for name, share in zip(branches, mass[:, :, rows].mean((1, 2)).tolist(), strict=True):
            shares[name] = shares.get(name, 0.0) + share

    with torch.no_grad(), observe_branches(watch):
        out = workload.attend(workload.q, workload.k, workload.v)
    return out[:, :, rows], shares
