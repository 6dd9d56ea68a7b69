"""Exponents of time and memory in the length, fitted to figures of speed and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from danon.bench.profile import CaseGrid, Profile
from danon.bench.shapes import HEAD_DIM, HEADS
from danon.bench.suite import Suite, register, row_without_figures
from danon.measure.statistics import fit_exponent
from danon.runs.case import Case, CaseResult
from danon.runs.suite_info import Metric

__all__ = ["Scaling"]

MIN_LENGTHS = 3
"""Fewest lengths that an exponent is fitted to."""
FITTED = (("speed", "time_s", "time"), ("memory", "peak_bytes", "memory"))
"""Suite, metric, and the name of its exponent."""


@register
class Scaling(Suite):
    """Fits figures of other suites, and measures those that are missing."""

    name = "scaling"
    description = "Exponents of time and memory in the length."
    order = 50
    metrics = (
        Metric("time_exponent", "exponent of time in the length", better="lower", listed=False),
        Metric(
            "memory_exponent", "exponent of peak bytes in the length", better="lower", listed=False
        ),
    )

    @classmethod
    def cases(cls, profile: Profile, attention: str, device: str) -> Iterator[Case]:
        """Yield a case for each phase and dtype; its length is 0, since it has several."""
        for grid in profile.grids.get(cls.name, ()):
            for dtype in grid.dtypes:
                if profile.measures(attention, min(grid.lengths)):
                    yield Case(
                        cls.name,
                        attention,
                        0,
                        dtype,
                        grid.phase,
                        device,
                        heads=HEADS,
                        head_dim=HEAD_DIM,
                    )

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the expected seconds of a case: as a rule all its figures are measured already."""
        return 0.1

    def measure(self, case: Case) -> CaseResult:
        """Fit the exponents of time and memory."""
        metrics: dict[str, float] = {}
        config: dict[str, object] = {}
        semantics = ""
        for suite, metric, name in FITTED:
            results = self._results(case, suite)
            for status in ("failed", "unavailable", "over budget"):
                without = [r for r in results if r.status == status]
                measured = [r for r in results if r.status == "measured"]
                if without and (status == "failed" or len(measured) < MIN_LENGTHS):
                    reason = without[0].reason
                    if len(without) < len(results):
                        reason = f"{suite} at {without[0].case.length} tokens: {reason}"
                    return row_without_figures(case, status, reason)
            semantics, config = measured[0].semantics, measured[0].config
            values = [r.metrics[metric] for r in measured]
            if min(values) > 0:  # nothing allocated: no exponent
                fit = fit_exponent([r.case.length for r in measured], values)
                metrics |= {
                    f"{name}_exponent": fit.value,
                    f"{name}_exponent_low": fit.low,
                    f"{name}_exponent_high": fit.high,
                }
        return CaseResult(case, "measured", "", semantics, metrics, config=config)

    def _results(self, case: Case, suite: str) -> list[CaseResult]:
        """Return the results of a suite at the lengths that a case spans, short to long."""
        lengths = _grid(self.profile, case).lengths
        return [self.context.result(replace(case, suite=suite, length=n)) for n in lengths]


def _grid(profile: Profile, case: Case) -> CaseGrid:
    grids = profile.grids[Scaling.name]
    return next(g for g in grids if g.phase == case.phase and case.dtype in g.dtypes)
