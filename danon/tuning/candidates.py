"""Candidates of a study: which choices are best, and how sure that is."""

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
from danon.tuning.objective import BALANCED, MIN_ERROR, SAME_ERROR, SLACK, Objective
from danon.tuning.study import ERROR, ORIGIN, REPEAT_OF, figures_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = [
    "CHOOSING_REPEATS",
    "REPEATS",
    "Candidate",
    "StudyResult",
    "best",
    "candidates",
    "near_best",
    "pareto_front",
]

CHOOSING_REPEATS = 2
"""Number of repeats by which the best of the near-best candidates is chosen."""
REPEATS = 6
"""Number of repeats of the best candidate; those that did not choose it are reported."""
MAX_REPEATED = 6
"""Largest number of candidates that are repeated for a single objective."""


@dataclass
class Candidate:
    """A choice and its measurements.

    Attributes:
        number: number of the trial that measured it first.
        choice: a value for each range of the space.
        first: figures of that trial.
        repeats: figures of later trials, each from a process of its own.
        origin: commit and machine of the last measurement.
    """

    number: int
    choice: Mapping[str, Any]
    first: Mapping[str, float]
    repeats: list[Mapping[str, float]] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reported(self) -> list[Mapping[str, float]]:
        """Figures of the measurements that did not choose it; without such, of all."""
        return self.repeats[CHOOSING_REPEATS:] or self.repeats or [self.first]

    @property
    def confirmed(self) -> bool:
        """True if it was measured often enough to be reported."""
        return len(self.repeats) >= REPEATS

    def figures(self, *, choosing: bool = False) -> dict[str, float]:
        """Return the mean figures, geometric means for ratios.

        Args:
            choosing: average the measurements to choose by, not those to report.
        """
        chosen_by = self.repeats[:CHOOSING_REPEATS] or [self.first]
        measurements = chosen_by if choosing else self.reported
        return {name: _mean([one[name] for one in measurements], name) for name in measurements[0]}

    def score(self, objective: Objective) -> float:
        """Return the balanced score of the reported measurements."""
        return math.exp(fmean(self._log_scores(objective)))

    def interval(self, objective: Objective) -> tuple[float, float]:
        """Return the score's 95 % interval (Student's t); (0, inf) for one measurement."""
        logs = self._log_scores(objective)
        if len(logs) < 2:
            return 0.0, math.inf
        half = stats.t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)

    def _log_scores(self, objective: Objective) -> list[float]:
        return [math.log(objective.score(figures)) for figures in self.reported]


@dataclass(frozen=True)
class StudyResult:
    """The candidates of a study and the best of them.

    Attributes:
        objective: figures to minimise, and limits to keep.
        candidates: in the order of their first trials; the first is the default choice.
        best: the best candidate, by the name of the objective.
    """

    objective: Objective
    candidates: Sequence[Candidate]
    best: Mapping[str, Candidate]

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial], objective: Objective) -> StudyResult:
        """Return the result that trials have so far."""
        measured = candidates(trials)
        return cls(objective, measured, best(measured, objective))

    @property
    def default(self) -> Candidate:
        """The choice that the study began with."""
        return self.candidates[0]

    @property
    def confirmed(self) -> dict[str, Candidate]:
        """Best candidates that were repeated often enough to be reported."""
        return {name: c for name, c in self.best.items() if c.confirmed}

    @property
    def front(self) -> list[Candidate]:
        """The best candidates of one objective, or the Pareto front of several."""
        if self.objective.single:
            return list(self.best.values())
        return pareto_front(self.candidates, self.objective)


def candidates(trials: Iterable[FrozenTrial]) -> list[Candidate]:
    """Return the candidates of complete trials, without those that failed in a repeat."""
    from optuna.trial import TrialState

    by_choice: dict[str, Candidate] = {}
    failed = set()
    for trial in trials:
        key, repeat = json.dumps(trial.params, sort_keys=True), REPEAT_OF in trial.user_attrs
        if repeat and ERROR in trial.user_attrs:
            failed.add(key)
        if trial.state != TrialState.COMPLETE:
            continue
        if key not in by_choice:
            by_choice[key] = Candidate(trial.number, trial.params, figures_of(trial))
        elif repeat:
            by_choice[key].repeats.append(figures_of(trial))
        by_choice[key].origin = trial.user_attrs.get(ORIGIN, {})
    return [c for key, c in by_choice.items() if key not in failed]


def pareto_front(measured: Sequence[Candidate], objective: Objective) -> list[Candidate]:
    """Return the candidates within the limits that no other one beats in all objectives."""
    by_number = {c.number: c for c in measured if _is_within(c.figures(), objective, "")}
    points = {
        number: [_value(name, c.figures(), objective) for name in objective.objectives]
        for number, c in by_number.items()
    }
    return [by_number[number] for number in pareto.pareto_front(points)]


def near_best(measured: Sequence[Candidate], objective: Objective) -> list[Candidate]:
    """Return the candidates that may be the best, given one noisy measurement of each."""
    first = {c.number: c.first for c in measured}
    near = set()
    for name, ranked in _ranked(first, objective).items():
        least = _value(name, first[ranked[0]], objective)
        slack = SAME_ERROR if name == "quality" else SLACK * least
        close = [n for n in ranked if _value(name, first[n], objective) <= least + slack]
        near |= set(close[: MAX_REPEATED if objective.single else 2])
    return [c for c in measured if c.number in near]


def best(measured: Sequence[Candidate], objective: Objective) -> dict[str, Candidate]:
    """Return the best candidate by the name of the objective, of repeated ones if there are such.

    ``speed`` and ``memory`` go to a candidate as exact as the default settings, ``quality`` to one
    as fast, and ``balanced`` by the score.
    """
    repeated = [c for c in measured if c.repeats] or measured
    by_number = {c.number: c for c in repeated}
    figures = {c.number: c.figures(choosing=True) for c in repeated}
    return {name: by_number[ranked[0]] for name, ranked in _ranked(figures, objective).items()}


def _ranked(
    figures: Mapping[int, Mapping[str, float]], objective: Objective
) -> dict[str, list[int]]:
    """Return for each objective the numbers of the eligible candidates, best first."""
    names = objective.objectives if objective.single else (*objective.objectives, BALANCED)
    ranked = {}
    for name in names:
        eligible = [n for n, measured in figures.items() if _is_within(measured, objective, name)]
        if eligible:
            ranked[name] = sorted(eligible, key=partial(_value_of, figures, name, objective))
    return ranked


def _value_of(
    figures: Mapping[int, Mapping[str, float]], name: str, objective: Objective, number: int
) -> float:
    return _value(name, figures[number], objective)


def _value(name: str, figures: Mapping[str, float], objective: Objective) -> float:
    return max(objective.value(name, figures), MIN_ERROR if name == "quality" else 1e-12)


def _is_within(figures: Mapping[str, float], objective: Objective, name: str) -> bool:
    return all(violation <= 0 for violation in objective.violations(figures, name).values())


def _mean(values: Sequence[float], name: str) -> float:
    ratio = "_ratio" in name and min(values) > 0
    return math.exp(fmean(map(math.log, values))) if ratio else fmean(values)
