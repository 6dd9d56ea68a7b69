"""Rounds of the gate whose truth is known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from danon.gate.paired_processes import Measurement
from danon.runs.jsonl import append_json, read_json_lines

__all__ = ["Round", "append", "read"]


@dataclass(frozen=True)
class Round:
    """Every case once, in one pair of processes.

    Attributes:
        slowdown: that was planted in the head: 0.05 takes 5 % more time.
        load: what else the machine did.
        machine: its processor.
        measured: by :attr:`Case.id`.
    """

    slowdown: float
    load: str
    commit: str
    machine: str
    when: str
    seconds: float
    measured: dict[str, Measurement]


def append(place: Path, some: Round) -> None:
    """Add a round to a file, with the digits that mean something."""
    values = dataclasses.asdict(some)
    values["seconds"] = round(some.seconds, 1)
    values["measured"] = {
        name: [round(m.log_ratio, 5), *([float(f"{s:.4g}") for s in x] for x in (m.base, m.head))]
        for name, m in some.measured.items()
    }
    append_json(place, values)


def read(place: Path) -> list[Round]:
    """All rounds of a file; none if there is no file."""
    found = []
    for values in read_json_lines(place):
        measured = {
            name: Measurement(ratio, tuple(base), tuple(head))
            for name, (ratio, base, head) in values.pop("measured").items()
        }
        found.append(Round(measured=measured, **values))
    return found
