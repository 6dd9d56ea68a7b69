"""Distances from dense attention's matrix: the bounds of specification 5, measured on text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from danon.attention.union.op import observe_branches
from danon.bench.call_suite import CallSuite, Figures, has_definition, over_cap
from danon.bench.cost_forecast import CHECK_CALLS, GRADIENT_CALLS, SELF_CALLS
from danon.bench.profile import Profile
from danon.bench.suite import register
from danon.bench.verification import Correctness
from danon.bench.workload import Workload
from danon.measure.correctness import relative_error
from danon.measure.matrix_distance import dense_weights, distances, spread_rows
from danon.measure.threads import fewer_threads_beside_load
from danon.runs.case import Case
from danon.runs.suite_info import Metric

__all__ = ["Bounds", "bounds"]


@register
class Bounds(CallSuite):
    """Measures the quantities of specification 5 on one call."""

    name = "bounds"
    description = "Distances from dense attention's matrix, on rows spread over the length."
    order = 40
    grid_of = ""
    exponent = 1.0  # its rows are sampled
    metrics = (
        Metric(
            "eps",
            "‖Â - A‖ √(d / log n), the Frobenius norm of the whole n x n matrix",
            better="lower",
            note="specification 5.2: ‖Â - A‖ ≤ eps √(log n / d) for some eps: it must not grow "
            "with n",
            claimed=True,
            listed=False,
        ),
        Metric(
            "gamma",
            "‖Sparse(A) - A‖ / ‖A‖, Sparse(A): A where tokens are seen as themselves",
            better="lower",
            note="specification 5.2: at most some gamma; it is never above 1, so only growth says "
            "something",
            claimed=True,
            listed=False,
        ),
        Metric(
            "delta",
            "‖X - X̂‖ / ‖X‖ of keys and values, X̂ with nodes in place of their tokens",
            better="lower",
            note="specification 5.2: at most some delta; means are never above 1, so only growth "
            "says something",
            claimed=True,
            listed=False,
        ),
        Metric(
            "frobenius",
            "relative Frobenius error of the matrix",
            better="lower",
            label="‖Â - A‖ / ‖A‖",
            note="no claim; eps without the factor that grows with n",
            listed=False,
        ),
        Metric(
            "total_variation",
            "total variation of a row, half the sum of |Â - A|, the mean over rows",
            better="lower",
            label="TV",
            note="no claim; the mass that stands on other tokens than dense attention's",
            listed=False,
        ),
        Metric(
            "dense_mass_covered",
            "dense attention's mass on tokens that are seen as themselves",
            better="higher",
            label="covered",
            note="no claim; the more the better",
            listed=False,
        ),
        Metric(
            "unexplained_output",
            "‖o - Â v‖ / ‖o‖, what of the output o the matrix does not explain",
            better="lower",
            label="off Â",
            note="no claim; where it is large, by a state or values that pass a network, the rest "
            "says less",
            listed=False,
        ),
    )

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the expected seconds of a case: one pass, and the rows of the matrix."""
        return min(0.2 + 2e-4 * case.length, profile.cap(cls.name))

    def calls(self, case: Case) -> int:
        """Return 1: the noted seconds are those of a whole case."""
        return 1

    def expensive(self, workload: Workload, correctness: Correctness) -> str:
        """Return the reason if the backward pass of a float64 copy is too expensive; else empty."""
        case, cap_s = workload.case, self.profile.cap(self.name)
        if has_definition(case):
            return ""
        seconds = GRADIENT_CALLS * correctness.seconds / (CHECK_CALLS + SELF_CALLS)
        return over_cap(seconds, case.length, cap_s) if seconds > cap_s else ""

    def figures(self, workload: Workload, correctness: Correctness) -> Figures:
        """Measure the distances on one call."""
        start = perf_counter()
        with fewer_threads_beside_load(workload.device):
            metrics = bounds(workload)
        return metrics, {"candidate_s": [perf_counter() - start]}


def bounds(workload: Workload) -> dict[str, float]:
    """Return distances from dense attention's matrix, and the softmax mass of each branch.

    Added to the figures of :func:`danon.measure.matrix_distance.distances`:

    - ``delta``: ||X - X^|| / ||X||, root mean square of ``delta_keys`` and ``delta_values``;
    - ``mass_<branch>``: share of softmax mass of a branch of a union;
    - ``unexplained_output``: ||o - A^ v|| / ||o||, the part of the output that the
      matrix does not explain.

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
    """Return the attention's own output on the rows, and the mean share of mass of each branch."""
    shares: dict[str, float] = {}

    def watch(branches: Sequence[str], mass: Tensor) -> None:
        for name, share in zip(branches, mass[:, :, rows].mean((1, 2)).tolist(), strict=True):
            shares[name] = shares.get(name, 0.0) + share

    with torch.no_grad(), observe_branches(watch):
        out = workload.attend(workload.q, workload.k, workload.v)
    return out[:, :, rows], shares
