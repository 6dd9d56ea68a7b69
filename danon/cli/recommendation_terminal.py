"""Print the answer of ``danon choose``, with the records that it rests on."""

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
from danon.report import formatting, run_origin, tables
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
        folders: folders of recorded runs, the preferred first.
        length: tokens of a sequence.
        memory_gb: memory that one call may take, in GiB.
        task: ``recall``, ``language``, ``pretrained``, or the name of one of their tasks.
        phase: ``forward``, ``forward+backward`` or ``decode``.
        console: gets the answer.

    Returns:
        The exit status: 0, or 1 if the records do not decide.

    Raises:
        ValueError: an argument is out of range, the task has no records, or no run can be read.
    """
    if length < 1 or not memory_gb > 0:
        raise ValueError(f"length = {length}, memory_gb = {memory_gb:g}: must be positive")
    if phase not in tables.PHASES:
        raise ValueError(f"phase {phase!r}: must be one of {', '.join(tables.PHASES)}")
    recorded = readable_runs(folders, partial(pass_over, console))
    runs = [(run.info, run.results) for run in recorded]
    recommendation = recommend(
        runs, length=length, memory_bytes=memory_gb * 2**30, task=task, phase=phase, here=_here()
    )
    decided = recommendation.best is not None and not (
        recommendation.best.attention == tables.REFERENCE and recommendation.undecided
    )
    console.print(Text(_verdict(recommendation, length, memory_gb, task, phase), style="bold"))
    if decided and recommendation.best and (how := _how(recommendation.best)):
        console.print(how, highlight=False, markup=False, soft_wrap=True)
    if recommendation.options:
        console.print(_table(recommendation, length))
    for option in (option for option in recommendation.options if option.remarks):
        last = "; not recommended" if doubtful(option.remarks) else ""
        why = f"{MARK} {option.attention}: {'; '.join(r.text for r in option.remarks)}{last}"
        console.print(Text(why, style="yellow"), soft_wrap=True)
    for line in _doubts(recommendation):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for combination in recommendation.missing if recommendation.costs else ():
        console.print(f"{UNKNOWN}: {combination}", style="yellow", highlight=False)
    for line in _records(recommendation):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    return 0 if decided else 1


def _here() -> list[dict[str, Any]]:
    """Return the fingerprints of this machine, one a device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [dict(fingerprint(torch.device(device))) for device in devices]


def _verdict(
    recommendation: Recommendation, length: int, memory_gb: float, task: str, phase: str
) -> str:
    at = formatting.format_length(length)
    if recommendation.costs is None:
        return _no_speed(recommendation, length, phase)
    if recommendation.judged is None:
        return f"{UNKNOWN}: no run has figures of {task} in which dense attention learned it"
    best, name = recommendation.best, recommendation.judged[1].name
    if best is None or best.attention == tables.REFERENCE:
        unknown = [o.attention for o in recommendation.undecided if o.good]
        if unknown:
            return f"{UNKNOWN}: the memory of {', '.join(unknown)} at {at} tokens"
        if recommendation.undecided:
            names = ", ".join(option.attention for option in recommendation.undecided)
            rest = f"; dense attention itself ({tables.REFERENCE}) fits" if best else ""
            which = "is" if len(recommendation.undecided) == 1 else "are"
            return f"{UNDECIDED} whether {names} {which} as good at {name} as dense attention{rest}"
    if best is None:
        return (
            f"Nothing that was measured at {at} tokens fits {memory_gb:g} GiB and is as good at "
            f"{task} as dense attention"
        )
    if best.attention == tables.REFERENCE:
        return f"{tables.REFERENCE}: dense attention; nothing faster was measured as good at {name}"
    return f"{best.attention}: {_words(best, recommendation)}"


def _no_speed(recommendation: Recommendation, length: int, phase: str) -> str:
    """Return why no speed at a length can be given, and at which lengths it can."""
    said = f"{UNKNOWN}: {phase} at {length} tokens"
    if recommendation.incomparable:
        runs = ", ".join(info.run_id for info in recommendation.incomparable)
        said += f" on a machine that compares with this one (matrix units or a GPU differ: {runs})"
    lengths = ", ".join(map(str, recommendation.lengths))
    return f"{said}; measured lengths: {lengths or 'none, danon bench makes them'}"


def _words(option: Option, recommendation: Recommendation) -> str:
    assert recommendation.judged is not None and option.score is not None
    _, task, at = recommendation.judged
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
    """Return how to build tuned settings; empty for an attention with a class of its own.

    Raises:
        ValueError: ``danon tune`` did not write the file in results/tuned.
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


def _table(recommendation: Recommendation, length: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    at = formatting.format_length(length)
    table.add_column("attention", no_wrap=True)
    for name in (f"speed-up\nat {at}", "95 %", f"MiB\nat {at}", "fits"):
        table.add_column(name, justify="right")
    if recommendation.judged:
        _, task, judged_at = recommendation.judged
        table.add_column(
            f"{task.name}\nat {formatting.format_length(judged_at)}", justify="right", no_wrap=True
        )
        table.add_column("as good\nas dense", justify="right", no_wrap=True)
    for option in recommendation.options:
        measured = not math.isnan(option.peak)
        cells = [
            f"{option.attention} {MARK}" if option.remarks else option.attention,
            formatting.format_speedup(option.speedup),
            formatting.format_interval(option.speedup),
            formatting.format_mebibytes(option.peak),
            ("yes" if option.fits else "no") if measured else "?",
        ]
        if recommendation.judged:
            cells += _quality_cells(option, recommendation.judged[1])
        table.add_row(
            *map(Text, cells), style="bold green" if option is recommendation.best else ""
        )
    return table


def _quality_cells(option: Option, task: Task) -> tuple[str, str]:
    """Return the figure and what it says; no figure where it is of other settings."""
    if option.score is None:
        return UNKNOWN, formatting.NOTHING
    figure = task.write(option.score.quality.value)
    if option.finding != "cannot tell":
        return figure, "yes" if option.good else "no"
    return ("other settings" if option.other_settings else figure), UNDECIDED


def _doubts(recommendation: Recommendation) -> list[str]:
    """Return why it cannot be told, a line for each option."""
    return [
        f"{UNDECIDED}: {option.attention}: {'; '.join(option.doubts)}"
        for option in recommendation.options
        if option.doubts
    ]


def _records(recommendation: Recommendation) -> list[str]:
    """Return a line for each record that the answer rests on."""
    lines = []
    if recommendation.costs:
        info, view = recommendation.costs
        machines = "; ".join(map(run_origin.describe_machine, recommendation.machines))
        several = len(recommendation.machines) > 1
        other = "several machines: " if several else "another machine: "
        lines.append(
            f"speed and memory: run {info.run_id}, {escape(run_origin.describe_run(info))}, "
            f"{view.phase} {view.dtype} {view.shape}, "
            "default settings or those that the name says; "
            f"{'a machine like this one: ' if recommendation.similar else other}{escape(machines)}"
        )
    if recommendation.judged:
        info, task, at = recommendation.judged
        models = "small models" if task.trained else "a pretrained model"
        lines.append(
            f"{task.name}: run {info.run_id}, {escape(run_origin.describe_run(info))}; {models} at "
            f"{formatting.format_length(at)} tokens"
        )
    return lines
