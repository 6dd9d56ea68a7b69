"""The commands ``danon gate``, ``danon calibrate`` and ``danon history``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table

from danon.console.messages import refuse, say
from danon.gate import result_report
from danon.gate.acceptance import accept, allowances, recalibrated
from danon.gate.against_commit import compare_commits
from danon.gate.against_thresholds import ELSEWHERE, PEAK_ELSEWHERE, measure_against_thresholds
from danon.gate.calibration import measure_thresholds
from danon.gate.case_history import draw_history, find_changes, read_points
from danon.gate.checkout import Checkout, Repository
from danon.gate.gate_recorder import register, try_record
from danon.gate.guarded_run import run_guarded
from danon.gate.result import UNDECIDED, GateResult
from danon.gate.thresholds import Threshold, Thresholds, ThresholdsError
from danon.gate.workspace import MODELS, THRESHOLDS, Options, open_workspace
from danon.measure.fingerprint import fingerprint
from danon.runs.files import replace_file

__all__ = ["accept_cases", "calibrate", "gate", "history"]


def gate(options: Options, console: Console) -> int:
    """Compare the head with a base or with thresholds; return the exit status.

    Args:
        options: choices of the user.
        console: gets the result.
    """
    if not options.time_limit_minutes > 0:  # nor not a number
        refuse(console, f"--time-limit-minutes {options.time_limit_minutes:g}: must be positive")
        return UNDECIDED
    return run_guarded(console, lambda: _gate(options, console))


def calibrate(options: Options, pairs: int, console: Console) -> int:
    """Measure the thresholds of what is checked out; return the exit status.

    Args:
        options: choices of the user.
        pairs: number of pairs of fresh processes, for each case.
        console: gets messages.
    """
    if pairs < 2:
        refuse(console, f"--pairs {pairs}: must be at least 2")
        return UNDECIDED
    return run_guarded(console, lambda: _calibrate(options, pairs, console))


def history(name: str, results: Path, console: Console) -> int:
    """Show where the time of a case changed over the runs of the gate; return the exit status.

    Args:
        name: :attr:`Case.id` of the case.
        results: folder that gets the plot.
        console: gets the table.
    """
    return run_guarded(console, lambda: _history(name, results, console))


def accept_cases(names: str, reason: str, results: Path, console: Console) -> int:
    """Move thresholds to what the last comparison measured; return the exit status.

    Args:
        names: a case, or a shell pattern of regressions.
        reason: for the history.
        results: folder with the last comparison.
        console: gets messages.
    """
    return run_guarded(console, lambda: _accept_cases(names, reason, results, console))


def _history(name: str, results: Path, console: Console) -> int:
    points = read_points(name)
    changes = find_changes(points)
    path = results / f"history-{name.replace('/', '-')}.png"
    draw_history(name, points, changes, path)
    by_index = {change.at: change for change in changes}
    table = Table("run", "commit", "time over dense", "change", box=None, pad_edge=False)
    for index, point in enumerate(points):
        when = dt.datetime.fromtimestamp(point.when / 1000, dt.UTC)
        text = f"{by_index[index].ratio - 1:+.1%} from here on" if index in by_index else ""
        table.add_row(
            f"{when:%Y-%m-%d %H:%M}",
            point.commit[:10],
            f"{point.relative_time:.4g}",
            f"[bold red]{text}[/]",
        )
    console.print(table)
    say(console, "Written", str(path))
    return 0


def _accept_cases(names: str, reason: str, results: Path, console: Console) -> int:
    repository = Repository(Path.cwd())
    path = repository.root / THRESHOLDS
    before = Thresholds.read(path)
    moved = accept(
        before, results / result_report.FILES[0], names, reason=reason, user=repository.user
    )
    moved.write(path)
    for name, threshold in moved.cases.items():
        if threshold is not before.cases[name]:
            changes = ", ".join(_changes(threshold)) or "as it was"
            say(console, "Accepted", f"{name}: {changes}")
    say(console, "Written", f"{path}: commit it with what costs it")
    say(console, "MLflow", register(moved, reason))
    return 0


def _changes(threshold: Threshold) -> Iterator[str]:
    """Yield in words what the last entry of a history changed."""
    old = threshold.history[-1]
    if threshold.time is not None:
        new = threshold.time.relative
        yield f"{old.relative_time:.4g} -> {new:.4g} of dense attention's time"
    for name, value in threshold.facts.items():
        if old.facts.get(name, value) != value:
            yield f"{name} {old.facts[name]:g} -> {value:g}"


def _gate(options: Options, console: Console) -> int:
    start, machine = perf_counter(), fingerprint(torch.device("cpu"))
    when = dt.datetime.now(dt.UTC)
    repository = Repository(Path.cwd())
    with open_workspace(repository, options, console) as workspace:
        head, thresholds = workspace.head, None
        if options.against:
            base = repository.base(options.against, workspace.scratch / "base")
            commit, subject = base.commit, base.subject
            before, remark = _thresholds_of_base(base)
            allowed = allowances(before, _thresholds_of(head))
            rows = compare_commits(workspace, base, options.cases, allowed)
        else:
            thresholds = Thresholds.read(head.root / THRESHOLDS)
            commit, subject = thresholds.commit, f"thresholds of {thresholds.when}"
            remark = _remark(thresholds, machine)
            rows = measure_against_thresholds(workspace, thresholds, options.cases, machine)
    result = GateResult(
        commit,
        head.commit,
        subject,
        head.subject,
        tuple(rows),
        when,
        perf_counter() - start,
        machine,
        remark,
        elsewhere=thresholds is not None and not thresholds.same_machine(machine),
    )
    try:  # neither a full disk nor a reader who is gone costs what was measured
        result_report.render(result, console)
    finally:
        result_report.write(result, options.results)
    say(console, "Written", f"{options.results}/{', '.join(result_report.FILES)}")
    say(console, "MLflow", try_record(result, options.results))
    if thresholds is not None:
        say(console, "", register(thresholds, "read from the repository"))
    return result.status


def _calibrate(options: Options, pairs: int, console: Console) -> int:
    start = perf_counter()
    repository = Repository(Path.cwd())
    with open_workspace(repository, options, console) as workspace:
        measured, missing = measure_thresholds(workspace, options.cases, pairs=pairs)
        before = _thresholds_of(workspace.head)
        commit = workspace.head.commit
        thresholds = Thresholds(
            commit=commit,
            when=dt.datetime.now(dt.UTC).date().isoformat(),
            pairs=pairs,
            fingerprint=fingerprint(torch.device("cpu")),
            cases=recalibrated(
                {} if before is None else before.cases,
                measured,
                commit=commit,
                user=repository.user,
            ),
        )
        for trained in sorted(workspace.new_models.folder.glob("*.pt")):
            destination = repository.root / MODELS / trained.name
            destination.parent.mkdir(parents=True, exist_ok=True)
            replace_file(destination, trained.read_bytes())
        path = repository.root / THRESHOLDS
        thresholds.write(path)
    for name, reason in missing.items():
        say(console, "", f"{name}: {reason}")
    duration = f"{perf_counter() - start:.0f} s"
    console.print(f"{len(measured)} of {len(options.cases)} cases calibrated in {duration}")
    say(console, "Written", f"{path}, {MODELS.name}/: commit them")
    say(console, "MLflow", register(thresholds, "calibrated"))
    return 0


def _thresholds_of_base(base: Checkout) -> tuple[Thresholds | None, str]:
    """Return the thresholds of a base, and a remark if they are wrong: nobody can mend them now."""
    try:
        return _thresholds_of(base), ""
    except ThresholdsError as error:
        return None, f"What was accepted since the base is not known: {error}"


def _thresholds_of(checkout: Checkout) -> Thresholds | None:
    """Return the thresholds of a checkout, if it has any.

    Raises:
        ThresholdsError: They are wrong.
    """
    path = checkout.root / THRESHOLDS
    return Thresholds.read(path) if path.exists() else None


def _remark(thresholds: Thresholds, machine: Mapping[str, str]) -> str:
    if thresholds.same_machine(machine):
        return ""
    bytes_too = thresholds.comparable(machine)
    memory = f" or takes {PEAK_ELSEWHERE:g} times the memory" if bytes_too else ""
    exact = "" if bytes_too else "; bytes and graph breaks are not compared"
    other = thresholds.fingerprint
    name = f"{other.get('cpu')}, {other.get('cpu_capability')}, torch {other.get('torch')}"
    return (
        f"The thresholds are of another machine ({name}): only what is {ELSEWHERE[0]:g} times as "
        f"slow beside dense attention{memory} is a regression{exact}. --against compares both "
        "exactly on any machine."
    )
