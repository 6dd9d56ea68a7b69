"""The case that is being measured, on disk: what kills a bench as a whole leaves it there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from danon.runs.case import Case
from danon.runs.files import replace_file

__all__ = ["MOST", "begin", "end", "fatal"]

FILE = "attempt.json"
MOST = 2
"""Attempts at a case that ended with the bench; there is no further one."""


def begin(run_dir: Path, case: Case) -> None:
    """Note that a case is begun; of the same one again, how often."""
    before, times = _read(run_dir)
    content = {"case": asdict(case), "times": times + 1 if before == case else 1}
    replace_file(run_dir / FILE, json.dumps(content).encode())


def end(run_dir: Path) -> None:
    """Note that the bench has outlived the case."""
    (run_dir / FILE).unlink(missing_ok=True)


def fatal(run_dir: Path) -> Case | None:
    """The case that has ended the bench too often; None if there is none."""
    case, times = _read(run_dir)
    return case if times >= MOST else None


def _read(run_dir: Path) -> tuple[Case | None, int]:
    file = run_dir / FILE
    if not file.is_file():
        return None, 0
    content = json.loads(file.read_text(encoding="utf-8"))
    return Case(**content["case"]), content["times"]
