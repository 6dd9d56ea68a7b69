"""Read settings that studies found best: results/tuned/*.json, as ``danon tune`` writes them.

Some come with danon, and a repository may have its own. The commands measure both. A program that
builds an attention gets those of danon, wherever it runs, or names a folder.
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
"""Name of the kind of study whose choices are settings of a configuration."""
GOALS = ("speed", "memory", "quality", "balanced")
"""Objectives for which a file may have the best settings."""


@dataclass(frozen=True)
class TunedSettings:
    """Settings that are measured like an attention of their own.

    Attributes:
        name: name of the attention and of the first goal, as ``msra-balanced``.
        attention: registered name of the attention.
        goals: goals that these settings are best for.
        length: tokens that they were tuned for.
        dtype: type of the numbers that they were tuned for.
        settings: arguments of the configuration, by name.
        figures: figures that the study reported.
        provenance: the study, and where it was measured.
        folder: folder of their file; None if they came with danon.
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
        """Hash of the settings, which differs for those that a later study finds."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:7]

    @property
    def about(self) -> str:
        """Goals, length and dtype that they are tuned for, in words."""
        return f"tuned ({' and '.join(self.goals)}, {self.length} tokens, {self.dtype})"


def file_of(attention: str, folder: Path, kind: str) -> Path:
    """Return the file of an attention's best settings for a kind of study."""
    return folder / f"{attention if kind == HYPERPARAMETERS else f'{attention}-{kind}'}.json"


def read(
    attention: str, folder: Path | None = None, kind: str = HYPERPARAMETERS
) -> Mapping[str, Any]:
    """Read the best settings of an attention by goal; empty if there is no file.

    Args:
        attention: registered name.
        folder: folder of the file; None for danon's own.
        kind: kind of study.

    Raises:
        ValueError: ``danon tune`` did not write the file.
    """
    file = file_of(attention, shipped_results("tuned") if folder is None else folder, kind)
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        best: Mapping[str, Any] = content["best"]
        problems = [_problem(goal, entry) for goal, entry in best.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no file of danon tune: {error!r}") from error
    if content["attention"] != attention:
        raise ValueError(f"{file} is no file of danon tune for {attention!r}")
    if problem := next(filter(None, problems), ""):
        raise ValueError(f"{file} is no file of danon tune: {problem}")
    return best


def _problem(goal: str, entry: Mapping[str, Any]) -> str:
    """Return the first fault of a goal's entry; empty if it has none."""
    for part in ("settings", "choice", "figures", "provenance"):
        if not isinstance(entry[part], dict):
            return f"best -> {goal} -> {part}: must be an object"
    if not isinstance(entry["provenance"].get("machine", {}), dict):
        return f"best -> {goal} -> provenance -> machine: must be an object"
    for name, value in entry["figures"].items():
        numbers = value if name == "score" and isinstance(value, list) and value else [value]
        if not all(x is None or type(x) in (int, float) for x in numbers):
            return f"best -> {goal} -> figures -> {name} = {value!r}: must be a number"
    return ""


def settings_for(attention: str, goal: str, folder: Path | None = None) -> dict[str, Any]:
    """Return the settings that are best for a goal.

    Args:
        attention: registered name.
        goal: one of :data:`GOALS`.
        folder: folder of the file; None for danon's own.

    Raises:
        ValueError: an unknown goal, or no study searched for it; says which there are.
    """
    if goal not in GOALS:
        raise ValueError(f"tuned({goal!r}): must be one of {', '.join(map(repr, GOALS))}")
    best = read(attention, folder)
    if goal not in best:
        searched = ", ".join(best) or "none"
        raise ValueError(
            f"no study has looked for the {attention} that is best for {goal!r}; there are: "
            f"{searched} (danon tune --mechanism {attention} makes them)"
        )
    values: dict[str, Any] = best[goal]["settings"]
    return values


def rows(attention: str, folder: Path | None = None) -> dict[str, TunedSettings]:
    """Return the tuned settings of an attention by name; goals with equal settings share one.

    Args:
        attention: registered name.
        folder: folder of the file; None for danon's own.

    Raises:
        ValueError: ``danon tune`` did not write the file.
    """
    best = read(attention, folder)
    return _rows(attention, {goal: (entry, folder) for goal, entry in best.items()})


def known_rows(attention: str) -> dict[str, TunedSettings]:
    """Return the tuned settings of danon and of the current repository, by name.

    Where both have settings for a goal, those of the repository count.

    Args:
        attention: registered name.

    Raises:
        ValueError: ``danon tune`` did not write a file.
    """
    repository = results_folder("tuned")
    same = repository.resolve() == shipped_results("tuned").resolve()
    best = {
        goal: (entry, folder)
        for folder in ((None,) if same else (None, repository))
        for goal, entry in read(attention, folder).items()
    }
    return _rows(attention, dict(sorted(best.items())))


def named(name: str, folder: Path | None = None) -> TunedSettings | None:
    """Return the tuned settings of a name; None if no study has found such.

    Args:
        name: name of an attention and of a goal, as ``msra-balanced``.
        folder: folder of the file; None for danon's own.

    Raises:
        ValueError: ``danon tune`` did not write the file that could have them.
    """
    attention, _, goal = name.rpartition("-")
    return rows(attention, folder).get(name) if attention and goal in GOALS else None


def known_row(name: str) -> TunedSettings | None:
    """Return the tuned settings of a name, of danon or of the current repository."""
    attention, _, goal = name.rpartition("-")
    return known_rows(attention).get(name) if attention and goal in GOALS else None


def _rows(
    attention: str, best: Mapping[str, tuple[Mapping[str, Any], Path | None]]
) -> dict[str, TunedSettings]:
    """Return tuned settings by name, given the best entry for each goal and its folder."""
    by_name: dict[str, TunedSettings] = {}
    for goal, (entry, folder) in best.items():
        source = shipped_results("tuned") if folder is None else folder
        file = file_of(attention, source, HYPERPARAMETERS)
        if goal not in GOALS:
            raise ValueError(f"{file}: goal {goal!r}: must be one of {', '.join(GOALS)}")
        values, origin = entry["settings"], entry["provenance"]
        same = next((row for row in by_name.values() if row.settings == values), None)
        name = f"{attention}-{goal}" if same is None else same.name
        goals = (goal,) if same is None else (*same.goals, goal)
        try:
            length, dtype = int(origin["length"]), str(origin["dtype"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} does not say what it was tuned for: {error!r}") from error
        first = entry if same is None else {"figures": same.figures, "provenance": same.provenance}
        by_name[name] = TunedSettings(
            name,
            attention,
            goals,
            length,
            dtype,
            values,
            first["figures"],
            first["provenance"],
            folder if same is None else same.folder,
        )
    return by_name
