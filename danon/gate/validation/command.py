"""``danon gate-validate``: measure rounds whose truth is known, and say how often the gate errs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from danon.console.messages import refuse, say
from danon.gate.checkout import CheckoutError
from danon.gate.command import MODELS
from danon.gate.paired_processes import WorkerError
from danon.gate.result import UNDECIDED
from danon.gate.validation.collect import PROGRAMS, collect
from danon.gate.validation.error_rate_plot import draw
from danon.gate.validation.error_rates import ENOUGH, Rate, rates
from danon.gate.validation.other_tools import RIVALS, Rule
from danon.gate.validation.recall_rounds import collect_recall, recall_rates
from danon.gate.validation.rounds import read
from danon.gate.workspace import Options, guarded, open_workspace
from danon.measure.fingerprint import fingerprint
from danon.runs.files import replace_file
from danon.runs.locks import hold_lock

__all__ = ["gate_validation"]


def gate_validation(load: str, minutes: float, results: Path, console: Console) -> int:
    """Add rounds to a folder for so many minutes, replay all that it has; returns the exit status.

    Args:
        load: what else the machine does meanwhile.
        minutes: 0 to replay only.
        results: gets rounds.jsonl, recall.jsonl, rates.json and power.png.
    """
    if load not in PROGRAMS or minutes < 0:
        known = ", ".join(map(repr, PROGRAMS))
        refuse(console, f"--load {load!r}, --minutes {minutes:g}: must be one of {known}, and >= 0")
        return UNDECIDED
    place, recall = results / "rounds.jsonl", results / "recall.jsonl"

    def run() -> int:
        results.mkdir(parents=True, exist_ok=True)
        if minutes:
            options, end = Options((), "", False, minutes, results), perf_counter() + 60 * minutes
            busy = WorkerError(f"another gate-validate measures into {results} already")
            with (
                hold_lock(results / ".lock", busy),  # or neither would be quiet
                open_workspace(options, console, committed=True) as bench,
            ):
                if not (bench.head.root / "danon" / "attention").is_dir():
                    raise CheckoutError(f"{bench.repository.root} is no checkout of danon")
                answers = collect_recall(
                    bench.side,
                    bench.head.commit,
                    options.cases,
                    bench.inputs,
                    bench.log,
                    bench.models(bench.head.root / MODELS),
                    recall,
                    end=end,
                    say=bench.say,
                )
                count = collect(
                    bench.side,
                    bench.head.commit,
                    options.cases,
                    bench.inputs,
                    bench.log,
                    place,
                    load=load,
                    machine=fingerprint(torch.device("cpu"))["cpu"],
                    end=end,
                    say=bench.say,
                )
            say(console, "Measured", f"{count} rounds, {place}; {answers} times recall, {recall}")
        for rate in recall_rates(recall):
            low, high = rate.interval
            words = f"{rate.alarms} alarms in {rate.runs} runs, {low:.1%} to {high:.1%}"
            say(console, "Recall", f"{rate.planted}: {words}")
        rounds = read(place)
        found = rates(rounds, _rivals(console))
        values: dict[str, Any] = {
            kind: [{**dataclasses.asdict(rate), "interval": rate.interval} for rate in some]
            for kind, some in (("time", found), ("recall", recall_rates(recall)))
        }
        days = [some.when for some in rounds]
        values["measured"] = {
            "rounds": len(rounds),
            "first": min(days, default=""),
            "last": max(days, default=""),
            "commits": list(dict.fromkeys(some.commit for some in rounds)),
        }
        replace_file(results / "rates.json", (json.dumps(values, indent=1) + "\n").encode())
        say(console, "Written", f"{results}/rates.json")
        if not found:
            say(console, "", f"a run takes up to {ENOUGH} rounds of a kind: none has as many yet")
            return 0
        draw(found, results / "power.png")
        for about in dict.fromkeys((rate.machine, rate.load) for rate in found):
            console.print(f"\n{', '.join(about)}", style="bold", highlight=False)
            console.print(_table([r for r in found if (r.machine, r.load) == about]))
        say(console, "Written", f"{results}/power.png")
        return 0

    return guarded(console, run)


def _rivals(console: Console) -> dict[str, Rule]:
    """Those that are installed."""
    found = {}
    for name, make in RIVALS.items():
        try:
            found[name] = make()
        except ModuleNotFoundError as error:
            say(
                console,
                "",
                f"{name}: {error.name} is not installed (nox -s gate_validation has it)",
            )
    return found


def _table(found: Sequence[Rate]) -> Table:
    """Of one machine and load."""
    table = Table("planted", "method", box=None, pad_edge=False)
    for name in ("alarms", "95 %", "undecided", "rounds"):
        table.add_column(name, justify="right", no_wrap=True)
    for rate in found:
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
