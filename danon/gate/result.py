"""The result of a gate: plain data about two commits."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from danon.console import exit_status
from danon.measure.statistics import Estimate
from danon.runs.case import Case
from danon.runs.schema import first_problem

__all__ = [
    "CLEAN",
    "RECALL",
    "REGRESSION",
    "UNDECIDED",
    "ExactMetric",
    "Finding",
    "GateResult",
    "Row",
]

Finding = Literal[
    "same",
    "faster",
    "slower",
    "larger",
    "slower and larger",
    "worse",
    "broken",
    "failed",
    "undecided",
    "new",
    "removed",
    "not measured",
]
"""Outcome of a case.

``larger``: an exact metric has grown; ``worse``: recall has fallen; ``broken``: it runs in the base
only; ``failed``: a timed call returned something wrong.
"""

CLEAN, REGRESSION, UNDECIDED = exit_status.DONE, exit_status.NEGATIVE, exit_status.REFUSED
BAD: tuple[Finding, ...] = ("slower", "larger", "slower and larger", "worse", "broken", "failed")
RECALL = "recall_"
"""Prefix of the metrics that are shares of right answers; the number of pairs follows."""
RECALL_TOLERANCE_POINTS = 0.01
"""Fall of recall that is none, as a share: other rounding turns an answer in a thousand."""


@dataclass(frozen=True)
class ExactMetric:
    """A metric that is the same in every run: ``peak_bytes``, ``flops`` ...

    Attributes:
        name: as stored.
        base: its value in the base.
        head: its value in the head.
    """

    name: str
    base: float
    head: float

    @property
    def is_recall(self) -> bool:
        """True for a share of right answers."""
        return self.name.startswith(RECALL)

    def is_worse(self, allowed: float = 0.0) -> bool:
        """Return True if the head's value is worse than the base's.

        Args:
            allowed: accepted value; of recall, the accepted fall.
        """
        if self.is_recall:
            return self.head < self.base - RECALL_TOLERANCE_POINTS - allowed
        return self.head > max(self.base, allowed)


@dataclass(frozen=True)
class Row:
    """Result of one case.

    Attributes:
        case: the case.
        finding: its outcome.
        time_ratio: head / base, CPU time of one thread, with its interval; None if not measured.
        pairs: number of pairs of fresh processes behind it.
        base_s: seconds of a call in the base.
        head_s: seconds of a call in the head.
        relative_time: the head's time over dense attention's, where the gate measured that.
        facts: exact metrics that differ; of recall all.
        note: why it is not measured or not decided.
    """

    case: Case
    finding: Finding
    time_ratio: Estimate | None = None
    pairs: int = 0
    base_s: float = 0.0
    head_s: float = 0.0
    relative_time: float | None = None
    facts: tuple[ExactMetric, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class GateResult:
    """A run of the gate.

    Attributes:
        base: commit of the base.
        head: commit of the head, which may have changes beyond it.
        base_subject: first line of its message.
        head_subject: the same of the head.
        rows: one for each case.
        when: start, UTC.
        seconds: duration.
        fingerprint: of the machine.
        remark: a sentence that every reader must see.
        elsewhere: True if the base is thresholds of another machine.
    """

    base: str
    head: str
    base_subject: str
    head_subject: str
    rows: tuple[Row, ...]
    when: dt.datetime
    seconds: float
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    elsewhere: bool = False

    @property
    def bad(self) -> tuple[Row, ...]:
        """Rows with a regression."""
        return tuple(row for row in self.rows if row.finding in BAD)

    @property
    def undecided(self) -> tuple[Row, ...]:
        """Rows that the time was too short for."""
        return tuple(row for row in self.rows if row.finding == "undecided")

    @property
    def status(self) -> int:
        """Exit status of the process: 0 clean, 1 a regression, 2 could not decide."""
        if self.bad:
            return REGRESSION
        measured = any(row.finding not in ("not measured", "removed") for row in self.rows)
        return UNDECIDED if self.undecided or not measured else CLEAN

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that has :meth:`to_json`.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It is no comparison, or one of another danon.
        """
        try:
            values = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
            rows = values.get("rows")
            for row in rows if isinstance(rows, list) else ():
                case = row.get("case") if isinstance(row, dict) else None
                if isinstance(case, dict):
                    case.pop("id", None)  # written for people: it is made of the rest
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise ValueError(
                f"{path} is no comparison of this danon, run the gate again: {first_problem(error)}"
            ) from error

    def to_json(self) -> str:
        """Return the result as text of a JSON file, with its status and the id of each case."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["status"] = self.status
        for values_of_row, row in zip(values["rows"], self.rows, strict=True):
            values_of_row["case"] = {"id": row.case.id, **values_of_row["case"]}
        values["when"] = self.when.isoformat()
        return json.dumps(values, indent=1, sort_keys=True)
