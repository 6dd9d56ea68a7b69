"""What a study is after: objectives, limits, and the score that several objectives share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BALANCED", "CLOSE", "FIGURES", "FLOOR", "SAME", "Objective"]

FIGURES = {
    "speed": "time_ratio",
    "memory": "memory_ratio",
    "quality": "error",
    "parameters": "parameters_ratio",
}
"""What each objective is in the figures of a trial: the smaller, the better."""
BALANCED = "balanced"
FLOOR = 0.01
"""Added to what is wrong and to what is right: half of nothing would be twice as good."""
CLOSE = 0.05
"""What is worse by a smaller share may be as good."""
SAME = 0.01
"""Errors that differ by less are the same quality."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what is allowed.

    Attributes:
        objectives: of :data:`FIGURES`, or ``balanced`` alone.
        limits: the most that the figure of an objective may be.
        known: objectives that the study has figures of.
    """

    objectives: tuple[str, ...]
    limits: Mapping[str, float]
    known: tuple[str, ...] = ("speed", "memory", "quality")

    @classmethod
    def parse(cls, objectives: str, limits: Sequence[str], known: Sequence[str]) -> Objective:
        """From ``speed,memory`` and ``quality=0.05``.

        Raises:
            ValueError: an unknown objective, or a limit that is no number; says which.
        """
        named = tuple(dict.fromkeys(w.strip() for w in objectives.split(",") if w.strip()))
        allowed = (*known, BALANCED)
        for name in named:
            if name not in allowed:
                raise ValueError(f"--objective {name!r}: must be of {', '.join(allowed)}")
        if not named or (BALANCED in named and len(named) > 1):
            raise ValueError(
                f"--objective {objectives!r}: must name some of {', '.join(known)}, or "
                f"{BALANCED} alone"
            )
        found: dict[str, float] = {}
        for text in limits:
            name, _, bound = text.partition("=")
            try:
                value = float(bound)
            except ValueError:
                value = math.nan
            if name not in known or not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"--limit {text!r}: must be {' or '.join(f'{n}=NUMBER' for n in known)}, "
                    "a number > 0"
                )
            found[name] = value
        return cls(named, found, tuple(known))

    @property
    def single(self) -> bool:
        """Whether trials can be ranked by one number."""
        return len(self.objectives) == 1

    def values(self, figures: Mapping[str, float]) -> list[float]:
        """What the sampler is told, all to be minimised.

        Raises:
            ValueError: a figure that is not a finite number; says which.
        """
        found = [self.value(name, figures) for name in self.objectives]
        for name, value in zip(self.objectives, found, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"objective {name} is {value}")
        return found

    def value(self, objective: str, figures: Mapping[str, float]) -> float:
        """Of one objective."""
        return self.score(figures) if objective == BALANCED else figures[FIGURES[objective]]

    def excess(self, figures: Mapping[str, float], objective: str = "") -> dict[str, float]:
        """By how much bounds are exceeded, as far as the figures are known; <= 0: they are not.

        Beside the limits, the best for ``quality`` must be as fast as the default settings, the
        best for any other objective as exact; a limit takes the place of that.
        """
        found = {
            name: figures[FIGURES[name]] - bound
            for name, bound in self.limits.items()
            if FIGURES[name] in figures
        }
        free = {*self.limits, objective}
        if objective == "quality" and "speed" not in free and "time_ratio" in figures:
            found["the speed of the default settings"] = figures["time_ratio"] - 1 - CLOSE
        exact = objective not in ("", BALANCED, "quality") and "quality" not in self.limits
        if exact and "error" in figures:
            lost = figures["error"] - figures["error_default"] - SAME
            found["the quality of the default settings"] = lost
        return found

    def own_excess(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Of the one objective, if there is one: what the sampler is to keep to."""
        return self.excess(figures, self.objectives[0] if self.single else "")

    def bound(self, figures: Mapping[str, float]) -> float:
        """The least that the single objective can become, if all that is not known is perfect."""
        perfect = {**dict.fromkeys(FIGURES.values(), 0.0), "error_default": 1.0, **figures}
        return self.value(self.objectives[0], perfect)

    def score(self, figures: Mapping[str, float]) -> float:
        """The balanced score: the geometric mean of the ratios to the default settings.

        1 for these. Of errors the ratio is that of the odds, wrong over right answers: it takes as
        much to halve few errors as to halve time or bytes, and nothing makes up for an attention
        that finds nothing. (In beta = alpha_1 accuracy + alpha_2 speed + alpha_3 memory,
        specification 4.1, a large speed-up does.)
        """
        ratios = [figures[FIGURES[name]] for name in self.known if name != "quality"]
        if "quality" in self.known:
            odds = (_odds(figures[name]) for name in ("error", "error_default"))
            ratios.append(next(odds) / next(odds))
        return math.prod(ratios) ** (1 / len(ratios))


def _odds(error: float) -> float:
    return (error + FLOOR) / (1 - error + FLOOR)
