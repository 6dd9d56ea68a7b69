"""Format the trials and the result of a study for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from danon.report.formatting import format_list
from danon.tuning.candidates import Candidate, StudyResult
from danon.tuning.objective import FIGURES, HEADINGS, Objective
from danon.tuning.study import ERROR, ORIGIN, REPEAT_OF, figures_of

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

__all__ = [
    "TerminalListener",
    "best_lines",
    "best_rows",
    "best_table",
    "differences",
    "machine_lines",
    "nearest",
]

MAX_NAMED = 10
"""Number of differences up to which each is shown with its name."""


class TerminalListener:
    """A listener that prints a line for each trial that ends.

    Args:
        console: where the lines go.
        objective: figures of the study.
        default: the default choice.
    """

    def __init__(self, console: Console, objective: Objective, default: Mapping[str, Any]) -> None:
        self._console, self._objective, self._default = console, objective, default

    def on_begin(self, trial: Trial) -> None:
        """Print nothing."""

    def on_end(self, trial: FrozenTrial) -> None:
        """Print the figures of a trial, or why it has none."""
        text = _trial_line(trial, self._objective, self._default)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _trial_line(trial: FrozenTrial, objective: Objective, default: Mapping[str, Any]) -> str:
    repeat_of = trial.user_attrs.get(REPEAT_OF)
    title = f"trial {trial.number}" + ("" if repeat_of is None else f", {repeat_of} again")
    if place := trial.user_attrs.get(ORIGIN, {}).get("place"):
        title += f" on {place['host']} {place['node'][:8]}"
    error = trial.user_attrs.get(ERROR)
    if error is not None:
        return f"{title}: failed: {error}"
    figures = figures_of(trial)
    shown = [
        f"{HEADINGS[name]} {figures[FIGURES[name]]:.3g}"
        for name in objective.available
        if FIGURES[name] in figures
    ]
    if trial.state.name == "COMPLETE":
        shown.insert(0, f"score {objective.score(figures):.3g}")
    state = "" if trial.state.name == "COMPLETE" else f" {trial.state.name.lower()}"
    return f"{title}{state}: {', '.join(shown)}; {differences(trial.params, default)}"


def differences(choice: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """Describe in what a choice differs from the default one."""
    changed = {name: choice[name] for name in default if choice.get(name) != default[name]}
    if len(changed) > MAX_NAMED:
        runs = [(value, list(run)) for value, run in groupby(choice.get(name) for name in default)]
        return ", ".join(
            str(value) if len(run) == 1 else f"{value} x {len(run)}" for value, run in runs
        )
    return format_list(changed) or "the default settings"


def best_rows(result: StudyResult, default_name: str) -> list[list[str]]:
    """Return the cells of the table of the best choices, the header first.

    Args:
        result: the candidates and the best of them; ratios are to the default settings.
        default_name: the first cell of the default choice's row.
    """
    objective = result.objective
    headings = (HEADINGS[name] for name in objective.available)
    rows = [["best for", *headings, "score", "95 %", "trial"]]
    for name, c in {default_name: result.default, **result.best}.items():
        low, high = c.interval(objective)
        interval = f"{low:.2f} to {high:.2f}" if math.isfinite(high) else "unknown"
        rows.append(
            [
                name,
                *(f"{c.figures()[FIGURES[n]]:.3g}" for n in objective.available),
                f"{c.score(objective):.3g}",
                interval,
                str(c.number),
            ]
        )
    return rows


def best_table(result: StudyResult) -> Table:
    """Return the table of the best choices for a terminal."""
    (first, *figures), *rows = best_rows(result, "(first)")
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def best_lines(shown: Iterable[Candidate], default: Mapping[str, Any]) -> list[str]:
    """Return a line for each candidate: in what it differs from the default choice."""
    unique = {c.number: c for c in shown}
    return [f"trial {c.number}: {differences(c.choice, default)}" for c in unique.values()]


def nearest(candidates: Sequence[Candidate], objective: Objective) -> str:
    """Describe which constraint no candidate met, and the candidate that came nearest to all."""
    violations = {c.number: objective.sampler_violations(c.figures()) for c in candidates}
    words = []
    for name in violations[candidates[0].number]:
        least = min(values[name] for values in violations.values())
        if least > 0 and name in objective.limits:
            bound = objective.limits[name]
            words.append(f"{name} <= {bound:g} (the least is {bound + least:.3g})")
        elif least > 0:
            words.append(name)
    which = f"no trial met {' and '.join(words)}" if words else "no trial met all limits at once"
    close = min(candidates, key=lambda c: max(violations[c.number].values()))
    figures = (f"{HEADINGS[n]} {close.figures()[FIGURES[n]]:.3g}" for n in objective.available)
    return f"{which}; the nearest is trial {close.number}: {', '.join(figures)}"


def machine_lines(trials: Iterable[FrozenTrial]) -> list[str]:
    """Return a line for each machine of a cluster: how many trials it measured."""
    origins = [t.user_attrs.get(ORIGIN, {}) for t in trials if t.state.name != "FAIL"]
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
