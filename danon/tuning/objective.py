"""Objectives of a study, limits on their figures, and the balanced score of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "BALANCED",
    "FIGURES",
    "HEADINGS",
    "LABELS",
    "MIN_ERROR",
    "SAME_ERROR",
    "SAMPLERS",
    "SLACK",
    "Objective",
]

FIGURES = {
    "speed": "time_ratio",
    "memory": "memory_ratio",
    "quality": "error",
    "parameters": "parameters_ratio",
}
"""The figure of a trial that each objective minimises."""
HEADINGS = {"speed": "time", "memory": "memory", "quality": "error", "parameters": "parameters"}
"""The heading of each objective's column."""
LABELS = {
    "speed": "time over that of the default settings",
    "memory": "memory over that of the default settings",
    "quality": "share of wrong answers",
    "parameters": "parameters over those of the default settings",
}
"""The label of each objective's axis."""
BALANCED = "balanced"
SAMPLERS = ("tpe", "random")
"""Ways to draw the next choice, Optuna's."""
MIN_ERROR = 0.01
"""Share added to wrong and to right answers: without it, half of no error is twice as good."""
SLACK = 0.05
"""Relative difference below which a noisy figure may be as good as another."""
SAME_ERROR = 0.01
"""Difference below which two errors are the same quality."""


@dataclass(frozen=True)
class Objective:
    """The figures that a study minimises, and the limits that it keeps.

    Attributes:
        objectives: keys of :data:`FIGURES`, or ``balanced`` alone.
        limits: largest allowed figure, by objective.
        available: objectives that the study has figures of.
    """

    objectives: tuple[str, ...]
    limits: Mapping[str, float]
    available: tuple[str, ...] = ("speed", "memory", "quality")

    @classmethod
    def parse(cls, objectives: str, limits: Sequence[str], available: Sequence[str]) -> Objective:
        """Read options such as ``speed,memory`` and ``quality=0.05``.

        Args:
            objectives: names, comma separated.
            limits: each a name, ``=`` and a number.
            available: objectives that the study has figures of.

        Raises:
            ValueError: an unknown objective, or a limit that is no number; says which.
        """
        named = tuple(dict.fromkeys(w.strip() for w in objectives.split(",") if w.strip()))
        allowed = (*available, BALANCED)
        for name in named:
            if name not in allowed:
                raise ValueError(f"--objective {name!r}: must be of {', '.join(allowed)}")
        if not named or (BALANCED in named and len(named) > 1):
            raise ValueError(
                f"--objective {objectives!r}: must name some of {', '.join(available)}, or "
                f"{BALANCED} alone"
            )
        bounds: dict[str, float] = {}
        for text in limits:
            name, _, bound = text.partition("=")
            try:
                value = float(bound)
            except ValueError:
                value = math.nan
            if name not in available or not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"--limit {text!r}: must be {' or '.join(f'{n}=NUMBER' for n in available)}, "
                    "a number > 0"
                )
            bounds[name] = value
        return cls(named, bounds, tuple(available))

    @property
    def single(self) -> bool:
        """True if one number ranks the trials."""
        return len(self.objectives) == 1

    def values(self, figures: Mapping[str, float]) -> list[float]:
        """Return the values that the sampler minimises, one an objective.

        Args:
            figures: figures of a trial.

        Raises:
            ValueError: a figure that is not a finite number; says which.
        """
        values = [self.value(name, figures) for name in self.objectives]
        for name, value in zip(self.objectives, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"objective {name} is {value}")
        return values

    def value(self, name: str, figures: Mapping[str, float]) -> float:
        """Return the value of one objective."""
        return self.score(figures) if name == BALANCED else figures[FIGURES[name]]

    def violations(self, figures: Mapping[str, float], name: str = "") -> dict[str, float]:
        """Return by how much each constraint is violated; a value <= 0 is no violation.

        Beside the limits, the best choice for ``quality`` must be as fast as the default settings.
        The best for any other objective must be as exact. A limit of the user replaces that.

        Args:
            figures: figures of a trial, as far as they are measured.
            name: the objective that the choice would be best for; empty for the limits alone.
        """
        violations = {
            limited: figures[FIGURES[limited]] - bound
            for limited, bound in self.limits.items()
            if FIGURES[limited] in figures
        }
        if name == "quality" and "speed" not in self.limits and "time_ratio" in figures:
            violations["the speed of the default settings"] = figures["time_ratio"] - 1 - SLACK
        exact = name not in ("", BALANCED, "quality") and "quality" not in self.limits
        if exact and "error" in figures:
            lost = figures["error"] - figures["error_default"] - SAME_ERROR
            violations["the quality of the default settings"] = lost
        return violations

    def sampler_violations(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return the violations that the sampler avoids: those of its objective, if it has one."""
        return self.violations(figures, self.objectives[0] if self.single else "")

    def lower_bound(self, figures: Mapping[str, float]) -> float:
        """Return the least value of the single objective that missing figures still allow."""
        perfect = {**dict.fromkeys(FIGURES.values(), 0.0), "error_default": 1.0, **figures}
        return self.value(self.objectives[0], perfect)

    def score(self, figures: Mapping[str, float]) -> float:
        """Return the balanced score: the geometric mean of the ratios to the default settings.

        The default settings have 1. The ratio of errors is that of their odds, wrong over right
        answers. So halving a small error counts as much as halving the time, and no speed-up
        makes up for an attention that finds nothing. (In the specification's sum, section 4.1,
        a large speed-up does.)
        """
        ratios = [figures[FIGURES[name]] for name in self.available if name != "quality"]
        if "quality" in self.available:
            odds = (_odds(figures[name]) for name in ("error", "error_default"))
            ratios.append(next(odds) / next(odds))
        return math.prod(ratios) ** (1 / len(ratios))


def _odds(error: float) -> float:
    return (error + MIN_ERROR) / (1 - error + MIN_ERROR)
