"""The case being measured, stored on disk so that it survives the death of the whole bench."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from danon.runs.case import Case
from danon.runs.files import replace_file

__all__ = ["MOST", "begin", "end", "fatal"]

FILE = "attempt.json"
MOST = 2
"""Most attempts at a case that killed the bench each time."""


def begin(run_dir: Path, case: Case) -> None:
    """Store that a case has begun, and how many times in a row.

    Args:
        run_dir: folder of the run.
        case: about to be measured.
    """
    before, times = _read(run_dir)
    content = {"case": asdict(case), "times": times + 1 if before == case else 1}
    replace_file(run_dir / FILE, json.dumps(content).encode())


def end(run_dir: Path) -> None:
    """Remove the record: the bench survived the case."""
    (run_dir / FILE).unlink(missing_ok=True)


def fatal(run_dir: Path) -> Case | None:
    """Return the case that has killed the bench too often, or None."""
    case, times = _read(run_dir)
    return case if times >= MOST else None


def _read(run_dir: Path) -> tuple[Case | None, int]:
    file = run_dir / FILE
    if not file.is_file():
        return None, 0
    content = json.loads(file.read_text(encoding="utf-8"))
    return Case(**content["case"]), content["times"]
