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

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["conclude", "conclusions"]


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
    start = f"At {formatting.format_length(summary.length)} tokens"
    faster = [row for row in summary.rows if _faster(row) and not doubtful(row.remarks)]
    if not faster:
        return f"{start} nothing is faster than dense attention ({REFERENCE})."
    answer = summary.recommendation
    if answer is None or answer.judged is None:
        return (
            f"{start} the fastest is {faster[0].attention}, {_times(faster[0])} as dense "
            "attention; no quality was measured in this run."
        )
    _, task, at = answer.judged
    quality = f"{task.name} at {formatting.format_length(at)}"
    scores = {row.attention: row.quality for row in summary.rows}
    dense = task.write(scores.get(REFERENCE, math.nan))

    def described(row: SummaryRow) -> str:
        known = math.isfinite(row.quality)
        return (
            f"{row.attention} is {_times(row)} with "
            f"{task.write(row.quality) if known else 'unknown quality'}"
        )

    best = next(
        (row for row in faster if answer.best and row.attention == answer.best.attention), None
    )
    if best is None:
        most = min(faster, key=lambda row: task.loss_of(row.quality))
        named = dict.fromkeys((faster[0].attention, most.attention))
        texts = [described(row) for row in faster if row.attention in named]
        return (
            f"{start} nothing faster than dense attention is shown to be as good "
            f"({quality}: {dense}): {', '.join(texts)}."
        )
    text = (
        f"{start} take {best.attention}: {_times(best)} as dense attention, and as good "
        f"({quality}: {task.write(best.quality)}, dense {dense})"
    )
    worse = faster[: faster.index(best)]
    return f"{text}; {described(worse[0])}." if worse else f"{text}."


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
    group = "of those faster than dense" if names[0] in faster else "of all but dense"
    text = f"The smallest {group}: {' and '.join(names)}, {least} MiB at {at}"
    if math.isfinite(dense):
        text += f"; dense needs {formatting.format_mebibytes(dense)} MiB"
    return f"{text}."


def _crossovers(summary: Summary) -> str:
    """Say from which length on each of ours, and the user's, is faster than dense attention."""
    lengths: dict[str, list[tuple[tuple[float, int], str, str]]] = {"": [], "<": [], ">": []}
    for row in summary.rows:
        if row.role in ("ours", "yours") and (pays := row.pays_from):
            length = formatting.format_length(int(pays.length))
            if not pays.side:
                length = formatting.format_crossover(pays)
            lengths[pays.side].append((pays.sort_key, row.attention, length))
    parts = []
    if between := [f"{length} ({name})" for _, name, length in sorted(lengths[""])]:
        parts.append(f"Dense attention is faster below {', '.join(between)} tokens")
    if always := [f"{name} from {length}" for _, name, length in sorted(lengths["<"])]:
        parts.append(f"slower at every measured length than {', '.join(always)} tokens on")
    if never := [f"{name} at {length}" for _, name, length in sorted(lengths[">"])]:
        parts.append(f"still faster than {', '.join(never)} tokens")
    if not parts:
        return ""
    text = "; ".join(parts)
    return f"{text if text.startswith('Dense') else f'Dense attention is {text}'}."


def _faster(row: SummaryRow) -> bool:
    return row.attention != REFERENCE and row.speedup.value > 1


def _times(row: SummaryRow) -> str:
    between = formatting.format_interval(row.speedup)
    times = formatting.format_speedup(row.speedup).rstrip("?")  # the interval says it
    return f"{times} times as fast" + (f" [{between}]" if between else "")
