"""Settings that a study found best: results/tuned/*.json, as ``danon tune`` writes them.

Some come with danon; a repository has its own, which the commands measure, too. Whoever builds an
attention in a program gets those that came with danon, wherever it runs, or names a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danon.runs.folders import results_folder, shipped_results

__all__ = [
    "GOALS",
    "HYPERPARAMETERS",
    "TunedSettings",
    "file_of",
    "known_row",
    "known_rows",
    "named",
    "read",
    "rows",
    "settings_for",
]

HYPERPARAMETERS = "hyperparameters"
"""The kind of study whose choices are settings of a configuration."""
GOALS = ("speed", "memory", "quality", "balanced")
"""What a configuration can be the best for."""


@dataclass(frozen=True)
class TunedSettings:
    """Settings that are measured like an attention of their own.

    Attributes:
        name: of the attention and of the first goal: ``msra-balanced``.
        goals: that these settings are the best for.
        length: tokens that they were tuned for.
        provenance: as in the file; so are the figures.
        folder: where the file is that they are from; None if they came with danon.
    """

    name: str
    attention: str
    goals: tuple[str, ...]
    length: int
    dtype: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path | None = None

    @property
    def digest(self) -> str:
        """Tells these settings from others that the same study may find later."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:7]

    @property
    def about(self) -> str:
        """For what they are tuned."""
        return f"tuned ({' and '.join(self.goals)}, {self.length} tokens, {self.dtype})"


def file_of(attention: str, place: Path, kind: str) -> Path:
    """Where what studies of a kind found is kept."""
    return place / f"{attention if kind == HYPERPARAMETERS else f'{attention}-{kind}'}.json"


def read(
    attention: str, place: Path | None = None, kind: str = HYPERPARAMETERS
) -> Mapping[str, Any]:
    """All that was found for an attention; nothing if no study was.

    Args:
        attention: registered name.
        place: the folder; None for danon's own.
        kind: of the studies.

    Raises:
        ValueError: the file is none of ``danon tune``.
    """
    file = file_of(attention, shipped_results("tuned") if place is None else place, kind)
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        best: Mapping[str, Any] = found["best"]
        problems = [_problem(goal, some) for goal, some in best.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no file of danon tune: {error!r}") from error
    if found["attention"] != attention:
        raise ValueError(f"{file} is no file of danon tune for {attention!r}")
    if problem := next(filter(None, problems), ""):
        raise ValueError(f"{file} is no file of danon tune: {problem}")
    return best


def _problem(goal: str, some: Mapping[str, Any]) -> str:
    """What is wrong with the entry of a goal; empty if nothing is."""
    for part in ("settings", "choice", "figures", "provenance"):
        if not isinstance(some[part], dict):
            return f"best -> {goal} -> {part}: must be an object"
    if not isinstance(some["provenance"].get("machine", {}), dict):
        return f"best -> {goal} -> provenance -> machine: must be an object"
    for name, value in some["figures"].items():
        numbers = value if name == "score" and isinstance(value, list) and value else [value]
        if not all(x is None or type(x) in (int, float) for x in numbers):
            return f"best -> {goal} -> figures -> {name} = {value!r}: must be a number"
    return ""


def settings_for(attention: str, goal: str, place: Path | None = None) -> dict[str, Any]:
    """The settings that are best for a goal.

    Raises:
        ValueError: an unknown goal, or no study was after it; says which there are.
    """
    if goal not in GOALS:
        raise ValueError(f"tuned({goal!r}): must be one of {', '.join(map(repr, GOALS))}")
    found = read(attention, place)
    if goal not in found:
        known = ", ".join(found) or "none"
        raise ValueError(
            f"no study has looked for the {attention} that is best for {goal!r}; there are: "
            f"{known} (danon tune --mechanism {attention} makes them)"
        )
    values: dict[str, Any] = found[goal]["settings"]
    return values


def rows(attention: str, place: Path | None = None) -> dict[str, TunedSettings]:
    """What was found for an attention, by name; goals that have the same settings are one row.

    Args:
        attention: registered name.
        place: the folder; None for what came with danon.

    Raises:
        ValueError: the file is none of ``danon tune``.
    """
    return _rows(attention, {goal: (some, place) for goal, some in read(attention, place).items()})


def known_rows(attention: str) -> dict[str, TunedSettings]:
    """The same, of what came with danon and of the repository one stands in.

    Where both have settings for a goal, those of the repository count.

    Raises:
        ValueError: a file is none of ``danon tune``.
    """
    own = results_folder("tuned")
    places = (None,) if own.resolve() == shipped_results("tuned").resolve() else (None, own)
    best = {
        goal: (some, place) for place in places for goal, some in read(attention, place).items()
    }
    return _rows(attention, dict(sorted(best.items())))


def named(name: str, place: Path | None = None) -> TunedSettings | None:
    """The settings of that name; None if no study has found such.

    Raises:
        ValueError: the file that could have them is none of ``danon tune``.
    """
    attention, _, goal = name.rpartition("-")
    return rows(attention, place).get(name) if attention and goal in GOALS else None


def known_row(name: str) -> TunedSettings | None:
    """The same, of :func:`known_rows`."""
    attention, _, goal = name.rpartition("-")
    return known_rows(attention).get(name) if attention and goal in GOALS else None


def _rows(
    attention: str, best: Mapping[str, tuple[Mapping[str, Any], Path | None]]
) -> dict[str, TunedSettings]:
    """By name, of what is best for each goal and the folder that has it."""
    found: dict[str, TunedSettings] = {}
    for goal, (some, place) in best.items():
        folder = shipped_results("tuned") if place is None else place
        where = file_of(attention, folder, HYPERPARAMETERS)
        if goal not in GOALS:
            raise ValueError(f"{where}: goal {goal!r}: must be one of {', '.join(GOALS)}")
        values, origin = some["settings"], some["provenance"]
        same = next((row for row in found.values() if row.settings == values), None)
        name = f"{attention}-{goal}" if same is None else same.name
        goals = (goal,) if same is None else (*same.goals, goal)
        try:
            length, dtype = int(origin["length"]), str(origin["dtype"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where} does not say what it was tuned for: {error!r}") from error
        first = some if same is None else {"figures": same.figures, "provenance": same.provenance}
        found[name] = TunedSettings(
            name,
            attention,
            goals,
            length,
            dtype,
            values,
            first["figures"],
            first["provenance"],
            place if same is None else same.folder,
        )
    return found
