"""The recorded run that a command is about: a folder, a run's id, or the last run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from danon.cli.options import check_folder, refuse

if TYPE_CHECKING:
    from danon.runs.journal import RecordedRun

__all__ = ["find_run"]

MOST_NAMED = 3
"""Runs that an error offers instead of an unknown one."""


def find_run(run: Path | None, results: Path, console: Console) -> RecordedRun:
    """Return a recorded run; refuse one that is not there or cannot be read.

    Args:
        run: its folder, or its id: the name of its folder in ``results``. None: the last run.
        results: folder of all runs.
        console: hears which later runs cannot be read where the last one is looked for.
    """
    from danon.console.messages import pass_over
    from danon.runs.journal import RecordedRun, recorded_runs
    from danon.runs.schema import SchemaError

    if run is None or not run.is_dir():
        check_folder("--results", results, write=False)
    if run is None:
        unreadable = list[str]()
        last = next(recorded_runs(results, unreadable.append), None)
        for why in unreadable:
            pass_over(console, why)
        state = "can be read" if unreadable else "is recorded"
        return last or refuse(
            f"no run {state} under {results}; `danon bench` records one, --results FOLDER reads "
            "another folder"
        )
    folder = run if run.is_dir() else results / run
    if not folder.is_dir():
        found = sorted((file.parent.name for file in results.glob("*/run.json")), reverse=True)
        there = f"the last are {', '.join(found[:MOST_NAMED])}" if found else "there is none"
        refuse(f"{run} is no recorded run: neither a folder nor a run under {results}; {there}")
    try:
        return RecordedRun.read(folder)
    except (FileNotFoundError, SchemaError) as error:
        refuse(str(error))
