"""Which choices of a study are best, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from scipy import stats

from danon.tuning.goal import BALANCED, FIGURES, FLOOR, Goal
from danon.tuning.study import figures_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = ["REPEATS", "Candidate", "best", "candidates", "front", "unclear"]

REPEATS = 4
"""Measurements of a choice, each in a process of its own, beside the one that it was chosen by."""
CLOSE = 0.05
"""What is worse by a smaller share may be as good."""
MOST = 6
"""Choices that are measured again, at most."""
SAME = 0.01
"""Errors that differ by less are the same quality."""


@dataclass
class Candidate:
    """A choice and its measurements.

    Attributes:
        number: of the trial that measured it first; so is ``first``.
        repeats: figures of later ones, which nobody chose it by.
    """

    number: int
    choice: Mapping[str, Any]
    first: Mapping[str, float]
    repeats: list[Mapping[str, float]] = field(default_factory=list)

    def figure(self, name: str) -> float:
        """Mean over the repeats, of ratios the geometric one; of the first where there are none."""
        return self._mean(lambda some: some[name], log="_ratio" in name)

    def _mean(self, of: Callable[[Mapping[str, float]], float], *, log: bool) -> float:
        values = [of(some) for some in self.repeats or [self.first]]
        return math.exp(fmean(map(math.log, values))) if log else fmean(values)

    def score(self, goal: Goal) -> float:
        """Balanced."""
        return self._mean(goal.score, log=True)

    def interval(self, goal: Goal) -> tuple[float, float]:
        """Of the score, 95 % (Student's t over the repeats); without repeats there is none."""
        logs = [math.log(goal.score(some)) for some in self.repeats]
        if len(logs) < 2:
            return 0.0, math.inf
        half = stats.t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)

    @property
    def quality_kept(self) -> bool:
        """No worse than the default settings."""
        lost = self._mean(lambda some: some["error"] - some["error_default"], log=False)
        return lost <= SAME


def candidates(trials: Iterable[FrozenTrial]) -> list[Candidate]:
    """Of complete trials, by the order of their first."""
    from optuna.trial import TrialState

    found: dict[str, Candidate] = {}
    for trial in trials:
        if trial.state != TrialState.COMPLETE:
            continue
        key, figures = json.dumps(trial.params, sort_keys=True), figures_of(trial)
        if key not in found:
            found[key] = Candidate(trial.number, trial.params, figures)
        elif "again" in trial.user_attrs:
            found[key].repeats.append(figures)
    return list(found.values())


def front(some: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Those within the limits that no other one beats in all objectives."""
    known = _within(some, goal)
    logs = {c.number: [math.log(_figure(c, name, goal)) for name in goal.objectives] for c in known}

    def beaten(c: Candidate) -> bool:
        gaps = (
            [a - b for a, b in zip(logs[c.number], other, strict=True)]
            for number, other in logs.items() if number != c.number
        )  # fmt: skip
        return any(min(gap) >= 0 and max(gap) > 0 for gap in gaps)

    return [c for c in known if not beaten(c)]


def unclear(some: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Those that may be the best for something and have too few repeats to be reported.

    By what was measured first alone: repeated, the luckiest fall back behind others, and so on.
    """
    before = [replace(c, repeats=[]) for c in some]
    found: dict[int, Candidate] = {}
    for name, ranked in _ranked(_within(before, goal), goal).items():
        least = _figure(ranked[0], name, goal)
        close = [c for c in ranked if _figure(c, name, goal) <= least * (1 + CLOSE)]
        found |= {c.number: c for c in close[: MOST if goal.single else 2]}
    return [c for c in some if c.number in found and len(c.repeats) < REPEATS]


def best(some: Sequence[Candidate], goal: Goal) -> dict[str, Candidate]:
    """The best choice for each goal that the study was after; repeated ones alone, if there are.

    ``speed`` and ``memory``: of those whose quality is no worse than the default settings';
    ``quality``: of those that are not slower; ``balanced``: by the score. A limit of the study
    takes the place of that.
    """
    known = _within(some, goal)
    known = [c for c in known if c.repeats] or known
    return {name: ranked[0] for name, ranked in _ranked(known, goal).items()}


def _ranked(some: Sequence[Candidate], goal: Goal) -> dict[str, list[Candidate]]:
    """For each goal those that it may be given to, the best first."""
    free = "quality" in goal.limits or "quality" not in goal.known
    kept = [c for c in some if free or c.quality_kept]
    fast = [c for c in some if "speed" in goal.limits or c.figure("time_ratio") <= 1 + CLOSE]
    eligible = {"speed": kept, "memory": kept, "quality": fast, BALANCED: some}
    wanted = goal.objectives if goal.single else (*goal.objectives, BALANCED)
    return {
        name: sorted(eligible[name], key=partial(_figure, name=name, goal=goal))
        for name in wanted if eligible[name]
    }  # fmt: skip


def _figure(c: Candidate, name: str, goal: Goal) -> float:
    return c.score(goal) if name == BALANCED else max(c.figure(FIGURES[name]), FLOOR)


def _within(some: Iterable[Candidate], goal: Goal) -> list[Candidate]:
    return [
        c for c in some
        if all(c.figure(FIGURES[name]) <= bound for name, bound in goal.limits.items())
    ]  # fmt: skip
