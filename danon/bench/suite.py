"""The protocol of a suite, and the registry of suites that all else derives from.

A file that registers a suite adds it to the bench, the terminal, the report and MLflow::

    @register
    class Energy(CallSuite):
        name = "energy"
        description = "Joules of a forward pass."
        metrics = (Metric("energy_j", "energy of one call", unit="J", better="lower"),)

        def figures(self, workload, correctness):
            return {"energy_j": joules_of(workload.call())}, {}

The file lies in suites/ or anywhere else: ``danon bench --suites energy.py:Energy`` loads it.
An installed package adds a suite by an entry point of the group ``danon.suites``.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
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
    "Suite",
    "SuiteContext",
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
    """A case without figures: the status and the reason of its row.

    Args:
        status: ``failed``, ``over budget`` or ``unavailable``.
        reason: in a line, for the user.
    """

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


@dataclass(frozen=True)
class SuiteContext:
    """Objects that the suites of one session share.

    Attributes:
        profile: lengths, budgets and caps.
        result: function that returns the outcome of a case of any suite, measured at most once.
        verifier: check of an attention against its oracle, once for each case.
        costs: forecasts of longer cases from shorter ones.
        run_dir: folder of trained models; None: they are not stored.
        note: function that takes a message for the user at the end.
    """

    profile: Profile
    result: Callable[[Case], CaseResult]
    verifier: Verifier = field(default_factory=Verifier)
    costs: CostForecaster = field(default_factory=CostForecaster)
    run_dir: Path | None = None
    note: Callable[[str], object] = lambda text: None


class Suite(ABC):
    """One kind of measurement, for every attention.

    Derive from :class:`~danon.bench.call_suite.CallSuite` where a case is one call of an attention.
    One object lives as long as a session, and may store what longer cases need.

    Attributes:
        name: unique; letters, digits, ``_`` and ``-``.
        description: a sentence on the measurement.
        metrics: the figures of a case.
        order: position among the suites in lists; equal ones are sorted by name.
        grid_of: suite whose lengths and dtypes make the cases if the profile has no grid for this
            suite.
        measured_for: suites that need cases of this one at their own lengths.
        takes_extra_metrics: True if :func:`extra_metric` may add figures to its cases.
        timed: True if the samples ``candidate_s`` are the times that it measures.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    order: ClassVar[int] = 100
    grid_of: ClassVar[str] = "memory"
    measured_for: ClassVar[tuple[str, ...]] = ()
    takes_extra_metrics: ClassVar[bool] = False
    timed: ClassVar[bool] = False

    def __init__(self, context: SuiteContext) -> None:
        """Create the suite for a session.

        Args:
            context: the profile, and the objects shared with other suites.
        """
        self.context = context
        self.profile = context.profile

    @abstractmethod
    def measure(self, case: Case) -> CaseResult:
        """Measure a case.

        Args:
            case: attention, length in tokens, dtype, phase, device and shape.

        Returns:
            The outcome: measured with figures, or another status with a reason.

        Raises:
            UnmeasuredError: the case has no figures; the row gets status and reason of the error.
                Any other exception makes the row failed.
        """

    @classmethod
    def cases(cls, profile: Profile, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of one attention: every length of the grids, short before long.

        Args:
            profile: lengths, dtypes and phases.
            attention: registered name.
            device: cpu or cuda.
        """
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
        """Return the grids of a profile that make the cases."""
        return profile.grids.get(cls.name, profile.grids.get(cls.grid_of, ()))

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the expected seconds of a case, roughly, for the progress bar."""
        return 0.2

    def learn_from(self, result: CaseResult) -> None:  # noqa: B027  most suites need nothing
        """Take a result of an interrupted session; it may forecast longer cases."""

    def samples(self, result: CaseResult) -> list[float]:
        """Return the seconds per call behind a result, for pytest-benchmark; empty: it has none.

        Seconds of a check or of a training are no time of the attention, so that a suite has none
        unless it is :attr:`timed`.
        """
        return result.samples.get("candidate_s", []) if self.timed else []

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
        """Return name, description, metrics and order as plain data."""
        return SuiteInfo(cls.name, cls.description, cls.metrics, cls.order)


_TABLE: dict[str, type[Suite]] = {}
_EXTRA: dict[str, dict[str, ExtraMetric]] = {}
_S = TypeVar("_S", bound=type[Suite])
_F = TypeVar("_F", bound=ExtraMetric)


def register(cls: _S) -> _S:
    """Register a suite under its name; a decorator of the class.

    Args:
        cls: the suite.

    Returns:
        The class itself.

    Raises:
        ValueError: the name is taken by another class, or cannot stand in a path.
    """
    name = cls.name
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"suite {name!r}: a name has letters, digits, '_' and '-' only")
    registered = _TABLE.get(name)
    if registered is not None and _origin(registered) != _origin(cls):
        raise ValueError(f"suite {name!r} is already registered: {registered!r}; rename {cls!r}")
    _TABLE[name] = cls
    describe(cls.info())
    return cls


def _origin(thing: type | Callable[..., object]) -> tuple[str, str]:
    """Return what tells a class or function from another, and not from itself imported again."""
    return thing.__module__, thing.__qualname__


def names() -> tuple[str, ...]:
    """Return the names of all suites, in the order of listing."""
    return tuple(sorted(_TABLE, key=lambda name: (_TABLE[name].order, name)))


def get(name: str) -> type[Suite]:
    """Return the suite with a name.

    Args:
        name: name of a registered suite.

    Raises:
        ValueError: unknown name; the message lists the registered ones.
    """
    try:
        return _TABLE[name]
    except KeyError:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(names())}") from None


def extra_metric(suite: str, metric: Metric) -> Callable[[_F], _F]:
    """Add a metric to a suite whose cases are calls of an attention; a decorator of a function.

    Example:
        ``@extra_metric("speed", Metric("output_norm", "norm of the output"))`` above a function
        that takes a :class:`~danon.bench.workload.Workload` and returns a float.

    Args:
        suite: name of a suite that measures calls: speed, memory, bounds ...
        metric: description of the figure that the function returns.

    Returns:
        The decorator, which returns the function itself.

    Raises:
        ValueError: the suite is unknown, measures no calls, or has a metric of that name.
    """
    cls = get(suite)
    if not cls.takes_extra_metrics:
        allowed = [n for n in names() if get(n).takes_extra_metrics]
        raise ValueError(
            f"metric {metric.name!r}: suite {suite!r} has no calls to measure it on; allowed: "
            f"{', '.join(allowed)}"
        )
    if metric.name in {existing.name for existing in cls.metrics}:
        raise ValueError(
            f"metric {metric.name!r}: suite {suite!r} already has a metric of that name"
        )

    def add(function: _F) -> _F:
        added = _EXTRA.setdefault(suite, {})
        other = added.get(metric.name, function)
        if _origin(other) != _origin(function):
            raise ValueError(
                f"metric {metric.name!r} is already added to suite {suite!r}: {other!r}; "
                f"rename that of {function!r}"
            )
        added[metric.name] = function
        describe(replace(cls.info(), metrics=(metric,)))
        vars(function)["suite"] = suite  # a target `file.py:function` names its suite by this
        return function

    return add


def extra_metrics(suite: str, workload: Workload, measured: Container[str]) -> dict[str, float]:
    """Measure the metrics that were added to a suite by :func:`extra_metric`.

    Args:
        suite: name of the suite.
        workload: the call that they are measured on.
        measured: names of the figures that the suite itself has measured.

    Raises:
        ValueError: an added metric has the name of one of these.
    """
    added = _EXTRA.get(suite, {})
    if taken := [name for name in added if name in measured]:
        raise ValueError(f"metric {taken[0]!r}: suite {suite!r} measures one of that name")
    return {name: float(function(workload)) for name, function in added.items()}


def planned_cases(
    profile: Profile, attentions: Sequence[str], device: str, suites: Iterable[str] | None = None
) -> list[Case]:
    """Return the cases of a session, in the order of measuring.

    Short lengths come first, whatever the suite: long ones are forecast from them.
    Cases with a task come last, all lengths of a training together. A bench that is killed and
    resumed repeats only the training that was interrupted.

    Args:
        profile: lengths, dtypes and phases.
        attentions: registered names.
        device: cpu or cuda.
        suites: names; None: all.
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
    """Return the cases of a suite, sorted by length, then phase and dtype, then attention."""
    cases = [case for name in attentions for case in suite.cases(profile, name, device)]
    rank = {name: number for number, name in enumerate(attentions)}
    variants = dict.fromkeys((c.phase, c.dtype) for c in cases)
    order = {variant: number for number, variant in enumerate(variants)}
    if any(case.task for case in cases):
        return cases
    return sorted(cases, key=lambda c: (c.length, order[c.phase, c.dtype], rank[c.attention]))


def row_without_figures(case: Case, status: Status, reason: str) -> CaseResult:
    """Return the row of a case without figures: its status and reason."""
    return CaseResult(case, status, reason, registry.get(case.attention).description)
