"""Cases without figures, grouped by reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pandas as pd

from danon.report import formatting

__all__ = ["Unmeasured", "unmeasured_cases"]


@dataclass(frozen=True)
class Unmeasured:
    """Cases of one attention that share a reason for having no figures.

    Attributes:
        where: which cases, in words.
    """

    attention: str
    status: str
    reason: str
    where: str


def unmeasured_cases(frame: pd.DataFrame) -> list[Unmeasured]:
    """Every case without figures, grouped by reason; failures first.

    Reasons that differ only in their numbers are one; the shortest length's is shown.
    """
    order = ("failed", "over budget", "unavailable")
    if frame.empty:
        return []
    found = []
    missing = frame[frame["status"] != "measured"].sort_values("length", kind="stable")
    wording = missing["reason"].str.replace(r"\d+(\.\d+)?", "#", regex=True).rename("wording")
    for key, group in missing.groupby(["status", "attention", wording], sort=False):
        status, attention, _ = cast("tuple[str, str, str]", key)
        mine = frame[frame["attention"] == attention]
        found.append(Unmeasured(attention, status, group["reason"].iloc[0], _where(group, mine)))
    return sorted(found, key=lambda a: (order.index(a.status), a.attention))


def _where(group: pd.DataFrame, everything: pd.DataFrame) -> str:
    """In words: ``speed 8k to 128k (forward float32); recall mqar 64 to 256``."""
    if len(group) == len(everything):
        return "everything"
    parts = []
    for (suite, task), cases in group.groupby(["suite", "task"], sort=False):
        beside = everything[(everything["suite"] == suite) & (everything["task"] == task)]
        asked = sorted(set(beside["length"]))
        kinds: dict[str, list[str]] = {}  # lengths in words -> kinds of case that lack these
        for (phase, dtype), same in cases.groupby(["phase", "dtype"]):
            spans = _spans(sorted(set(same["length"]) - {0}), asked)
            kinds.setdefault(spans, []).append(f"{phase} {dtype}")
        said = [f"{spans} ({', '.join(names)})".strip() for spans, names in kinds.items()]
        # a task is trained for in one way only
        parts.append(f"{suite} {task} {', '.join(kinds)}" if task else f"{suite} {', '.join(said)}")
    return "; ".join(parts)


def _spans(lengths: list[int], asked: list[int]) -> str:
    """Lengths in words; a run of neighbours among those asked for as ``first to last``."""
    if not lengths:
        return ""
    names = [formatting.format_length(n) for n in lengths]
    neighbours = (
        len(lengths) > 2 and [n for n in asked if lengths[0] <= n <= lengths[-1]] == lengths
    )
    return f"{names[0]} to {names[-1]}" if neighbours else ", ".join(names)
