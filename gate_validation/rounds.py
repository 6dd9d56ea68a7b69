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
        slowdown: that was injected into the head; 0.05 takes 5 % more time.
        load: what else the machine did.
        commit: that was measured.
        machine: its processor.
        when: end of the round, UTC, ISO-8601.
        seconds: duration.
        measured: by :attr:`Case.id`.
    """

    slowdown: float
    load: str
    commit: str
    machine: str
    when: str
    seconds: float
    measured: dict[str, Measurement]


def append(path: Path, one: Round) -> None:
    """Add a round to a file, with its significant digits.

    Args:
        path: of the file.
        one: the round.
    """
    values = dataclasses.asdict(one)
    values["seconds"] = round(one.seconds, 1)
    values["measured"] = {
        name: [round(m.log_ratio, 5), *([float(f"{s:.4g}") for s in x] for x in (m.base, m.head))]
        for name, m in one.measured.items()
    }
    append_json(path, values)


def read(path: Path) -> list[Round]:
    """Read all rounds of a file; none if there is no file."""
    rounds = []
    for values in read_json_lines(path):
        measured = {
            name: Measurement(ratio, tuple(base), tuple(head))
            for name, (ratio, base, head) in values.pop("measured").items()
        }
        rounds.append(Round(measured=measured, **values))
    return rounds
