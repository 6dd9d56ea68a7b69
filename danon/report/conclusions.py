"""Three sentences on a run, made from its figures alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from danon.report import formatting
from danon.report.remarks import doubtful
from danon.report.summary import Summary, SummaryRow, summarize
from danon.report.tables import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from danon.report.quality_tables import Task
    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["conclude", "conclusions"]

WORDS = {
    "": "{names} {length}",
    "<": "{names} every measured length ({length} and more)",
    ">": "{names} none up to {length}",
}
"""Words for the side of the crossover that the measured lengths lie on."""


def conclusions(results: Sequence[CaseResult], info: RunInfo) -> tuple[str, ...]:
    """Return sentences on a run: the fastest, the smallest, and the crossover lengths.

    Args:
        results: outcomes of its cases so far.
        info: description of the run: commit, profile, machine.

    Returns:
        Up to three sentences; none without a forward pass.
    """
    return conclude(summarize(results, info))


def conclude(summary: Summary) -> tuple[str, ...]:
    """Return the sentences on a summary.

    Args:
        summary: result of :func:`danon.report.summary.summarize`.
    """
    if summary.forward is None:
        return ()
    sentences = (_fastest(summary), _smallest(summary), _crossovers(summary))
    return tuple(sentence for sentence in sentences if sentence)


def _fastest(summary: Summary) -> str:
    """Say which is the fastest that is as good as dense attention, and what faster ones lose."""
    assert summary.forward is not None
    length = formatting.format_length(summary.length)
    exact = "" if length == str(summary.length) else f" ({summary.length})"
    start = f"On this {summary.forward.device} at {length}{exact} tokens"
    faster = [row for row in summary.rows if _faster(row) and not doubtful(row.remarks)]
    if not faster:
        return f"{start} nothing is faster than dense attention ({REFERENCE})."
    answer = summary.recommendation
    if answer is None or answer.judged is None:
        return (
            f"{start} the fastest is {faster[0].attention}, {_times(faster[0])} as dense "
            "attention; no quality was measured in this run."
        )
    task = answer.judged[1]
    quality = _quality(answer.judged)
    scores = {row.attention: row.quality for row in summary.rows}
    dense = task.write(scores.get(REFERENCE, math.nan))

    def described(row: SummaryRow) -> str:
        known = math.isfinite(row.quality)
        score = task.write(row.quality) if known else "unknown quality"
        return f"{row.attention} ({_times(row)}, {score})"

    chosen = answer.best.attention if answer.best else ""
    best = next((row for row in faster if row.attention == chosen), None)
    if best is not None:
        text = (
            f"{start} take {best.attention}: {_times(best)} as dense attention and as good, "
            f"{task.write(best.quality)} of {quality}, dense {dense}"
        )
        worse = faster[: faster.index(best)]
        return f"{text}; the fastest is {described(worse[0])}." if worse else f"{text}."
    most = min(faster, key=lambda row: task.loss_of(row.quality))
    text = (
        f"{start} keep dense attention ({REFERENCE}) where quality counts: nothing faster is shown "
        f"to be as good ({dense} of {quality}). Of the faster ones "
    )
    if most is faster[0]:
        return f"{text}{described(most)} is the fastest and has the best quality."
    return f"{text}{described(faster[0])} is the fastest, {described(most)} has the best quality."


def _quality(judged: tuple[object, Task, int]) -> str:
    """Return the quality in words: ``lookup answers at 16k``."""
    _, task, at = judged
    unit = "answers " if task.metric == "accuracy" else ""
    return f"{task.name} {unit}at {formatting.format_length(at)}"


def _smallest(summary: Summary) -> str:
    """Say which needs the least memory, dense attention aside."""
    at = formatting.format_length(summary.length)
    rows = {
        row.attention: row.peak
        for row in summary.rows
        if math.isfinite(row.peak) and not doubtful(row.remarks)
    }
    dense = rows.pop(REFERENCE, math.nan)
    faster = {row.attention for row in summary.rows if _faster(row)}
    others = {name: peak for name, peak in rows.items() if name in faster} or rows
    if not others:
        return ""
    least = formatting.format_mebibytes(min(others.values()))
    names = [name for name, peak in others.items() if formatting.format_mebibytes(peak) == least]
    group = "the faster ones" if names[0] in faster else "the others"
    text = f"Least working memory of {group}: {_listed(names)}, {least} MiB at {at}"
    if math.isfinite(dense):
        text += f"; dense attention needs {formatting.format_mebibytes(dense)} MiB"
    return f"{text}."


def _crossovers(summary: Summary) -> str:
    """Say from which length on each of ours, and the user's, is faster than dense attention."""
    ours = [row for row in summary.rows if row.role in ("ours", "yours") and row.pays_from]
    ours.sort(key=lambda row: (row.pays_from.sort_key if row.pays_from else (), row.attention))
    names: dict[tuple[str, str], list[str]] = {}
    for row in ours:
        assert row.pays_from is not None
        side, length = row.pays_from.side, formatting.format_crossover(row.pays_from)
        names.setdefault((side, length.lstrip("<>")), []).append(row.attention)
    texts = [
        WORDS[side].format(names=_listed(attentions), length=length)
        for (side, length), attentions in names.items()
    ]
    start = "A forward pass is faster than dense attention's from so many tokens on"
    return f"{start}: {', '.join(texts)}." if texts else ""


def _listed(names: Sequence[str]) -> str:
    """Return names as a list in words: ``msra, dala and ucsa``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _faster(row: SummaryRow) -> bool:
    return row.attention != REFERENCE and row.speedup.value > 1


def _times(row: SummaryRow) -> str:
    between = formatting.format_interval(row.speedup)
    times = formatting.format_speedup(row.speedup).rstrip("?")  # the interval says it
    return f"{times} times as fast" + (f" [{between}]" if between else "")
