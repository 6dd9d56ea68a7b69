"""The command ``danon compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from danon.cli.options import RunsFolder, refuse
from danon.cli.recorded_run import find_run
from danon.console import messages
from danon.console.exit_status import DONE, NEGATIVE, NOT_WRITTEN

if TYPE_CHECKING:
    from danon.report.comparison import Comparison

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="One or two recorded runs, the earlier first: a folder, or an id below --results.",
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
    from danon.runs.files import UNWRITABLE

    comparison = _comparison(runs, attention, beside, results)
    if html is not None:
        try:
            write_page(comparison, html)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            messages.refuse(Console(emoji=False), str(error))
            raise typer.Exit(NOT_WRITTEN) from error
    if as_json:
        print(to_json(comparison))
    else:
        console = Console(emoji=False)
        print_comparison(comparison, console, everything=everything)
        if html is not None:
            console.print(f"Page      {html}", soft_wrap=True, highlight=False)
    if all(figure.outcome == "untested" for figure in comparison.figures):
        refuse(f"nothing can be compared: {_why(comparison)}")
    raise typer.Exit(NEGATIVE if comparison.moved or comparison.broken else DONE)


def _comparison(runs: list[str], attention: str, beside: str, results: Path) -> Comparison:
    """Return the comparison that was asked for, or refuse."""
    from danon.report.comparison import compare_attentions, compare_runs

    if len(runs) > 2:
        refuse(f"{len(runs)} runs are given: compare two, or two attentions of one")
    if len(runs) == 1 and not (attention and beside):
        refuse("one run is given: name a second run, or two attentions: --attention A --with B")
    if len(runs) == 2 and beside:
        refuse(f"--with {beside} compares attentions of one run, and two runs are given")
    recorded = [find_run(Path(run), results, Console(emoji=False)) for run in runs]
    try:
        if len(recorded) == 1:
            return compare_attentions(recorded[0], attention, beside)
        before, after = recorded
        return compare_runs(before, after, attention)
    except ValueError as error:
        refuse(str(error))


def _why(comparison: Comparison) -> str:
    """Return the reasons why nothing can be compared, the most frequent first."""
    one, other = (run.info.fingerprint for run in (comparison.before, comparison.after))
    if one.get("device", "cpu") != other.get("device", "cpu"):
        return f"the runs are of two devices, {one.get('device')} and {other.get('device')}"
    reasons = [f"{count} {reason}" for reason, count in comparison.reasons.items()]
    return "; ".join(reasons) or "neither side has figures"
