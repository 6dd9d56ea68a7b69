"""What the gate found out about two commits: plain data."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

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
"""``larger``: a figure that is the same every time has grown; ``worse``: recall has fallen;
``broken``: runs in base only; ``failed``: a timed call returned something wrong."""

CLEAN, REGRESSION, UNDECIDED = 0, 1, 2
BAD: tuple[Finding, ...] = ("slower", "larger", "slower and larger", "worse", "broken", "failed")
RECALL = "recall_"
"""Begins the names of shares of right answers; the number of pairs follows."""
RECALL_TOLERANCE_POINTS = 0.01
"""That recall may fall: other rounding turns an answer in a thousand."""


@dataclass(frozen=True)
class ExactMetric:
    """A figure that is the same in every run: ``peak_bytes``, ``flops`` ..."""

    name: str
    base: float
    head: float

    @property
    def is_recall(self) -> bool:
        return self.name.startswith(RECALL)

    def bad(self, allowed: float = 0.0) -> bool:
        """Whether it is worse in the head than in the base.

        Args:
            allowed: growth up to this is accepted; recall may fall by as much.
        """
        if self.is_recall:
            return self.head < self.base - RECALL_TOLERANCE_POINTS - allowed
        return self.head > max(self.base, allowed)


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        time_ratio: head / base, CPU time of one thread, with its interval; None if not measured.
        pairs: of fresh processes that it comes from.
        base_s: seconds of a call; so is ``head_s``.
        relative_time: the head's over dense attention's, where the gate measured that.
        facts: those that differ; of recall all.
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
        base: commit; so is ``head``, which may have changes beyond it.
        when: it began, UTC.
        seconds: that it took.
        fingerprint: of the machine.
        remark: what a reader must know of it all.
        elsewhere: the base are thresholds of another machine.
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
        """Regressions."""
        return tuple(row for row in self.rows if row.finding in BAD)

    @property
    def undecided(self) -> tuple[Row, ...]:
        """What the time was too short for."""
        return tuple(row for row in self.rows if row.finding == "undecided")

    @property
    def status(self) -> int:
        """Of the process: 0 clean, 1 a regression, 2 could not decide."""
        if self.bad:
            return REGRESSION
        measured = any(row.finding not in ("not measured", "removed") for row in self.rows)
        return UNDECIDED if self.undecided or not measured else CLEAN

    @classmethod
    def read(cls, place: Path) -> Self:
        """A file that has :meth:`to_json`.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is no comparison, or one of another danon.
        """
        try:
            values = TypeAdapter(dict[str, Any]).validate_json(place.read_bytes())
            rows = values.get("rows")
            for row in rows if isinstance(rows, list) else ():
                case = row.get("case") if isinstance(row, dict) else None
                if isinstance(case, dict):
                    case.pop("id", None)  # written for people: it is made of the rest
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise ValueError(
                f"{place} is no comparison of this danon, run the gate again: "
                f"{first_problem(error)}"
            ) from error

    def to_json(self) -> str:
        values: dict[str, Any] = dataclasses.asdict(self)
        values["status"] = self.status
        for row, found in zip(values["rows"], self.rows, strict=True):
            row["case"] = {"id": found.case.id, **row["case"]}
        values["when"] = self.when.isoformat()
        return json.dumps(values, indent=1, sort_keys=True)
