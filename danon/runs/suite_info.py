"""The description of a suite: name, measured quantity and metrics, as plain data.

It is stored with every run, so that a report needs neither the code of the suite nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from danon.runs.case import STRICT

__all__ = ["ANY_TASK", "Metric", "SuiteInfo", "describe", "described"]

Better = Literal["lower", "higher", ""]
ANY_TASK = "*"
"""In :attr:`Metric.judges`: every task of the suite."""


@dataclass(frozen=True)
class Metric:
    """One figure of a case, as records, tables and charts know it.

    Example:
        ``Metric("energy_j", "energy of one call", unit="J", better="lower")``

    Attributes:
        name: its key in :attr:`~danon.runs.case.CaseResult.metrics`; it ends in its unit
            (``time_s``). An interval of it has the keys ``<name>_low`` and ``<name>_high``.
        description: a phrase that explains it.
        unit: as it is printed behind a value; empty for a ratio.
        better: the direction that is better; empty where neither is.
        label: heading of its column; empty: its name.
        note: how it is to be read, or what the specification claims of it.
        claimed: the specification bounds it.
        judges: tasks that are judged by it, ``*`` for all of the suite.
        listed: the table of its suite has a column for it. False: another table shows it.
        charted: the report draws it against length, beside those of the other suites.
    """

    name: str
    description: str
    unit: str = ""
    better: Better = ""
    label: str = ""
    note: str = ""
    claimed: bool = False
    judges: tuple[str, ...] = ()
    listed: bool = True
    charted: bool = False

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    @property
    def heading(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


@dataclass(frozen=True)
class SuiteInfo:
    """One suite.

    Attributes:
        name: as in ``--suites``, in cases and in the MLflow experiment ``danon/<name>``.
        description: what it measures, in a sentence.
        metrics: its figures, in the order of the columns.
        order: place among the suites where they are listed; equals stand by name.
    """

    name: str
    description: str
    metrics: tuple[Metric, ...] = ()
    order: int = 100

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Return the suite whose fields, by name, came through JSON."""
        metrics = (Metric(**{**m, "judges": tuple(m["judges"])}) for m in values["metrics"])
        return cls(**{**values, "metrics": tuple(metrics)})

    def judge(self, task: str) -> Metric | None:
        """Return the metric that a task is judged by, or None."""
        return next((m for m in self.metrics if {task, ANY_TASK} & {*m.judges}), None)


_DESCRIBED: dict[str, SuiteInfo] = {}


def describe(info: SuiteInfo) -> None:
    """Make a suite known to this process, or add metrics to one that is known."""
    known = _DESCRIBED.get(info.name, info)
    names = {metric.name for metric in info.metrics}
    kept = tuple(metric for metric in known.metrics if metric.name not in names)
    _DESCRIBED[info.name] = replace(info, metrics=(*info.metrics, *kept))


def described() -> Mapping[str, SuiteInfo]:
    """Return the suites that this process knows, in the order of listing."""
    return dict(sorted(_DESCRIBED.items(), key=lambda item: (item[1].order, item[0])))
