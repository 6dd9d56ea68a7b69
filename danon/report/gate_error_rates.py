"""How often the gate errs, as the report shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["AlarmRate", "GateErrorRates", "Panel", "gate_error_rates"]

PLACE = Path("gate_validation", "rates.json")
"""In the folder that has the one of runs."""


@dataclass(frozen=True)
class AlarmRate:
    """Runs with an alarm.

    Attributes:
        low: of the share of these runs, 95 %; so is ``high``.
        slowdown: that was planted: 0.05 takes 5 % more time.
    """

    alarms: int
    runs: int
    low: float
    high: float
    slowdown: float = 0.0


@dataclass(frozen=True)
class Panel:
    """Of one machine under one load.

    Attributes:
        rows: by method, the gate itself first.
    """

    title: str
    rows: dict[str, list[AlarmRate]]

    @property
    def slowdowns(self) -> list[float]:
        """Of all methods, in order."""
        return sorted({share.slowdown for row in self.rows.values() for share in row})


@dataclass(frozen=True)
class GateErrorRates:
    """Error rates that ``python -m gate_validation`` counted.

    Attributes:
        recall: by what was planted in trained models.
        origin: which commits were measured, and when.
    """

    panels: list[Panel]
    recall: dict[str, AlarmRate]
    origin: str


def gate_error_rates(report: Path) -> GateErrorRates | None:
    """What stands beside the runs; None if nothing does, or too few rounds to say.

    Args:
        report: results/runs/<run>/report.html.

    Raises:
        ValueError: The file there is none of ``python -m gate_validation``.
    """
    place = report.resolve().parent.parent.parent / PLACE
    if not place.is_file():
        return None
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
        panels: dict[tuple[str, str], dict[str, list[AlarmRate]]] = {}
        for rate in values["time"]:
            rows = panels.setdefault((rate["machine"], rate["load"]), {})
            rows.setdefault(rate["method"], []).append(_share(rate))
        of = values["measured"]
        origin = (
            f"{of['rounds']} rounds, {of['first'][:10]} to {of['last'][:10]}, "
            f"commits {', '.join(commit[:10] for commit in of['commits'])}"
        )
        found = [Panel(", ".join(about), rows) for about, rows in panels.items()]
        recall = {rate["planted"]: _share(rate) for rate in values["recall"]}
        return GateErrorRates(found, recall, origin) if found else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} is no file of gate_validation: {error!r}") from error


def _share(rate: dict[str, Any]) -> AlarmRate:
    low, high = (float(x) for x in rate["interval"])
    alarms, runs = int(rate["alarms"]), int(rate["runs"])
    if not 0 <= alarms <= runs or not runs:
        raise ValueError(f"{alarms} alarms in {runs} runs")
    return AlarmRate(alarms, runs, low, high, float(rate.get("slowdown", 0)))
