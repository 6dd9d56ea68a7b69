"""Tracebacks of the cases of a run, in its folder."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from danon.runs.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from danon.runs.case import Case, CaseResult

__all__ = ["FOLDER", "read", "write"]

FOLDER = "failures"
NAME_LENGTH = 150
"""Characters of a file name that come from the case."""


def write(run_dir: Path, case: Case, trace: str) -> None:
    """Store the traceback of a case, or the last output of the process that died at it.

    Args:
        run_dir: the folder of the run.
        case: that failed.
        trace: the text.
    """
    file = _file(run_dir, case)
    file.parent.mkdir(exist_ok=True)
    replace_file(file, trace.encode(errors="backslashreplace"))


def read(run_dir: Path, results: Iterable[CaseResult]) -> list[tuple[CaseResult, str]]:
    """Return the results that have a traceback, with it.

    Args:
        run_dir: the folder of the run.
        results: of its cases.
    """
    files = ((result, _file(run_dir, result.case)) for result in results)
    return [
        (result, file.read_text(encoding="utf-8", errors="replace"))
        for result, file in files
        if file.is_file()
    ]


def _file(run_dir: Path, case: Case) -> Path:
    """Return a readable file name, with a digest if it is cut."""
    name = re.sub(r"[^\w.+-]", "_", case.id.replace("/", "-"))
    if len(name) > NAME_LENGTH:
        name = f"{name[:NAME_LENGTH]}-{hashlib.sha256(case.id.encode()).hexdigest()[:8]}"
    return run_dir / FOLDER / f"{name}.txt"
