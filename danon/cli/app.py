"""The application ``danon``: one command a file."""

from __future__ import annotations

import typer

from danon.cli import tune
from danon.cli.bench import bench
from danon.cli.calibrate import calibrate
from danon.cli.choose import choose
from danon.cli.doctor import doctor
from danon.cli.explain import explain
from danon.cli.gate import gate
from danon.cli.history import history
from danon.cli.record import record
from danon.cli.report import report

__all__ = ["app"]

app = typer.Typer(
    help="Measure attention mechanisms.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (bench, report, explain, record, choose, gate, history, calibrate, doctor):
    app.command()(_command)
app.add_typer(tune.app, name="tune")
