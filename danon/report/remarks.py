"""What a reader must know of an attention's figures, and which of them can be nobody's best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from danon.runs.case import CaseResult

__all__ = ["MARK", "Remark", "doubtful", "far", "remarks"]

SELF = "self in float64"
"""Kind of a check whose oracle is the attention itself: what both get wrong, it does not see."""
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
"""Settings of :mod:`danon.measure.process_state` that move no time of what runs beside them."""
FAR = 0.99
"""Relative error against dense attention from which zeros would have been as near."""
UNCHECKED = "checked against itself in float64: nothing tells whether it is right"


@dataclass(frozen=True)
class Remark:
    """A sentence on an attention.

    Attributes:
        doubt: it is never marked as the best nor recommended.
    """

    text: str
    doubt: bool = False


def remarks(results: Iterable[CaseResult]) -> dict[str, tuple[Remark, ...]]:
    """What a run says of its attentions; those of which there is nothing to say are not in it."""
    kinds: dict[str, set[str]] = {}
    changed: dict[str, list[str]] = {}
    for result in results:
        name = result.case.attention
        kinds.setdefault(name, set()).add(result.check.get("kind", ""))
        changed.setdefault(name, []).extend(result.notes)
    found: dict[str, list[Remark]] = {}
    for name, seen in kinds.items():
        if SELF in seen:
            found.setdefault(name, []).append(Remark(UNCHECKED, doubt=True))
        if settings := list(dict.fromkeys(changed[name])):
            beside = any(setting not in HARMLESS for setting in settings)
            text = f"changed {', '.join(settings)} of the process"
            text += ", for dense attention beside it too" if beside else ""
            found.setdefault(name, []).append(Remark(text, doubt=beside))
    return {name: tuple(some) for name, some in found.items()}


def doubtful(some: Iterable[Remark]) -> bool:
    """Whether one of them is a doubt."""
    return any(remark.doubt for remark in some)


def far(error: float) -> tuple[Remark, ...]:
    """Of an output that is no nearer to dense attention's than zeros would be."""
    if not math.isfinite(error) or error < FAR:
        return ()
    return (Remark("its output is no nearer to dense attention's than zeros"),)
