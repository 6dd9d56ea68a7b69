"""The application ``danon``: one command a file."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from danon.cli import tune
from danon.cli.bench import bench
from danon.cli.calibrate import calibrate
from danon.cli.choose import choose
from danon.cli.compare import compare
from danon.cli.doctor import doctor
from danon.cli.explain import explain
from danon.cli.gate import gate
from danon.cli.history import history
from danon.cli.plan import plan
from danon.cli.record import record
from danon.cli.report import report
from danon.cli.train import train
from danon.cli.usage_errors import CommandGroup
from danon.cli.version import print_version
from danon.console.exit_status import DONE

__all__ = ["app"]

NARROW = 70
"""Columns of a terminal below which boxes would cut the names of options."""

app = typer.Typer(
    cls=CommandGroup,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None if shutil.get_terminal_size().columns < NARROW else "rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 done with a negative answer, 2 refused; docs/commands.md lists "
    "all.",
)


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of danon, torch and Python, and the commit.",
            is_eager=True,
            callback=print_version,
        ),
    ] = False,
) -> None:
    """Measure attention mechanisms."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(DONE)


_COMMANDS = (
    bench,
    report,
    compare,
    explain,
    record,
    choose,
    gate,
    history,
    calibrate,
    train,
    plan,
    doctor,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(tune.app, name="tune")
