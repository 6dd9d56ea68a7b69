"""``danon gate-power``: measure rounds whose truth is known, and say how often the gate errs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from danon.experiment.runs import replace_file
from danon.gate.checkout import CheckoutError
from danon.gate.command import MODELS
from danon.gate.comparison import UNDECIDED
from danon.gate.pair import WorkerError
from danon.gate.power.collect import PROGRAMS, collect
from danon.gate.power.draw import draw
from danon.gate.power.rates import ENOUGH, Rate, rates
from danon.gate.power.recall import collect_recall, recall_rates
from danon.gate.power.rivals import RIVALS, Rule
from danon.gate.power.rounds import read
from danon.gate.session import Options, guarded, opened, refuse, say
from danon.measure.fingerprint import fingerprint

__all__ = ["gate_power"]


def gate_power(load: str, minutes: float, results: Path, console: Console) -> int:
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
        if minutes:
            options = Options((), "", False, minutes, results)
            with _alone(results), opened(options, console, committed=True) as bench:
                if not (bench.head.root / "danon" / "attention").is_dir():
                    raise CheckoutError(f"{bench.repository.root} is no checkout of danon")
                answers = collect_recall(
                    bench.side, bench.head.commit, options.cases, bench.inputs, bench.log,
                    bench.models(bench.head.root / MODELS), recall, say=bench.say,
                )  # fmt: skip
                count = collect(
                    bench.side, bench.head.commit, options.cases, bench.inputs, bench.log, place,
                    load=load, machine=fingerprint(torch.device("cpu"))["cpu"], minutes=minutes,
                    say=bench.say,
                )  # fmt: skip
            say(console, "Measured", f"{count} rounds, {place}; {answers} times recall, {recall}")
        for rate in recall_rates(recall):
            low, high = rate.interval
            words = f"{rate.alarms} alarms in {rate.runs} runs, {low:.1%} to {high:.1%}"
            say(console, "Recall", f"{rate.planted}: {words}")
        found = rates(read(place), _rivals(console))
        values = {
            kind: [{**dataclasses.asdict(rate), "interval": rate.interval} for rate in some]
            for kind, some in (("time", found), ("recall", recall_rates(recall)))
        }
        replace_file(results / "rates.json", (json.dumps(values, indent=1) + "\n").encode())
        say(console, "Written", f"{results}/rates.json")
        if not found:
            say(console, "", f"a run takes up to {ENOUGH} rounds of a kind: none has as many yet")
            return 0
        draw(found, results / "power.png")
        console.print(_table(found))
        say(console, "Written", f"{results}/power.png")
        return 0

    return guarded(console, run)


@contextlib.contextmanager
def _alone(results: Path) -> Iterator[None]:
    """While nobody else measures into a folder: neither would be quiet."""
    results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(results / ".lock", timeout=0):
            yield
    except Timeout:
        raise WorkerError(f"another gate-power measures into {results} already") from None


def _rivals(console: Console) -> dict[str, Rule]:
    """Those that are installed."""
    found = {}
    for name, make in RIVALS.items():
        try:
            found[name] = make()
        except ModuleNotFoundError as error:
            say(console, "", f"{name}: {error.name} is not installed (nox -s gate_power has it)")
    return found


def _table(found: Sequence[Rate]) -> Table:
    table = Table("machine", "load", "planted", "method", box=None, pad_edge=False)
    for name in ("alarms", "runs", "share", "95 %", "undecided", "rounds", "disjoint"):
        table.add_column(name, justify="right")
    for rate in found:
        low, high = rate.interval
        planted = f"{rate.slowdown:+.0%}" if rate.slowdown else "nothing"
        table.add_row(
            rate.machine, rate.load, planted, rate.method, str(rate.alarms), str(rate.runs),
            f"{rate.alarms / rate.runs:.1%}", f"[{low:.1%}, {high:.1%}]".replace("[", r"\["),
            str(rate.undecided), str(rate.rounds), str(rate.disjoint),
        )  # fmt: skip
    return table
