"""Cases without figures, grouped by reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pandas as pd

from danon.report import formatting

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Unmeasured", "describe_absences", "unmeasured_cases"]

MOST_NAMES = 3


@dataclass(frozen=True)
class Unmeasured:
    """Cases of one attention that lack figures for the same reason.

    Attributes:
        attention: registered name.
        status: ``failed``, ``over budget`` or ``unavailable``.
        reason: reason in a line.
        where: suites, tasks and lengths of the cases, in words.
    """

    attention: str
    status: str
    reason: str
    where: str


def unmeasured_cases(frame: pd.DataFrame) -> list[Unmeasured]:
    """Return the cases without figures, grouped by attention and reason, failures first.

    Reasons that differ only in numbers form one group, with the reason at the shortest length.
    """
    order = ("failed", "over budget", "unavailable")
    if frame.empty:
        return []
    groups = []
    missing = frame[frame["status"] != "measured"].sort_values("length", kind="stable")
    wording = missing["reason"].str.replace(r"\d+(\.\d+)?", "#", regex=True).rename("wording")
    for key, group in missing.groupby(["status", "attention", wording], sort=False):
        status, attention, _ = cast("tuple[str, str, str]", key)
        where = _where(group, frame[frame["attention"] == attention])
        groups.append(Unmeasured(attention, status, group["reason"].iloc[0], where))
    return sorted(groups, key=lambda cases: (order.index(cases.status), cases.attention))


def describe_absences(absences: Sequence[Unmeasured]) -> str:
    """Return which attentions lack all figures, and how many lack some.

    Args:
        absences: result of :func:`unmeasured_cases`, not empty.
    """
    wholly: dict[str, list[str]] = {}
    for cases in absences:
        if cases.where == "everything":
            wholly.setdefault(cases.status, []).append(cases.attention)
    texts = [f"{', '.join(names)} ({status})" for status, names in wholly.items()]
    partly = {cases.attention for cases in absences} - {
        n for names in wholly.values() for n in names
    }
    if partly:
        some = f"{len(partly)} others" if len(partly) > MOST_NAMES else ", ".join(sorted(partly))
        texts.append(f"some cases of {some}")
    return f"Not measured: {'; '.join(texts)}"


def _where(group: pd.DataFrame, everything: pd.DataFrame) -> str:
    """Describe cases: ``speed 8k to 128k (forward float32); recall mqar 64 to 256``."""
    if len(group) == len(everything):
        return "everything"
    parts = []
    for (suite, task), cases in group.groupby(["suite", "task"], sort=False):
        beside = everything[(everything["suite"] == suite) & (everything["task"] == task)]
        planned = sorted(set(beside["length"]))
        variants: dict[str, list[str]] = {}  # lengths in words -> phases and dtypes without them
        for (phase, dtype), same in cases.groupby(["phase", "dtype"]):
            spans = _spans(sorted(set(same["length"]) - {0}), planned)
            variants.setdefault(spans, []).append(f"{phase} {dtype}")
        texts = [f"{spans} ({', '.join(names)})".strip() for spans, names in variants.items()]
        # a task has a single phase and dtype
        lengths = ", ".join(variants if task else texts)
        parts.append(f"{suite} {task} {lengths}" if task else f"{suite} {lengths}")
    return "; ".join(parts)


def _spans(lengths: list[int], planned: list[int]) -> str:
    """Describe lengths; neighbours among the planned ones as ``first to last``."""
    if not lengths:
        return ""
    names = [formatting.format_length(n) for n in lengths]
    neighbours = (
        len(lengths) > 2 and [n for n in planned if lengths[0] <= n <= lengths[-1]] == lengths
    )
    return f"{names[0]} to {names[-1]}" if neighbours else ", ".join(names)
