"""A suite whose cases put attentions into models, by the plans of the profile."""

from __future__ import annotations

from collections.abc import Iterator

from danon.bench.profile import Profile
from danon.bench.suite import Suite
from danon.runs.case import Case

__all__ = ["ModelSuite"]


class ModelSuite(Suite):
    """A suite whose cases come from those plans of the profile that name it."""

    @classmethod
    def cases(cls, profile: Profile, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of the plans.

        A plan with the settings of the speed suite has only cases that the profile measures.

        Args:
            profile: its plans.
            attention: registered name.
            device: cpu or cuda.
        """
        for plan in profile.plans_of(cls.name):
            for case in plan.cases(attention, device):
                if not plan.timed_settings or profile.measures(attention, case.length):
                    yield case

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the seconds that the plan expects of a case."""
        return profile.plan(case).weight(case)
