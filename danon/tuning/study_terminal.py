"""What a study says in a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from danon.report.formatting import format_list
from danon.tuning.candidates import Candidate
from danon.tuning.objective import FIGURES, Objective
from danon.tuning.study import figures_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = [
    "HEADS",
    "best_rows",
    "best_table",
    "best_words",
    "differences",
    "line",
    "nearest",
    "places",
]

MANY = 10
"""Differences of which only the values are told, in the order of the space."""
HEADS = {"speed": "time", "memory": "memory", "quality": "error", "parameters": "parameters"}


def line(trial: FrozenTrial, goal: Objective, default: Mapping[str, Any]) -> str:
    """One trial that ended."""
    again = trial.user_attrs.get("again")
    what = f"trial {trial.number}" + ("" if again is None else f", {again} again")
    if place := trial.user_attrs.get("origin", {}).get("place"):
        what += f" on {place['host']} {place['node'][:8]}"
    error = trial.user_attrs.get("error")
    if error is not None:
        return f"{what}: failed: {error}"
    figures = figures_of(trial)
    known = [
        f"{HEADS[name]} {figures[FIGURES[name]]:.3g}"
        for name in goal.known
        if FIGURES[name] in figures
    ]
    if trial.state.name == "COMPLETE":
        known.insert(0, f"score {goal.score(figures):.3g}")
    state = "" if trial.state.name == "COMPLETE" else f" {trial.state.name.lower()}"
    return f"{what}{state}: {', '.join(known)}; {differences(trial.params, default)}"


def differences(choice: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """In what a choice is not the default one."""
    found = {name: choice[name] for name in default if choice.get(name) != default[name]}
    if len(found) > MANY:
        runs = [(value, list(run)) for value, run in groupby(choice.get(name) for name in default)]
        return ", ".join(
            str(value) if len(run) == 1 else f"{value} x {len(run)}" for value, run in runs
        )
    return format_list(found) or "the default settings"


def best_rows(found: Mapping[str, Candidate], goal: Objective) -> list[list[str]]:
    """The best choices, after what their columns are; ratios are to the default settings."""
    rows = [["best for", *(HEADS[name] for name in goal.known), "score", "95 %", "trial"]]
    for name, c in found.items():
        low, high = c.interval(goal)
        interval = f"{low:.2f} to {high:.2f}" if math.isfinite(high) else "unknown"
        rows.append(
            [
                name,
                *(f"{c.figures()[FIGURES[known]]:.3g}" for known in goal.known),
                f"{c.score(goal):.3g}",
                interval,
                str(c.number),
            ]
        )
    return rows


def best_table(found: Mapping[str, Candidate], goal: Objective) -> Table:
    """The same for a terminal."""
    (first, *figures), *rows = best_rows(found, goal)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def best_words(found: Mapping[str, Candidate], default: Mapping[str, Any]) -> list[str]:
    """What the best choices are, each once."""
    some = {c.number: c for c in found.values()}
    return [f"trial {c.number}: {differences(c.choice, default)}" for c in some.values()]


def nearest(some: Sequence[Candidate], goal: Objective) -> str:
    """Which bound no choice met, and what came nearest to all."""
    excess = {c.number: goal.own_excess(c.figures()) for c in some}
    words = []
    for name in excess[some[0].number]:
        least = min(found[name] for found in excess.values())
        if least > 0 and name in goal.limits:
            bound = goal.limits[name]
            words.append(f"{name} <= {bound:g} (the least is {bound + least:.3g})")
        elif least > 0:
            words.append(name)
    which = f"no trial met {' and '.join(words)}" if words else "no trial met all limits at once"
    close = min(some, key=lambda c: max(excess[c.number].values()))
    figures = ", ".join(f"{HEADS[n]} {close.figures()[FIGURES[n]]:.3g}" for n in goal.known)
    return f"{which}; the nearest is trial {close.number}: {figures}"


def places(trials: Iterable[FrozenTrial]) -> list[str]:
    """Which machines of clusters measured how many trials."""
    origins = [t.user_attrs.get("origin", {}) for t in trials if t.state.name != "FAIL"]
    counts = Counter(
        (o["place"]["host"], o["place"]["node"][:8], o["machine"]["id"])
        for o in origins
        if "place" in o
    )
    words = [
        f"{host}, node {node}, fingerprint {machine}: {number} trials"
        for (host, node, machine), number in sorted(counts.items())
    ]
    if len({machine for _, _, machine in counts}) > 1:
        words.append("by different machines: each trial is beside the default settings on its own")
    return words
