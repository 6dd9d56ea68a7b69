"""A profile: lengths, dtypes, phases and the time a case may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from danon.attention import registry
from danon.runs.case import Case, Phase

__all__ = ["CaseGrid", "ModelPlan", "Profile"]

CALL_LIMIT_FACTOR, MODEL_LIMIT_FACTOR = 15, 5
"""A case is given up after this many times the seconds that its profile, or its plan, allows."""


class ModelPlan(Protocol):
    """A plan of training or evaluating models with attentions in them.

    Attributes:
        suite: name of the suite that its cases belong to.
        tasks: tasks of the cases.
        lengths: lengths of the cases, in tokens.
        cap_s: most seconds of a case; a case with a longer forecast is over budget.
        timed_settings: True if the attention has the settings of the speed suite.
    """

    @property
    def suite(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def cap_s(self) -> float: ...
    @property
    def timed_settings(self) -> bool: ...

    def cases(self, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of one attention."""
        ...

    def weight(self, case: Case) -> float:
        """Return the expected seconds of a case, roughly."""
        ...


@dataclass(frozen=True)
class CaseGrid:
    """A table of cases: every length in every dtype.

    Attributes:
        phase: ``forward``, ``forward+backward`` or ``decode``.
        dtypes: names of torch dtypes.
        lengths: tokens.
    """

    phase: Phase
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The amount of one bench's measurements, for each attention.

    Example:
        ``Profile({"speed": (CaseGrid("forward", ("float32",), (1024,)),)}, 2.0, 0.05, 60.0)``

    Attributes:
        grids: cases of the suites that measure calls, by name of the suite.
        seconds: time budget of a case's rounds; they end earlier once the interval is narrow.
        width: half width of a narrow interval, in logarithms.
        first_rounds_s: seconds that the first twelve rounds of a case may take beyond its budget.
        cap_s: most seconds of a case, its check included; a longer forecast is over budget.
        caps_s: other caps, by name of the suite.
        plans: plans for models, which have budgets of their own.
        suites: that run where the user names none, beside those of installed packages. Empty: all.
        attentions: that are measured where the user names none, beside the user's own and those of
            installed packages. Empty: all.
        from_tuned: True if settings tuned for a length are measured only from that length on.
    """

    grids: Mapping[str, tuple[CaseGrid, ...]]
    seconds: float
    width: float
    cap_s: float
    caps_s: Mapping[str, float] = field(default_factory=dict)
    plans: tuple[ModelPlan, ...] = ()
    suites: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    from_tuned: bool = False
    first_rounds_s: float = 0.0

    def cap(self, suite: str) -> float:
        """Return the seconds that a case of a suite may take."""
        return self.caps_s.get(suite, self.cap_s)

    def limit(self, case: Case) -> float:
        """Return the seconds without an answer after which a case has failed.

        The limit is several times the cap: another program can slow the case down that much.
        """
        slack = CALL_LIMIT_FACTOR * self.cap_s
        return MODEL_LIMIT_FACTOR * self.plan(case).cap_s + slack if self._plans(case) else slack

    def plan(self, case: Case) -> ModelPlan:
        """Return the plan of a case that puts its attention into a model."""
        (plan,) = self._plans(case)
        return plan

    def _plans(self, case: Case) -> list[ModelPlan]:
        return [
            plan
            for plan in self.plans
            if plan.suite == case.suite and case.task in plan.tasks and case.length in plan.lengths
        ]

    def plans_of(self, suite: str) -> tuple[ModelPlan, ...]:
        """Return the plans whose cases belong to a suite."""
        return tuple(plan for plan in self.plans if plan.suite == suite)

    def measures(self, attention: str, length: int) -> bool:
        """Return True if this profile measures an attention at a length."""
        if not self.from_tuned or attention not in registry.names():
            return True
        return length >= registry.get(attention).tuned_length
