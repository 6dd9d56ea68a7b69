"""The command ``python -m gate_validation``: measure rounds and count how often the gate errs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from danon.console.messages import refuse, say
from danon.gate.checkout import CheckoutError, Repository
from danon.gate.guarded_run import run_guarded
from danon.gate.result import UNDECIDED
from danon.gate.worker_client import WorkerError
from danon.gate.workspace import Options, open_workspace
from danon.runs.files import replace_file
from danon.runs.folders import results_folder
from danon.runs.locks import hold_lock
from gate_validation.collect import PROGRAMS, collect
from gate_validation.error_rate_plot import draw
from gate_validation.error_rates import MIN_ROUNDS, Rate, error_rates
from gate_validation.other_tools import OTHER_TOOLS, Rule
from gate_validation.recall_rounds import RecallRate, collect_recall, recall_rates
from gate_validation.rounds import Round, read

__all__ = ["app", "validate"]

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    load: Annotated[
        str, typer.Option(help="Beside the measurements: quiet, 'busy core', 'memory traffic'.")
    ] = "quiet",
    minutes: Annotated[float, typer.Option(help="Of new rounds; 0 only counts.")] = 60,
    *,
    results: Annotated[
        Path,
        typer.Option(
            help="Folder with the rounds.",
            default_factory=lambda: results_folder("gate_validation"),
            show_default="results/gate_validation of the repository",
        ),
    ],
) -> None:
    """Measure how often the gate errs where the truth is known."""
    raise typer.Exit(validate(load, minutes, results, Console(emoji=False)))


def validate(load: str, minutes: float, results: Path, console: Console) -> int:
    """Add rounds to a folder, then count the errors in all its rounds; return the exit status.

    Args:
        load: a key of :data:`PROGRAMS`, run beside the measurements.
        minutes: duration of the measurements; 0 to count only.
        results: folder that gets rounds.jsonl, recall.jsonl, rates.json and power.png.
        console: gets tables and messages.
    """
    if load not in PROGRAMS or not minutes >= 0:  # nor not a number
        loads = ", ".join(map(repr, PROGRAMS))
        refuse(console, f"--load {load!r}, --minutes {minutes:g}: must be one of {loads}, and >= 0")
        return UNDECIDED

    def run() -> int:
        results.mkdir(parents=True, exist_ok=True)
        if minutes:
            _measure(load, minutes, results, console)
        return _count(results, console)

    return run_guarded(console, run)


def _measure(load: str, minutes: float, results: Path, console: Console) -> None:
    """Add rounds and answers to the folder."""
    rounds, recall = results / "rounds.jsonl", results / "recall.jsonl"
    end = perf_counter() + 60 * minutes
    options = Options((), "", False, math.inf, results)  # a round that has begun ends
    repository = Repository(Path.cwd())
    busy = WorkerError(f"another gate_validation measures into {results} already")
    with (
        hold_lock(results / ".lock", busy),  # of two at once neither would be quiet
        open_workspace(repository, options, console, committed=True) as workspace,
    ):
        if not (workspace.head.root / "danon" / "attention").is_dir():
            raise CheckoutError(f"{repository.root} is no checkout of danon")
        answers = collect_recall(workspace, options.cases, recall, end=end)
        count = collect(workspace, options.cases, rounds, load=load, end=end)
    say(console, "Measured", f"{count} rounds, {rounds}; {answers} times recall, {recall}")


def _count(results: Path, console: Console) -> int:
    """Count the errors, write rates.json and power.png, print tables."""
    of_recall = recall_rates(results / "recall.jsonl")
    for rate in of_recall:
        low, high = rate.interval
        text = f"{rate.alarms} alarms in {rate.runs} runs, {low:.1%} to {high:.1%}"
        say(console, "Recall", f"{rate.planted}: {text}")
    rounds = read(results / "rounds.jsonl")
    of_times = error_rates(rounds, _installed_tools(console))
    values = _stored(rounds, of_times, of_recall)
    replace_file(results / "rates.json", (json.dumps(values, indent=1) + "\n").encode())
    say(console, "Written", f"{results}/rates.json")
    if not of_times:
        say(console, "", f"a run takes up to {MIN_ROUNDS} rounds of a kind: none has as many yet")
        return 0
    draw(of_times, results / "power.png")
    for setting in dict.fromkeys((rate.machine, rate.load) for rate in of_times):
        console.print(f"\n{', '.join(setting)}", style="bold", highlight=False)
        console.print(_table([r for r in of_times if (r.machine, r.load) == setting]))
    say(console, "Written", f"{results}/power.png")
    return 0


def _stored(
    rounds: Sequence[Round], of_times: Sequence[Rate], of_recall: Sequence[RecallRate]
) -> dict[str, Any]:
    """Return the content of rates.json."""
    days = [one.when for one in rounds]
    return {
        "time": [{**dataclasses.asdict(rate), "interval": rate.interval} for rate in of_times],
        "recall": [{**dataclasses.asdict(rate), "interval": rate.interval} for rate in of_recall],
        "measured": {
            "rounds": len(rounds),
            "first": min(days, default=""),
            "last": max(days, default=""),
            "commits": list(dict.fromkeys(one.commit for one in rounds)),
        },
    }


def _installed_tools(console: Console) -> dict[str, Rule]:
    """Return the rules of the other tools that are installed."""
    rules = {}
    for name, make_rule in OTHER_TOOLS.items():
        try:
            rules[name] = make_rule()
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed (nox -s gate_validation has it)"
            say(console, "", f"{name}: {reason}")
    return rules


def _table(rates: Sequence[Rate]) -> Table:
    """Return a table of one machine and load."""
    table = Table("planted", "method", box=None, pad_edge=False)
    for name in ("alarms", "95 %", "undecided", "rounds"):
        table.add_column(name, justify="right", no_wrap=True)
    for rate in rates:
        low, high = rate.interval
        planted = f"{rate.slowdown:+.0%}" if rate.slowdown else "nothing"
        table.add_row(
            planted,
            rate.method,
            f"{rate.alarms} of {rate.runs}",
            f"{low:.1%} to {high:.1%}",
            str(rate.undecided),
            str(rate.rounds),
        )
    return table
