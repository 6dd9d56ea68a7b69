"""``danon gate`` and ``danon calibrate``: check commits out, measure, say it in every form."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table

from danon.console.messages import refuse, say
from danon.gate import result_report
from danon.gate.acceptance import accept, allowances, recalibrated
from danon.gate.against_commit import compare_commits
from danon.gate.against_thresholds import (
    ELSEWHERE,
    PEAK_ELSEWHERE,
    measure_against_thresholds,
    measure_thresholds,
)
from danon.gate.checkout import Checkout, Repository
from danon.gate.gate_recorder import recorded, register
from danon.gate.history import changes, draw, points
from danon.gate.result import UNDECIDED, GateResult
from danon.gate.thresholds import Threshold, Thresholds, ThresholdsError
from danon.gate.workspace import Options, guarded, open_workspace
from danon.measure.fingerprint import fingerprint
from danon.runs.files import replace_file

__all__ = ["acceptance", "calibrate", "gate", "history"]

THRESHOLDS = Path("results") / "thresholds.json"
"""In the repository; so is ``MODELS``, the trained models that thresholds of recall are about."""
MODELS = Path("results") / "recall"


def gate(options: Options, console: Console) -> int:
    """Compare; returns the exit status."""
    if not options.minutes > 0:  # nor not a number
        refuse(console, f"--time-limit-minutes {options.minutes:g}: must be positive")
        return UNDECIDED
    return guarded(console, lambda: _gate(options, console))


def calibrate(options: Options, pairs: int, console: Console) -> int:
    """Measure the thresholds of what is checked out; returns the exit status."""
    if pairs < 2:
        refuse(console, f"--pairs {pairs}: must be at least 2")
        return UNDECIDED
    return guarded(console, lambda: _calibrate(options, pairs, console))


def history(name: str, results: Path, console: Console) -> int:
    """Show where the time of a case changed over the runs of the gate."""

    def run() -> int:
        some = points(name)
        path = results / f"history-{name.replace('/', '-')}.png"
        found = changes(some)
        draw(name, some, found, path)
        at = {change.at: change for change in found}
        table = Table("run", "commit", "time over dense", "change", box=None, pad_edge=False)
        for number, point in enumerate(some):
            when = dt.datetime.fromtimestamp(point.when / 1000, dt.UTC)
            change = f"{at[number].ratio - 1:+.1%} from here on" if number in at else ""
            table.add_row(
                f"{when:%Y-%m-%d %H:%M}",
                point.commit[:10],
                f"{point.relative_time:.4g}",
                f"[bold red]{change}[/]",
            )
        console.print(table)
        say(console, "Written", str(path))
        return 0

    return guarded(console, run)


def acceptance(names: str, why: str, results: Path, console: Console) -> int:
    """Move the thresholds of cases to what the last comparison measured."""

    def run() -> int:
        repository = Repository(Path.cwd())
        place = repository.root / THRESHOLDS
        known = Thresholds.read(place)
        moved = accept(known, results / result_report.FILES[0], names, why=why, by=repository.user)
        moved.write(place)
        for name, new in moved.cases.items():
            if new is not known.cases[name]:
                changes = ", ".join(_changes(new)) or "as it was"
                say(console, "Accepted", f"{name}: {changes}")
        say(console, "Written", f"{place}: commit it with what costs it")
        say(console, "MLflow", register(moved, why))
        return 0

    return guarded(console, run)


def _changes(new: Threshold) -> Iterator[str]:
    """From what was before the last entry of its history."""
    old = new.history[-1]
    if new.time is not None:
        yield f"{old.relative_time:.4g} -> {new.time.relative:.4g} of dense attention's time"
    for figure, value in new.facts.items():
        if old.facts.get(figure, value) != value:
            yield f"{figure} {old.facts[figure]:g} -> {value:g}"


def _gate(options: Options, console: Console) -> int:
    start, here = perf_counter(), fingerprint(torch.device("cpu"))
    end = start + 60 * options.minutes
    when = dt.datetime.now(dt.UTC)
    with open_workspace(options, console) as bench:
        accepted: Thresholds | None = None
        if options.against:
            base = bench.repository.base(options.against, bench.scratch / "base")
            commit, subject = base.commit, base.subject
            before, remark = _accepted_before(base)
            rows = compare_commits(
                replace(bench.side, name="base", root=base.root),
                bench.side,
                options.cases,
                bench.inputs,
                bench.log,
                bench.models(bench.scratch / "models"),
                end=end,
                say=bench.say,
                allowed=allowances(before, _thresholds(bench.head)),
            )
        else:
            accepted = Thresholds.read(bench.head.root / THRESHOLDS)
            commit, subject = accepted.commit, f"thresholds of {accepted.when}"
            remark = _remark(accepted, here)
            rows = measure_against_thresholds(
                bench.side,
                accepted,
                options.cases,
                bench.inputs,
                bench.log,
                bench.models(bench.head.root / MODELS),
                fingerprint=here,
                end=end,
                say=bench.say,
            )
    found = GateResult(
        commit,
        bench.head.commit,
        subject,
        bench.head.subject,
        tuple(rows),
        when,
        perf_counter() - start,
        here,
        remark,
        elsewhere=accepted is not None and not accepted.same_machine(here),
    )
    try:  # neither a full disk nor a reader who is gone costs what was measured
        result_report.render(found, console)
    finally:
        result_report.write(found, options.results)
    say(console, "Written", f"{options.results}/{', '.join(result_report.FILES)}")
    say(console, "MLflow", recorded(found, options.results))
    if accepted is not None:
        say(console, "", register(accepted, "read from the repository"))
    return found.status


def _calibrate(options: Options, pairs: int, console: Console) -> int:
    start = perf_counter()
    with open_workspace(options, console) as bench:
        found, without = measure_thresholds(
            bench.side,
            options.cases,
            bench.inputs,
            bench.log,
            bench.models(bench.scratch / "models"),
            pairs=pairs,
            say=bench.say,
        )
        place, before = bench.repository.root / THRESHOLDS, _thresholds(bench.head)
        commit, by = bench.head.commit, bench.repository.user
        known = {} if before is None else before.cases
        thresholds = Thresholds(
            commit=commit,
            when=dt.datetime.now(dt.UTC).date().isoformat(),
            pairs=pairs,
            fingerprint=fingerprint(torch.device("cpu")),
            cases=recalibrated(known, found, commit=commit, by=by),
        )
        for trained in sorted(bench.scratch.glob("models/*.pt")):
            destination = bench.repository.root / MODELS / trained.name
            destination.parent.mkdir(parents=True, exist_ok=True)
            replace_file(destination, trained.read_bytes())
        thresholds.write(place)
    for name, reason in without.items():
        say(console, "", f"{name}: {reason}")
    took = f"{perf_counter() - start:.0f} s"
    console.print(f"{len(found)} of {len(options.cases)} cases calibrated in {took}")
    say(console, "Written", f"{place}, {MODELS.name}/: commit them")
    say(console, "MLflow", register(thresholds, "calibrated"))
    return 0


def _accepted_before(base: Checkout) -> tuple[Thresholds | None, str]:
    """Thresholds of a base, which nobody can mend any more, and a remark if they are no use."""
    try:
        return _thresholds(base), ""
    except ThresholdsError as error:
        return None, f"What was accepted since the base is not known: {error}"


def _thresholds(checkout: Checkout) -> Thresholds | None:
    """Those of a checkout, if it has any.

    Raises:
        ThresholdsError: it has, and they are wrong.
    """
    place = checkout.root / THRESHOLDS
    return Thresholds.read(place) if place.exists() else None


def _remark(accepted: Thresholds, here: dict[str, str]) -> str:
    if accepted.same_machine(here):
        return ""
    bytes_too = accepted.comparable(here)
    memory = f" or takes {PEAK_ELSEWHERE:g} times the memory" if bytes_too else ""
    exact = "" if bytes_too else "; bytes and graph breaks are not compared"
    theirs = accepted.fingerprint
    of = f"{theirs.get('cpu')}, {theirs.get('cpu_capability')}, torch {theirs.get('torch')}"
    return (
        f"The thresholds are of another machine ({of}): only what is {ELSEWHERE[0]:g} times as "
        f"slow beside dense attention{memory} is a regression{exact}. --against compares both "
        "exactly on any machine."
    )
