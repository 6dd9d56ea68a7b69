"""Remarks on an attention's figures; some are doubts, which exclude it from being the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.report.formatting import format_length
from danon.runs.case import CONTENDED_CORES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from danon.runs.case import CaseResult

__all__ = ["MARK", "Remark", "doubtful", "far", "remarks"]

SELF = "self in float64"
"""Kind of a check whose oracle is the attention itself; it misses errors that both make."""
MARK = "†"
HARMLESS = frozenset(
    {
        "the environment",
        "sys.path",
        "the warning filters",
        "the current folder",
        "the locale",
        "torch's seed",
        "signal handlers",
        "the umask",
        "sys.excepthook",
    }
)
"""Settings of :mod:`danon.measure.process_state` that do not affect the time of other calls."""
FAR = 0.99
"""Relative error against dense attention at which zeros would be as close."""
UNCHECKED = "checked against itself in float64: nothing tells whether it is right"


@dataclass(frozen=True)
class Remark:
    """A sentence on an attention.

    Attributes:
        text: the sentence.
        doubt: True if the attention must not be marked as the best nor recommended.
    """

    text: str
    doubt: bool = False


def remarks(results: Iterable[CaseResult]) -> dict[str, tuple[Remark, ...]]:
    """Return the remarks on the attentions of a run; attentions without remarks are left out."""
    kinds: dict[str, set[str]] = {}
    changed: dict[str, list[str]] = {}
    contended: dict[str, list[CaseResult]] = {}
    for result in results:
        name = result.case.attention
        kinds.setdefault(name, set()).add(result.check.get("kind", ""))
        changed.setdefault(name, []).extend(result.notes)
        if CONTENDED_CORES in result.metrics:
            contended.setdefault(name, []).append(result)
    notes: dict[str, list[Remark]] = {}
    for name, checks in kinds.items():
        if SELF in checks:
            notes.setdefault(name, []).append(Remark(UNCHECKED, doubt=True))
        if settings := list(dict.fromkeys(changed[name])):
            beside = any(setting not in HARMLESS for setting in settings)
            text = f"changed {', '.join(settings)} of the process"
            text += ", for dense attention beside it too" if beside else ""
            notes.setdefault(name, []).append(Remark(text, doubt=beside))
        if timed := contended.get(name):
            notes.setdefault(name, []).append(_contention(timed))
    return {name: tuple(sentences) for name, sentences in notes.items()}


def _contention(results: Sequence[CaseResult]) -> Remark:
    """Return the remark on cases that were timed while other programs took their cores."""
    worst = max(results, key=lambda result: result.metrics[CONTENDED_CORES])
    case, cores = worst.case, worst.metrics[CONTENDED_CORES]
    what = " ".join(dict.fromkeys((case.suite, case.phase)))
    where = f"{what} at {format_length(case.length)}"
    more = f" and {len(results) - 1} more" if len(results) > 1 else ""
    text = f"other programs took up to {cores:.1f} cores while it was timed ({where}{more})"
    return Remark(f"{text}: run it again", doubt=True)


def doubtful(notes: Iterable[Remark]) -> bool:
    """Return True if one of the remarks is a doubt."""
    return any(remark.doubt for remark in notes)


def far(error: float) -> tuple[Remark, ...]:
    """Return a remark if an output is no closer to dense attention's than zeros would be."""
    if not math.isfinite(error) or error < FAR:
        return ()
    return (Remark("its output is no nearer to dense attention's than zeros"),)
