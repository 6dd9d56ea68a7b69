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
"""Entry of :attr:`Metric.judges` that stands for every task of the suite."""


@dataclass(frozen=True)
class Metric:
    """One figure of a case, as records, tables and charts show it.

    Example:
        ``Metric("energy_j", "energy of one call", unit="J", better="lower")``

    Attributes:
        name: key in :attr:`~danon.runs.case.CaseResult.metrics`; ends in the unit (``time_s``).
            The ends of an interval have the keys ``<name>_low`` and ``<name>_high``.
        description: explanation in a phrase.
        unit: printed after a value; empty for a ratio.
        better: ``lower`` or ``higher``; empty if neither is better.
        label: heading of the column; empty: the name.
        note: hint for the reader, or the specification's claim.
        claimed: True if the specification bounds the figure.
        judges: tasks whose quality is this figure; ``*`` stands for all tasks of the suite.
        listed: True if the suite's own table has a column for it; False if another table shows it.
        charted: True if the report draws it against length.
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
    """The description of one suite.

    Attributes:
        name: value of ``--suites``, first part of a case's id and of the metrics in MLflow.
        description: a sentence on the measurement.
        metrics: figures, in the order of the columns.
        order: position among the suites in lists; equal ones are sorted by name.
    """

    name: str
    description: str
    metrics: tuple[Metric, ...] = ()
    order: int = 100

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Return the suite from its fields as JSON holds them.

        Args:
            values: field -> value.
        """
        metrics = (Metric(**{**m, "judges": tuple(m["judges"])}) for m in values["metrics"])
        return cls(**{**values, "metrics": tuple(metrics)})

    def judge(self, task: str) -> Metric | None:
        """Return the metric that measures the quality of a task, or None."""
        return next((m for m in self.metrics if {task, ANY_TASK} & {*m.judges}), None)


_DESCRIBED: dict[str, SuiteInfo] = {}


def describe(info: SuiteInfo) -> None:
    """Add a suite to those described in this process, or add metrics to one of them."""
    previous = _DESCRIBED.get(info.name, info)
    names = {metric.name for metric in info.metrics}
    unchanged = tuple(metric for metric in previous.metrics if metric.name not in names)
    _DESCRIBED[info.name] = replace(info, metrics=(*info.metrics, *unchanged))


def described() -> Mapping[str, SuiteInfo]:
    """Return the suites described in this process, in the order of listing."""
    return dict(sorted(_DESCRIBED.items(), key=lambda item: (item[1].order, item[0])))
