"""Settings that a study found best: results/tuned/*.json, as ``danon tune`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["GOALS", "HYPERPARAMETERS", "file_of", "folder", "read", "settings"]

HYPERPARAMETERS = "hyperparameters"
"""The kind of study whose choices are settings of a configuration."""
GOALS = ("speed", "memory", "quality", "balanced")
"""What a configuration can be the best for."""


def folder() -> Path:
    """Where the ones that come with danon are: the checkout, or inside the installed wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "results" / "tuned"
    return checkout if checkout.is_dir() else package / "_bundle" / "tuned"


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
    file = file_of(attention, folder() if place is None else place, kind)
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = found["attention"] == attention and all(
            isinstance(some[part], dict)
            for some in found["best"].values()
            for part in ("settings", "choice", "figures", "provenance")
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no file of danon tune: {error!r}") from error
    if not whole:
        raise ValueError(f"{file} is no file of danon tune for {attention!r}")
    best: Mapping[str, Any] = found["best"]
    return best


def settings(attention: str, goal: str, place: Path | None = None) -> dict[str, Any]:
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
