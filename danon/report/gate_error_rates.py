"""Error rates of the gate, as the report shows them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["AlarmRate", "GateErrorRates", "Panel", "gate_error_rates"]

RATES = Path("gate_validation", "rates.json")
"""File of the rates, in the folder that contains the runs' folder."""


@dataclass(frozen=True)
class AlarmRate:
    """The share of runs with an alarm.

    Attributes:
        alarms: runs with an alarm.
        runs: all runs.
        low: lower end of the share's 95 % interval.
        high: upper end of it.
        slowdown: injected slowdown: 0.05 takes 5 % more time.
    """

    alarms: int
    runs: int
    low: float
    high: float
    slowdown: float = 0.0


@dataclass(frozen=True)
class Panel:
    """The rates on one machine under one load.

    Attributes:
        title: machine and load.
        rows: method -> rates by slowdown, the gate itself first.
    """

    title: str
    rows: dict[str, list[AlarmRate]]

    @property
    def slowdowns(self) -> list[float]:
        """Slowdowns of all methods, ascending."""
        return sorted({share.slowdown for row in self.rows.values() for share in row})


@dataclass(frozen=True)
class GateErrorRates:
    """Error rates that ``python -m gate_validation`` counted.

    Attributes:
        panels: rates by machine and load.
        recall: fault injected into trained models -> rate.
        origin: rounds, dates and commits.
    """

    panels: list[Panel]
    recall: dict[str, AlarmRate]
    origin: str


def gate_error_rates(report: Path) -> GateErrorRates | None:
    """Read the error rates stored beside the runs; None without a file or with too few rounds.

    Args:
        report: results/runs/<run>/report.html.

    Raises:
        ValueError: the file was not written by ``python -m gate_validation``.
    """
    file = report.resolve().parent.parent.parent / RATES
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        panels: dict[tuple[str, str], dict[str, list[AlarmRate]]] = {}
        for rate in values["time"]:
            rows = panels.setdefault((rate["machine"], rate["load"]), {})
            rows.setdefault(rate["method"], []).append(_share(rate))
        measured = values["measured"]
        origin = (
            f"{measured['rounds']} rounds, {measured['first'][:10]} to {measured['last'][:10]}, "
            f"commits {', '.join(commit[:10] for commit in measured['commits'])}"
        )
        pages = [Panel(", ".join(title), rows) for title, rows in panels.items()]
        recall = {rate["planted"]: _share(rate) for rate in values["recall"]}
        return GateErrorRates(pages, recall, origin) if pages else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} was not written by gate_validation: {error!r}") from error


def _share(rate: dict[str, Any]) -> AlarmRate:
    low, high = (float(x) for x in rate["interval"])
    alarms, runs = int(rate["alarms"]), int(rate["runs"])
    if not 0 <= alarms <= runs or not runs:
        raise ValueError(f"{alarms} alarms in {runs} runs")
    return AlarmRate(alarms, runs, low, high, float(rate.get("slowdown", 0)))
