"""Runs made from a stored one: the same code measured again, with noise and a planted change."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from danon.runs.case import Case, CaseResult
from danon.runs.journal import RecordedRun

REFERENCE_RUN = Path(__file__).parents[1] / "results" / "reference" / "cpu-quick-lookup"
QUIET = 0.02
"""Deviation between two runs of a machine that does nothing else."""
BUSY = 0.04
"""Deviation between recorded runs of one code and machine, most cases; a few differ by far more."""


@functools.cache
def stored() -> RecordedRun:
    """Return the timed cases of a reference run."""
    run = RecordedRun.read(REFERENCE_RUN)
    timed = [x for x in run.results if x.case.suite in ("speed", "decode")]
    return dataclasses.replace(run, results=timed)


def again(
    run: RecordedRun, change: Callable[[CaseResult], CaseResult | None], run_id: str = "again"
) -> RecordedRun:
    """Return another run with changed results; None leaves a case out."""
    results = [changed for x in run.results if (changed := change(x)) is not None]
    return dataclasses.replace(
        run, results=results, info=dataclasses.replace(run.info, run_id=run_id)
    )


def slower(result: CaseResult, factor: float) -> CaseResult:
    """Return a result that takes so many times as long."""
    names = ("time_ratio", "time_ratio_low", "time_ratio_high", "time_s")
    times = {name: result.metrics[name] * factor for name in names if name in result.metrics}
    return dataclasses.replace(result, metrics={**result.metrics, **times})


def measured_again(
    seed: int, deviation: float, tails: float = math.inf, planted: Case | None = None
) -> RecordedRun:
    """Return the stored run as it may be measured again.

    Args:
        seed: of the noise.
        deviation: of the noise between runs, in logarithms.
        tails: degrees of freedom of the noise; 3 has a case of a hundred at six deviations.
        planted: case that takes 20 % longer.
    """
    generator = np.random.default_rng(seed)

    def noisy(result: CaseResult) -> CaseResult:
        draw = generator.standard_normal()
        if math.isfinite(tails):
            draw /= math.sqrt(generator.chisquare(tails) / tails)
        planted_factor = 1.2 if result.case == planted else 1.0
        return slower(result, planted_factor * math.exp(deviation * draw))

    return again(stored(), noisy, f"again-{seed}")
