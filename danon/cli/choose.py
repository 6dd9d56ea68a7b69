"""The command ``danon choose``: an answer from records, which it names."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon import tuned
from danon.config.mechanism import mechanisms
from danon.console.messages import pass_over
from danon.measure.fingerprint import fingerprint
from danon.report import formatting, tables
from danon.report.recommendation import Option, Recommendation, recommend
from danon.report.remarks import MARK, doubtful
from danon.runs.journal import readable_runs

if TYPE_CHECKING:
    from danon.report.quality_tables import Task

__all__ = ["answer"]

UNKNOWN = "not measured"
UNDECIDED = "cannot tell"


def answer(
    folders: tuple[Path, ...],
    length: int,
    memory_gb: float,
    task: str,
    phase: str,
    console: Console,
) -> int:
    """Print which attention to take.

    Args:
        folders: of recorded runs, those to prefer first.
        length: tokens N.
        memory_gb: GiB that one call may take.
        task: ``recall``, ``language``, ``pretrained``, or the name of a task of theirs.
        phase: forward, forward+backward or decode.
        console: to print to.

    Returns:
        Exit status: 0; 1 when the records do not tell.

    Raises:
        ValueError: an argument out of range, a task that nothing is recorded of, or no recorded
            run can be read.
    """
    if length < 1 or not memory_gb > 0:
        raise ValueError(f"length = {length}, memory_gb = {memory_gb:g}: must be positive")
    if phase not in tables.PHASES:
        raise ValueError(f"phase {phase!r}: must be one of {', '.join(tables.PHASES)}")
    recorded = readable_runs(folders, partial(pass_over, console))
    runs = [(run.info, run.results) for run in recorded]
    found = recommend(
        runs, length=length, memory_bytes=memory_gb * 2**30, task=task, phase=phase, here=_here()
    )
    decided = found.best is not None and not (
        found.best.attention == tables.REFERENCE and found.undecided
    )
    console.print(Text(_verdict(found, length, memory_gb, task, phase), style="bold"))
    if decided and found.best and (how := _how(found.best)):
        console.print(how, highlight=False, markup=False, soft_wrap=True)
    if found.options:
        console.print(_table(found, length))
    for option in (option for option in found.options if option.remarks):
        last = "; not recommended" if doubtful(option.remarks) else ""
        why = f"{MARK} {option.attention}: {'; '.join(r.text for r in option.remarks)}{last}"
        console.print(Text(why, style="yellow"), soft_wrap=True)
    for line in _doubts(found):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for what in found.missing if found.costs else ():
        console.print(f"{UNKNOWN}: {what}", style="yellow", highlight=False)
    for line in _records(found):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    return 0 if decided else 1


def _here() -> list[dict[str, Any]]:
    """Return the fingerprints of this machine, one a device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [dict(fingerprint(torch.device(device))) for device in devices]


def _verdict(found: Recommendation, length: int, memory_gb: float, task: str, phase: str) -> str:
    at = formatting.format_length(length)
    if found.costs is None:
        return _no_speed(found, length, phase)
    if found.judged is None:
        return f"{UNKNOWN}: no run has figures of {task} in which dense attention learned it"
    best, name = found.best, found.judged[1].name
    if best is None or best.attention == tables.REFERENCE:
        unknown = [o.attention for o in found.undecided if o.good]
        if unknown:
            return f"{UNKNOWN}: the memory of {', '.join(unknown)} at {at} tokens"
        if found.undecided:
            names = ", ".join(option.attention for option in found.undecided)
            rest = f"; dense attention itself ({tables.REFERENCE}) fits" if best else ""
            which = "is" if len(found.undecided) == 1 else "are"
            return f"{UNDECIDED} whether {names} {which} as good at {name} as dense attention{rest}"
    if best is None:
        return (
            f"Nothing that was measured at {at} tokens fits {memory_gb:g} GiB and is as good at "
            f"{task} as dense attention"
        )
    if best.attention == tables.REFERENCE:
        return f"{tables.REFERENCE}: dense attention; nothing faster was measured as good at {name}"
    return f"{best.attention}: {_words(best, found)}"


def _no_speed(found: Recommendation, length: int, phase: str) -> str:
    """Return why no speed at a length can be given, and at which lengths it can."""
    said = f"{UNKNOWN}: {phase} at {length} tokens"
    if found.incomparable:
        runs = ", ".join(info.run_id for info in found.incomparable)
        said += f" on a machine that compares with this one (matrix units or a GPU differ: {runs})"
    lengths = ", ".join(map(str, found.lengths))
    return f"{said}; measured lengths: {lengths or 'none, danon bench makes them'}"


def _words(option: Option, found: Recommendation) -> str:
    assert found.judged is not None and option.score is not None
    _, task, at = found.judged
    dense = task.score(tables.REFERENCE, at)
    assert dense is not None
    between = formatting.format_interval(option.speedup)
    faster = formatting.format_speedup(option.speedup) + (f" [{between}]" if between else "")
    return (
        f"{faster} times as fast as dense attention, "
        f"{formatting.format_mebibytes(option.peak)} MiB; {task.name} "
        f"{task.write(option.score.quality.value)} where dense has "
        f"{task.write(dense.quality.value)}; all of {option.semantics or 'one configuration'}"
    )


def _how(option: Option) -> str:
    """How to build tuned settings; empty for what has a class of its own.

    Raises:
        ValueError: the file in results/tuned is none of ``danon tune``.
    """
    row = tuned.known_row(option.attention)
    if row is None:
        return ""
    made = f"settings {dict(row.settings)}"
    if record := mechanisms().get(row.attention):
        source = f', source=Path("{row.folder}")' if row.folder else ""
        made = f'{record.config.__name__}.tuned("{row.goals[0]}"{source}, ...)'
    said = f"{option.attention} is {row.attention} with {made}: {row.about}"
    unrecorded = [name for name in row.settings if name not in option.config]
    other = [
        f"{name} = {option.config[name]!r}, not {value!r}"
        for name, value in row.settings.items()
        if option.config.get(name, value) != value
    ]
    if unrecorded:
        other.append(f"a {', '.join(unrecorded)} that is not recorded")
    return f"{said}; but it was measured with {', '.join(other)}" if other else said


def _table(found: Recommendation, length: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    at = formatting.format_length(length)
    table.add_column("attention", no_wrap=True)
    for name in (f"speed-up\nat {at}", "95 %", f"MiB\nat {at}", "fits"):
        table.add_column(name, justify="right")
    if found.judged:
        _, task, judged_at = found.judged
        table.add_column(
            f"{task.name}\nat {formatting.format_length(judged_at)}", justify="right", no_wrap=True
        )
        table.add_column("as good\nas dense", justify="right", no_wrap=True)
    for option in found.options:
        known = not math.isnan(option.peak)
        cells = [
            f"{option.attention} {MARK}" if option.remarks else option.attention,
            formatting.format_speedup(option.speedup),
            formatting.format_interval(option.speedup),
            formatting.format_mebibytes(option.peak),
            ("yes" if option.fits else "no") if known else "?",
        ]
        if found.judged:
            cells += _quality_cells(option, found.judged[1])
        table.add_row(*map(Text, cells), style="bold green" if option is found.best else "")
    return table


def _quality_cells(option: Option, task: Task) -> tuple[str, str]:
    """Return the figure and what it says; no figure where it is of other settings."""
    if option.score is None:
        return UNKNOWN, formatting.NOTHING
    figure = task.write(option.score.quality.value)
    if option.finding != "cannot tell":
        return figure, "yes" if option.good else "no"
    return ("other settings" if option.other_settings else figure), UNDECIDED


def _doubts(found: Recommendation) -> list[str]:
    """Return why it cannot be told, a line for each option."""
    return [
        f"{UNDECIDED}: {option.attention}: {'; '.join(option.doubts)}"
        for option in found.options
        if option.doubts
    ]


def _records(found: Recommendation) -> list[str]:
    """What the answer rests on, and what it does not say."""
    lines = []
    if found.costs:
        info, view = found.costs
        machines = "; ".join(map(tables.machine, found.machines))
        several = len(found.machines) > 1
        other = "several machines: " if several else "another machine: "
        lines.append(
            f"speed and memory: run {info.run_id}, {escape(tables.origin(info))}, {view.phase} "
            f"{view.dtype} {view.shape}, default settings or those that the name says; "
            f"{'a machine like this one: ' if found.similar else other}{escape(machines)}"
        )
    if found.judged:
        info, task, at = found.judged
        models = "small models" if task.trained else "a pretrained model"
        lines.append(
            f"{task.name}: run {info.run_id}, {escape(tables.origin(info))}; {models} at "
            f"{formatting.format_length(at)} tokens"
        )
    return lines
