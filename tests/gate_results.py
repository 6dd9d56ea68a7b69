"""Results of the gate that are made up."""

from __future__ import annotations

import datetime as dt

from danon.gate.result import GateResult, Row
from danon.runs.case import Case

CASE = Case("speed", "MyAttention", 128, "float32", "forward")
WHEN = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)


def comparison(*rows: Row) -> GateResult:
    return GateResult("a" * 40, "b" * 40, "before", "after | it", rows, WHEN, 12.0, {"id": "f00"})
