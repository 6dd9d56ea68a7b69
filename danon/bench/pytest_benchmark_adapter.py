"""Adapter that hands our own samples to pytest-benchmark, for its file format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from danon.runs.case import CaseResult

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["CLOCK", "replay"]


class ReplayClock:
    """A timer that reads recorded samples: start at zero, stop at the sample, round by round."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._readings = iter([reading for s in samples for reading in (0.0, s)])

    def __repr__(self) -> str:  # stands in pytest-benchmark's JSON
        return "samples of danon.measure"

    def __call__(self) -> float:
        return next(self._readings)


CLOCK = ReplayClock()
"""The ``timer`` of every test; pytest-benchmark reads this setting before the test runs."""


def replay(result: CaseResult, samples: list[float], benchmark: BenchmarkFixture) -> None:
    """Hand samples to pytest-benchmark, and the metrics as its ``extra_info``.

    A group has the attentions that its compare shows side by side, by their names.

    Args:
        result: result of the case.
        samples: seconds of each call.
        benchmark: the fixture.
    """
    case = result.case
    suite = f"{case.suite} " if case.suite != case.phase else ""
    benchmark.group = f"{suite}{case.phase} {case.dtype} N{case.length} {case.device}"
    benchmark.name = case.attention
    benchmark.extra_info.update(
        attention=case.attention, semantics=result.semantics, check=result.check, **result.metrics
    )
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))
