"""The command ``danon tune``, and ``danon tune worker``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup, TyperOption

from danon.cli.options import (
    Address,
    Device,
    Engine,
    check_folder,
    choice,
    command_line,
    length_option,
    refuse,
    results_option,
)
from danon.cli.values import integer, one_of, some_of
from danon.console.exit_status import DONE
from danon.runs.case import DTYPES
from danon.tuned import HYPERPARAMETERS
from danon.tuning.objective import BALANCED, FIGURES, SAMPLERS

__all__ = ["app"]


def _kinds() -> tuple[str, ...]:
    from danon.tuning import target

    return target.names()


class _TuneGroup(TyperGroup):
    """The group whose help lists the kinds of study, looked up only when it is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the names of all kinds."""
        for parameter in self.params:
            if parameter.name == "kind" and isinstance(parameter, TyperOption):
                parameter.help = f"Kind of study: {', '.join(_kinds())}."
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
        "the repository.",
        metavar="URL",
    ),
]


@app.callback()
def tune(
    context: typer.Context,
    mechanism: Annotated[
        str,
        typer.Option(
            help="Attention to tune, by registered name; `danon tune` alone lists them.",
            metavar="NAME",
        ),
    ] = "",
    attention: Annotated[
        str,
        typer.Option(
            help="Attention of your own to tune, instead of --mechanism.", metavar="FILE.py:CLASS"
        ),
    ] = "",
    objective: Annotated[
        str,
        typer.Option(
            help=f"Figures to improve: {BALANCED}, or some of {', '.join(FIGURES)}, comma "
            "separated.",
            parser=some_of((BALANCED, *FIGURES)),
            metavar="NAMES",
        ),
    ] = BALANCED,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest allowed figure of an objective, as quality=0.05. May be repeated. "
            "Default: none.",
            metavar="NAME=NUMBER",
        ),
    ] = None,
    length: Annotated[
        int | None,
        length_option("Length of the sequences. Default: set by the kind, 16k for most."),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            help="Number of finished trials that the study is to have.",
            parser=integer(1),
            metavar="N",
        ),
    ] = 60,
    kind: Annotated[
        str, typer.Option(help="Kind of study.", parser=one_of(_kinds), metavar="NAME")
    ] = HYPERPARAMETERS,
    dtype: Annotated[
        str | None,
        choice("Type of the numbers, by default set by the kind, bfloat16 for most", DTYPES),
    ] = None,
    device: Device = "cpu",
    sampler: Annotated[str, choice("Sampler of the choices", SAMPLERS)] = SAMPLERS[0],
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the sampler and of the measurements.", parser=integer(0), metavar="N"
        ),
    ] = 0,
    study: Annotated[
        str,
        typer.Option(help="Name of the study. Default: made from the options.", metavar="STUDY"),
    ] = "",
    storage: Storage = "",
    engine: Engine = "local",
    address: Address = "",
    *,
    results: Annotated[Path, results_option("Folder to write tuned/ and tune/ to.")],
) -> None:
    """Search better settings of an attention; the same command continues its study."""
    if context.invoked_subcommand is not None:
        return
    if not (mechanism or attention):
        _list_or_refuse(context)
    if mechanism and attention:
        refuse(f"--attention {attention} beside --mechanism {mechanism}: give one of them")
    if ":" in mechanism:
        refuse(f"--mechanism {mechanism}: must be a registered name; your own is --attention")
    if attention and ":" not in attention:
        refuse(f"--attention {attention}: must be file.py:Class; a name is for --mechanism")
    check_folder("--results", results)
    from danon.tuning.command import Options, Search
    from danon.tuning.command import tune as run
    from danon.tuning.subject import Subject

    options = Options(
        Subject(kind, mechanism or attention, device, length, dtype),
        Search(objective, tuple(limit or ()), sampler, seed, trials),
        results,
        study,
        storage,
        engine,
        address,
        command_line(),
    )
    raise typer.Exit(run(options, Console(emoji=False)))


def _list_or_refuse(context: typer.Context) -> None:
    """List what can be tuned where no option is given; refuse other options without a subject."""
    from danon.cli.tuning_terminal import names, print_tunable

    sources = (context.get_parameter_source(name) for name in context.params)
    if all(source is None or source.name == "DEFAULT" for source in sources):
        print_tunable(Console(emoji=False))
        raise typer.Exit(DONE)
    refuse(f"--mechanism is missing: {', '.join(names())}; or --attention file.py:Class")


@app.command()
def worker(
    study: Annotated[
        str, typer.Option(help="Name of a study that danon tune has begun.", metavar="STUDY")
    ],
    storage: Storage = "",
    trials: Annotated[
        int,
        typer.Option(
            help="Number of finished trials to reach; 0: as many as danon tune asked for.",
            parser=integer(0),
            metavar="N",
        ),
    ] = 0,
) -> None:
    """Run trials of a study beside its other workers."""
    from danon.tuning.command import join

    raise typer.Exit(join(study, storage, trials, Console(emoji=False), command_line()))
