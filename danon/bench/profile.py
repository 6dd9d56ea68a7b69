"""How much is measured: lengths, dtypes, phases and the time a case may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from danon.attention import registry
from danon.runs.case import Case, Phase

__all__ = ["CaseGrid", "ModelPlan", "Profile"]

CALL_LIMIT_FACTOR, MODEL_LIMIT_FACTOR = 15, 5
"""A case is given up after so many times the seconds that its profile, or its plan, allows."""


class ModelPlan(Protocol):
    """A plan for models with attentions in them: what they are trained on or asked.

    Attributes:
        suite: name of the suite that its cases belong to.
        tasks: tasks of the cases.
        lengths: lengths of the cases, in tokens.
        cap_s: a case that should take longer is over budget.
        timed_settings: the attention has the settings that speed is measured with.
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
        """Return the seconds expected of a case, roughly."""
        ...


@dataclass(frozen=True)
class CaseGrid:
    """A table of cases: every length in every dtype."""

    phase: Phase
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The amount of one invocation's measurements, for each attention.

    Attributes:
        grids: cases of the suites that measure calls, by the name of the suite.
        seconds: rounds of one case go on this long unless its interval is narrow before.
        width: half width of the interval, in logarithms, that is narrow enough.
        cap_s: a case that should take longer, its check included, is over budget.
        caps_s: other caps, by the name of the suite.
        plans: what models are trained on or asked; they have budgets of their own.
        from_tuned: settings tuned for a length are measured from that length on only.
        hidden: not offered to users.
    """

    grids: Mapping[str, tuple[CaseGrid, ...]]
    seconds: float
    width: float
    cap_s: float
    caps_s: Mapping[str, float] = field(default_factory=dict)
    plans: tuple[ModelPlan, ...] = ()
    from_tuned: bool = False
    hidden: bool = False

    def cap(self, suite: str) -> float:
        """Return the seconds that a case of a suite may take."""
        return self.caps_s.get(suite, self.cap_s)

    def limit(self, case: Case) -> float:
        """Return the seconds without an answer after which a case has failed.

        Several times what it may take: another program beside it can slow it down as much.
        """
        slack = CALL_LIMIT_FACTOR * self.cap_s
        return MODEL_LIMIT_FACTOR * self.plan(case).cap_s + slack if self._plans(case) else slack

    def plan(self, case: Case) -> ModelPlan:
        """Return what a model of a case is trained by, or asked."""
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
        """Return whether this profile measures an attention at a length."""
        if not self.from_tuned or attention not in registry.names():
            return True
        return length >= registry.get(attention).tuned_length
