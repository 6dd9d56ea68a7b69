"""Which choices of a study are best, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from scipy import stats

from danon.report import pareto
from danon.tuning.objective import BALANCED, CLOSE, FLOOR, SAME, Objective
from danon.tuning.study import figures_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = ["CHOOSING", "REPEATS", "Candidate", "best", "candidates", "near_best", "pareto_front"]

CHOOSING = 2
"""Repeats that the best one of the close ones is chosen by."""
REPEATS = 6
"""Measurements of the best one beside the first; those that it was not chosen by are reported."""
MOST = 6
"""Choices that are measured again, at most, for each goal of a study."""


@dataclass
class Candidate:
    """A choice and its measurements.

    Attributes:
        number: of the trial that measured it first; so is ``first``.
        repeats: figures of later ones, each from a process of its own.
        origin: commit and machine of the last measurement.
    """

    number: int
    choice: Mapping[str, Any]
    first: Mapping[str, float]
    repeats: list[Mapping[str, float]] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reported(self) -> list[Mapping[str, float]]:
        """What it was not chosen by; where there is no such, what there is."""
        return self.repeats[CHOOSING:] or self.repeats or [self.first]

    @property
    def confirmed(self) -> bool:
        """Measured often enough to be reported."""
        return len(self.repeats) >= REPEATS

    def figures(self, *, choosing: bool = False) -> dict[str, float]:
        """Means, of ratios the geometric ones.

        Args:
            choosing: of the measurements to choose by, not of those to report.
        """
        some = (self.repeats[:CHOOSING] or [self.first]) if choosing else self.reported
        return {name: _mean([one[name] for one in some], name) for name in some[0]}

    def score(self, goal: Objective) -> float:
        """Balanced, over what is reported."""
        return math.exp(fmean(self._scores(goal)))

    def interval(self, goal: Objective) -> tuple[float, float]:
        """Of the score, 95 % (Student's t over what is reported); of one measurement, none."""
        logs = self._scores(goal)
        if len(logs) < 2:
            return 0.0, math.inf
        half = stats.t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)

    def _scores(self, goal: Objective) -> list[float]:
        return [math.log(goal.score(some)) for some in self.reported]


def candidates(trials: Iterable[FrozenTrial]) -> list[Candidate]:
    """Of complete trials, by the order of their first; without those that failed in a repeat."""
    from optuna.trial import TrialState

    found: dict[str, Candidate] = {}
    failed = set()
    for trial in trials:
        key, again = json.dumps(trial.params, sort_keys=True), "again" in trial.user_attrs
        if again and "error" in trial.user_attrs:
            failed.add(key)
        if trial.state != TrialState.COMPLETE:
            continue
        if key not in found:
            found[key] = Candidate(trial.number, trial.params, figures_of(trial))
        elif again:
            found[key].repeats.append(figures_of(trial))
        found[key].origin = trial.user_attrs.get("origin", {})
    return [c for key, c in found.items() if key not in failed]


def pareto_front(some: Sequence[Candidate], goal: Objective) -> list[Candidate]:
    """Return those within the limits that no other one dominates in the objectives."""
    by_number = {c.number: c for c in some if _within(c.figures(), goal, "")}
    points = {
        number: [_value(name, c.figures(), goal) for name in goal.objectives]
        for number, c in by_number.items()
    }
    return [by_number[number] for number in pareto.pareto_front(points)]


def near_best(some: Sequence[Candidate], goal: Objective) -> list[Candidate]:
    """Those that, measured once, may be the best for something."""
    first = {c.number: c.first for c in some}
    found = set()
    for name, ranked in _ranked(first, goal).items():
        least = _value(name, first[ranked[0]], goal)
        slack = SAME if name == "quality" else CLOSE * least
        near = [number for number in ranked if _value(name, first[number], goal) <= least + slack]
        found |= set(near[: MOST if goal.single else 2])
    return [c for c in some if c.number in found]


def best(some: Sequence[Candidate], goal: Objective) -> dict[str, Candidate]:
    """The best choice for each goal of the study; of those measured again, if there are such.

    ``speed`` and ``memory``: of those as exact as the default settings; ``quality``: of those as
    fast; ``balanced``: by the score.
    """
    again = [c for c in some if c.repeats] or some
    by_number = {c.number: c for c in again}
    figures = {c.number: c.figures(choosing=True) for c in again}
    return {name: by_number[ranked[0]] for name, ranked in _ranked(figures, goal).items()}


def _ranked(figures: Mapping[int, Mapping[str, float]], goal: Objective) -> dict[str, list[int]]:
    """For each goal those that it may be given to, the best first."""
    wanted = goal.objectives if goal.single else (*goal.objectives, BALANCED)
    found = {}
    for name in wanted:
        eligible = [n for n, some in figures.items() if _within(some, goal, name)]
        if eligible:
            by = partial(_of, figures, name, goal)
            found[name] = sorted(eligible, key=by)
    return found


def _of(
    figures: Mapping[int, Mapping[str, float]], name: str, goal: Objective, number: int
) -> float:
    return _value(name, figures[number], goal)


def _value(name: str, figures: Mapping[str, float], goal: Objective) -> float:
    return max(goal.value(name, figures), FLOOR if name == "quality" else 1e-12)


def _within(figures: Mapping[str, float], goal: Objective, objective: str) -> bool:
    return all(excess <= 0 for excess in goal.excess(figures, objective).values())


def _mean(values: Sequence[float], name: str) -> float:
    ratio = "_ratio" in name and min(values) > 0
    return math.exp(fmean(map(math.log, values))) if ratio else fmean(values)
