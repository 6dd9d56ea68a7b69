"""The suites: what each measures, its cases, and the registry that all else derives from.

A file that registers a suite adds it to the bench, the terminal, the report and MLflow::

    @register
    class Energy(CallSuite):
        name = "energy"
        description = "Joules of a forward pass."
        metrics = (Metric("energy_j", "energy of one call", unit="J", better="lower"),)

        def figures(self, workload, correctness):
            return {"energy_j": joules_of(workload.call())}, {}

It lies in suites/, or anywhere: ``danon bench --suites energy.py:Energy`` loads it, and so does an
installed package with an entry point of the group ``danon.suites``.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from danon.attention import registry
from danon.bench.cost_forecast import CostForecaster
from danon.bench.profile import CaseGrid, Profile
from danon.bench.shapes import HEAD_DIM, HEADS
from danon.bench.verification import Verifier
from danon.bench.workload import Workload
from danon.processes.suite_modules import import_suites
from danon.runs.case import Case, CaseResult, Status
from danon.runs.suite_info import Metric, SuiteInfo, describe

__all__ = [
    "Session",
    "Suite",
    "UnmeasuredError",
    "extra_metric",
    "extra_metrics",
    "get",
    "names",
    "planned_cases",
    "register",
    "row_without_figures",
]

ExtraMetric = Callable[[Workload], float]


class UnmeasuredError(Exception):
    """There are no figures: the status and the reason of the row."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


@dataclass(frozen=True)
class Session:
    """What the suites of one session share.

    Attributes:
        profile: decides lengths, budgets and caps.
        result: measures a case, of any suite, unless it has been measured before.
        verifier: checks an attention against its oracle, once for each case.
        costs: forecasts longer cases from shorter ones.
        run_dir: folder that trained models stay in; None: they are not kept.
        note: is told what the user is to hear at the end.
    """

    profile: Profile
    result: Callable[[Case], CaseResult]
    verifier: Verifier = field(default_factory=Verifier)
    costs: CostForecaster = field(default_factory=CostForecaster)
    run_dir: Path | None = None
    note: Callable[[str], object] = lambda text: None


class Suite(ABC):
    """One kind of measurement, for every attention.

    One object lives as long as a session, and may remember what longer cases need.

    Attributes:
        name: letters, digits, ``_`` and ``-``; unique.
        description: what is measured, in a sentence.
        metrics: the figures of a case.
        order: place among the suites where they are listed.
        grid_of: suite whose lengths and dtypes make the cases where the profile has none of this
            one's name.
        measured_for: suites that ask for cases of this one at the lengths of their own.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    order: ClassVar[int] = 100
    grid_of: ClassVar[str] = "memory"
    measured_for: ClassVar[tuple[str, ...]] = ()

    def __init__(self, session: Session) -> None:
        """Args: session: the profile, and what is shared with other suites."""
        self.session = session
        self.profile = session.profile

    @abstractmethod
    def measure(self, case: Case) -> CaseResult:
        """Measure a case.

        Raises:
            UnmeasuredError: there are no figures; the row gets its status and reason. Whatever else
                is raised makes the row failed.
        """

    @classmethod
    def cases(cls, profile: Profile, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of one attention: every length of the grids, short before long."""
        for grid in cls.grids(profile):
            for dtype in grid.dtypes:
                for length in sorted(grid.lengths):
                    if profile.measures(attention, length):
                        yield Case(
                            cls.name,
                            attention,
                            length,
                            dtype,
                            grid.phase,
                            device,
                            heads=HEADS,
                            head_dim=HEAD_DIM,
                        )

    @classmethod
    def grids(cls, profile: Profile) -> Sequence[CaseGrid]:
        """Return the grids of the cases."""
        return profile.grids.get(cls.name, profile.grids.get(cls.grid_of, ()))

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the seconds expected of a case, roughly: for the progress bar."""
        return 0.2

    def learn_from(self, result: CaseResult) -> None:  # noqa: B027  most suites need nothing
        """Hear a result of an earlier session that goes on: it may forecast longer cases."""

    def samples(self, result: CaseResult) -> list[float]:
        """Return the seconds per call behind a result, for pytest-benchmark."""
        return result.samples["candidate_s"]

    @classmethod
    def shorter(cls, profile: Profile, case: Case) -> Case | None:
        """Return the case of the next shorter length that may be measured, or None."""
        others = [grid for suite in cls.measured_for for grid in profile.grids.get(suite, ())]
        lengths = {
            n
            for grid in (*cls.grids(profile), *others)
            if grid.phase == case.phase and case.dtype in grid.dtypes
            for n in grid.lengths
        }
        below = [n for n in lengths if n < case.length and profile.measures(case.attention, n)]
        return replace(case, length=max(below)) if below else None

    @classmethod
    def info(cls) -> SuiteInfo:
        """Return what the suite says of itself, as plain data."""
        return SuiteInfo(cls.name, cls.description, cls.metrics, cls.order)


_TABLE: dict[str, type[Suite]] = {}
_EXTRA: dict[str, dict[str, ExtraMetric]] = {}
_S = TypeVar("_S", bound=type[Suite])
_F = TypeVar("_F", bound=ExtraMetric)


def register(cls: _S) -> _S:
    """Class decorator: make a suite known under its name.

    Raises:
        ValueError: the name is taken by another class, or cannot stand in a path.
    """
    name = cls.name
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"suite {name!r}: a name has letters, digits, '_' and '-' only")
    known = _TABLE.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(f"suite {name!r} is already registered: {known!r}; rename {cls!r}")
    _TABLE[name] = cls
    describe(cls.info())
    return cls


def names() -> tuple[str, ...]:
    """Return the names of all suites, in the order of listing."""
    return tuple(sorted(_TABLE, key=lambda name: (_TABLE[name].order, name)))


def get(name: str) -> type[Suite]:
    """Return the suite of a name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return _TABLE[name]
    except KeyError:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(names())}") from None


def extra_metric(suite: str, metric: Metric) -> Callable[[_F], _F]:
    """Decorator: add a metric to the cases of a suite whose cases are calls of an attention.

    Example:
        ``@extra_metric("speed", Metric("output_norm", "norm of the output"))`` above a function
        that takes a :class:`~danon.bench.workload.Workload` and returns a float.

    Args:
        suite: a registered one that measures calls (speed, memory, bounds ...).
        metric: the figure that the function returns.

    Raises:
        ValueError: the suite is unknown, measures no calls, or has a metric of that name.
    """
    cls = get(suite)
    if not getattr(cls, "takes_extra_metrics", False):
        allowed = [n for n in names() if getattr(get(n), "takes_extra_metrics", False)]
        raise ValueError(
            f"metric {metric.name!r}: suite {suite!r} has no calls to measure it on; allowed: "
            f"{', '.join(allowed)}"
        )
    if metric.name in {known.name for known in cls.metrics}:
        raise ValueError(f"metric {metric.name!r}: suite {suite!r} has one of that name")

    def add(function: _F) -> _F:
        _EXTRA.setdefault(suite, {})[metric.name] = function
        describe(replace(cls.info(), metrics=(metric,)))
        vars(function)["suite"] = suite  # the target of an option says by this where it belongs
        return function

    return add


def extra_metrics(suite: str, workload: Workload) -> dict[str, float]:
    """Measure the metrics that others have added to a suite."""
    return {name: float(f(workload)) for name, f in _EXTRA.get(suite, {}).items()}


def planned_cases(
    profile: Profile, attentions: Sequence[str], device: str, suites: Iterable[str] | None = None
) -> list[Case]:
    """Return the cases of a session, in the order of measuring.

    Short lengths come first, whatever the suite: long ones are forecast from them. What has a task
    comes last, all lengths of a training together: killed in between and resumed, a bench trains
    again only what it was at.

    Args:
        profile: decides the lengths.
        attentions: registered names.
        device: cpu or cuda.
        suites: names; None for all.
    """
    import_suites()
    chosen = sorted(names() if suites is None else set(suites))
    cases = [
        case for suite in chosen for case in _by_length(get(suite), profile, attentions, device)
    ]
    return sorted(cases, key=lambda case: (not case.task and case.length) or math.inf)


def _by_length(
    suite: type[Suite], profile: Profile, attentions: Sequence[str], device: str
) -> list[Case]:
    """Return the cases of a suite, one length of all attentions after the other."""
    cases = [case for name in attentions for case in suite.cases(profile, name, device)]
    place = {name: number for number, name in enumerate(attentions)}
    kinds = {(c.phase, c.dtype): None for c in cases}
    order = {kind: number for number, kind in enumerate(kinds)}
    if any(case.task for case in cases):
        return cases
    return sorted(cases, key=lambda c: (c.length, order[c.phase, c.dtype], place[c.attention]))


def row_without_figures(case: Case, status: Status, reason: str) -> CaseResult:
    """Return the row of a case that has a reason instead of figures."""
    return CaseResult(case, status, reason, registry.get(case.attention).description)
