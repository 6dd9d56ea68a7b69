"""The command ``danon choose``: an answer from records, which it names."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon import tuned
from danon.bench.command import latest
from danon.config import TUNED
from danon.experiment import frame, words
from danon.experiment.choice import Choice, Option, choose
from danon.experiment.quality import LOOKUP
from danon.measure.fingerprint import fingerprint

__all__ = ["answer"]

UNKNOWN = "not measured"


def answer(
    folders: tuple[Path, ...], length: int, memory_gb: float, task: str, phase: str,
    console: Console,
) -> int:  # fmt: skip
    """Print which attention to take.

    Args:
        folders: of recorded runs, those to prefer first.

    Returns:
        Exit status: 0; 1 when the records do not tell.

    Raises:
        ValueError: an argument out of range, or a task that nothing is recorded of.
    """
    if length < 1 or not memory_gb > 0:
        raise ValueError(f"length = {length}, memory_gb = {memory_gb:g}: must be positive")
    if phase not in frame.PHASES:
        raise ValueError(f"phase {phase!r}: must be one of {', '.join(frame.PHASES)}")
    runs = [(j.info(), j.results()) for folder in folders for j in latest(folder)]
    here = fingerprint(torch.device("cpu"))["id"]
    found = choose(
        runs, length=length, memory_bytes=memory_gb * 2**30, task=task, phase=phase, machine=here
    )
    console.print(Text(_verdict(found, length, memory_gb, task), style="bold"))
    if found.best and (how := _how(found.best)):
        console.print(how, highlight=False, markup=False, soft_wrap=True)
    if found.options:
        console.print(_table(found, length))
    for what in found.missing:
        console.print(f"{UNKNOWN}: {what}", style="yellow", highlight=False)
    for line in _records(found, here):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    return 0 if found.best else 1


def _verdict(found: Choice, length: int, memory_gb: float, task: str) -> str:
    at = words.length_label(length)
    if found.costs is None:
        return f"{UNKNOWN}: no run has a figure of speed at {at} tokens; danon bench makes them"
    if found.judged is None:
        return f"{UNKNOWN}: no run has figures of {task} in which dense attention learned it"
    unknown = [o.attention for o in found.options if o.good and math.isnan(o.peak)]
    if found.best is None and unknown:
        return f"{UNKNOWN}: the memory of {', '.join(unknown)} at {at} tokens"
    if found.best is None:
        return (
            f"Nothing that was measured at {at} tokens fits {memory_gb:g} GiB and is as good at "
            f"{task} as dense attention"
        )
    if found.best.attention == frame.REFERENCE:
        return f"{frame.REFERENCE}: dense attention; nothing faster was measured as good at {task}"
    return f"{found.best.attention}: {_words(found.best, found)}"


def _words(option: Option, found: Choice) -> str:
    assert found.judged is not None and option.score is not None
    task = found.judged[1]
    dense = task.score(frame.REFERENCE, task.headline)
    assert dense is not None
    return (
        f"{words.times(option.speedup)} times as fast as dense attention, "
        f"{words.bytes_text(option.peak)} MiB; {task.name} "
        f"{task.write(option.score.quality.value)} where dense has "
        f"{task.write(dense.quality.value)}"
    )


def _how(option: Option) -> str:
    """How to build tuned settings; empty for what has a class of its own.

    Raises:
        ValueError: the file in results/tuned is none of ``danon tune``.
    """
    row = tuned.named(option.attention)
    if row is None:
        return ""
    (kind,) = [name for name, of in TUNED.items() if of == row.attention] or [""]
    made = f'{kind}.tuned("{row.goals[0]}", ...)' if kind else f"settings {dict(row.settings)}"
    said = f"{option.attention} is {row.attention} with {made}: {row.about}"
    other = [
        f"{name} = {option.config[name]!r}, not {value!r}"
        for name, value in row.settings.items() if option.config.get(name, value) != value
    ]  # fmt: skip
    return f"{said}; but it was measured with {', '.join(other)}" if other else said


def _table(found: Choice, length: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    at = words.length_label(length)
    table.add_column("attention", no_wrap=True)
    for name in (f"speed-up at {at}", "95 %", f"MiB at {at}", "fits"):
        table.add_column(name, justify="right")
    if found.judged:
        task = found.judged[1]
        judged = f"{task.name} at {words.length_label(task.headline)}"
        table.add_column(judged, justify="right", no_wrap=True)
        table.add_column("as good\nas dense", justify="right")
    for option in found.options:
        known = not math.isnan(option.peak)
        cells = [
            option.attention, words.times(option.speedup), words.interval(option.speedup),
            words.bytes_text(option.peak), ("yes" if option.fits else "no") if known else UNKNOWN,
        ]  # fmt: skip
        if found.judged:
            score = option.score
            cells.append(task.write(score.quality.value) if score else UNKNOWN)
            cells.append(("yes" if option.good else "no") if score else words.NOTHING)
        table.add_row(*map(Text, cells), style="bold green" if option is found.best else "")
    return table


def _records(found: Choice, here: str) -> list[str]:
    """What the answer rests on, and what it does not say."""
    lines = []
    if found.costs:
        info, view = found.costs
        several = len(found.machines) > 1
        other = "several machines: " if several else "another machine: "
        if all(machine.get("id") == here for machine in found.machines):
            other = ""
        machines = "; ".join(map(frame.machine, found.machines))
        lines.append(
            f"speed and memory: run {info.run_id}, {escape(frame.origin(info))}, {view.phase} "
            f"{view.dtype} {view.shape}, default settings or those that the name says; "
            f"{other}{escape(machines)}"
        )
    if found.judged:
        info, task = found.judged
        models = "small models" if task.trained else "a pretrained model"
        sizes = "each attention sized to see a quarter of the pairs"
        if task.name == LOOKUP:
            models, sizes = "a small model that looks keys up", "each attention as for speed"
        lines.append(
            f"{task.name}: run {info.run_id}, {escape(frame.origin(info))}; {models} at "
            f"{words.length_label(task.headline)} tokens, {sizes}: nothing longer is known"
        )
    return lines
