"""The command ``danon record``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from danon.cli.options import refuse

__all__ = ["record"]


def record(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a run in results/runs, or of a gate.", metavar="FOLDER"),
    ],
) -> None:
    """Upload to MLflow what it does not yet have of a run or of a gate's comparison."""
    from danon.gate.gate_recorder import record as record_comparison
    from danon.gate.result import GateResult
    from danon.gate.result_report import FILES
    from danon.runs.schema import SchemaError
    from danon.tracking.bench_recorder import upload
    from danon.tracking.store import StoreError

    comparison, file = None, folder / FILES[0]
    if file.exists():
        try:
            comparison = GateResult.read(file)
        except ValueError as error:
            refuse(str(error))
    elif not (folder / "run.json").exists():
        refuse(f"{folder} has neither run.json nor {file.name}")
    try:
        print(upload(folder) if comparison is None else record_comparison(comparison))
    except (FileNotFoundError, SchemaError, StoreError) as error:
        refuse(str(error))
