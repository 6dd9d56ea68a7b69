"""The command ``danon compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from danon.cli.options import RunsFolder, refuse
from danon.cli.output_files import check_file, exit_if_unwritable
from danon.cli.recorded_run import find_run
from danon.console.exit_status import DONE, NEGATIVE

if TYPE_CHECKING:
    from danon.report.comparison import Comparison
    from danon.runs.journal import RecordedRun

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN[,RUN ...]",
            help="One or two recorded runs, the earlier first: a folder, or an id below --results. "
            "Repeated runs of one code, separated by commas, count together: smaller changes stand "
            "out.",
        ),
    ],
    *,
    attention: Annotated[
        str,
        typer.Option(help="Attention to compare, by registered name. Default: all of two runs."),
    ] = "",
    beside: Annotated[
        str, typer.Option("--with", help="Attention of the same run to compare it with.")
    ] = "",
    results: RunsFolder,
    everything: Annotated[
        bool, typer.Option("--all", help="List every figure, not only what moved.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every figure as JSON instead of tables.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="HTML file to write every figure to. Default: none.")
    ] = None,
) -> None:
    """Compare two runs of one machine, or two attentions of one run, and say what moved.

    Exit status: 0 nothing moved; 1 a figure moved, or a case failed on one side only; 2 bad input,
    or nothing can be compared.
    """
    from danon.report.comparison_output import to_json, write_page
    from danon.report.terminal_comparison import print_comparison

    if html is not None:
        check_file("--html", html)
    comparison, console = _comparison(runs, attention, beside, results), Console(emoji=False)
    with exit_if_unwritable():
        try:
            if html is not None:
                write_page(comparison, html)
        finally:
            if as_json:
                print(to_json(comparison))
            else:
                print_comparison(comparison, console, everything=everything)
    if html is not None and not as_json:
        console.print(f"Page      {html}", soft_wrap=True, highlight=False)
    if all(figure.outcome == "untested" for figure in comparison.figures):
        refuse(f"nothing can be compared: {_why(comparison)}")
    raise typer.Exit(NEGATIVE if comparison.moved or comparison.broken else DONE)


def _comparison(runs: list[str], attention: str, beside: str, results: Path) -> Comparison:
    """Return the comparison that was asked for, or refuse."""
    from danon.report.comparison import compare_attentions, compare_runs

    if len(runs) > 2:
        refuse(
            f"{len(runs)} runs are given: compare two, two attentions of one, or repeated runs "
            "separated by commas: A,B C,D"
        )
    if len(runs) == 1 and not (attention and beside):
        refuse("one run is given: name a second run, or two attentions: --attention A --with B")
    if len(runs) == 2 and beside:
        refuse(f"--with {beside} compares attentions of one run, and two runs are given")
    sides = [_find_runs(side, results) for side in runs]
    try:
        if len(sides) == 1:
            if len(sides[0]) > 1:
                refuse(f"{runs[0]} is {len(sides[0])} runs: attentions are compared within one")
            return compare_attentions(sides[0][0], attention, beside)
        before, after = sides
        return compare_runs(before, after, attention)
    except ValueError as error:
        refuse(str(error))


def _find_runs(names: str, results: Path) -> list[RecordedRun]:
    """Return the runs of one side, whose names are separated by commas."""
    console = Console(emoji=False)
    if Path(names).is_dir():  # a folder's name may have a comma
        return [find_run(Path(names), results, console)]
    return [find_run(Path(name.strip()), results, console) for name in names.split(",")]


def _why(comparison: Comparison) -> str:
    """Return the reasons why nothing can be compared, the most frequent first."""
    one, other = (side[0].info.fingerprint for side in comparison.runs)
    if one.get("device", "cpu") != other.get("device", "cpu"):
        return f"the runs are of two devices, {one.get('device')} and {other.get('device')}"
    reasons = [f"{count} {reason}" for reason, count in comparison.reasons.items()]
    return "; ".join(reasons) or "neither side has figures"
