"""The command ``danon tune``, and ``danon tune worker``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup, TyperOption

from danon.cli.options import Address, Device, Engine, command_line, results_option
from danon.tuned import HYPERPARAMETERS

__all__ = ["app"]


class _TuneGroup(TyperGroup):
    """The group whose help lists the kinds of study, looked up only when it is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the names of all kinds."""
        from danon.tuning import target

        for parameter in self.params:
            if parameter.name == "kind" and isinstance(parameter, TyperOption):
                parameter.help = f"Kind of study: {', '.join(target.names())}."
        super().format_help(ctx, formatter)


app = typer.Typer(
    cls=_TuneGroup,
    help="Search better settings of an attention, or join a study.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
Storage = Annotated[
    str,
    typer.Option(
        help="Database of studies: postgresql+psycopg://... or sqlite:///... Default: a file of "
        "the repository."
    ),
]


@app.callback()
def tune(
    context: typer.Context,
    mechanism: Annotated[
        str, typer.Option(help="Attention to tune: a registered name, or file.py:Class.")
    ] = "",
    objective: Annotated[
        str,
        typer.Option(
            help="Figures to improve: balanced, or some of speed, memory, quality, parameters, "
            "comma separated."
        ),
    ] = "balanced",
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest allowed figure of an objective, as quality=0.05. May be repeated. "
            "Default: none."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Length of the sequences, in tokens. Default: set by the kind, 16384 for most."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Number of finished trials that the study is to have.")
    ] = 60,
    kind: Annotated[str, typer.Option(help="Kind of study.")] = HYPERPARAMETERS,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the numbers: float32, bfloat16 or float16. Default: set by the kind, "
            "bfloat16 for most."
        ),
    ] = None,
    device: Device = "cpu",
    sampler: Annotated[str, typer.Option(help="Sampler of the choices: tpe or random.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Seed of the sampler and of the measurements.")] = 0,
    study: Annotated[
        str, typer.Option(help="Name of the study. Default: made from the options.")
    ] = "",
    storage: Storage = "",
    engine: Engine = "local",
    address: Address = "",
    *,
    results: Annotated[Path, results_option("Folder to write tuned/ and tune/ to.")],
) -> None:
    """Search better settings of an attention; the same command continues its study."""
    from danon.tuning.command import Options, Search
    from danon.tuning.command import tune as run
    from danon.tuning.subject import Subject

    if context.invoked_subcommand is not None:
        return
    options = Options(
        Subject(kind, mechanism, device, length, dtype),
        Search(objective, tuple(limit or ()), sampler, seed, trials),
        results,
        study,
        storage,
        engine,
        address,
        command_line(),
    )
    raise typer.Exit(run(options, Console()))


@app.command()
def worker(
    study: Annotated[str, typer.Option(help="Name of a study that danon tune has begun.")],
    storage: Storage = "",
    trials: Annotated[
        int,
        typer.Option(
            help="Number of finished trials to reach; 0: as many as danon tune asked for."
        ),
    ] = 0,
) -> None:
    """Run trials of a study beside its other workers."""
    from danon.tuning.command import join

    raise typer.Exit(join(study, storage, trials, Console(), command_line()))
