"""The cases of the gate.

Calls that are short enough to repeat in many processes, and the recall of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from danon.runs.case import Case, Phase

__all__ = ["HEADS", "HEAD_DIM", "LONGEST", "counts_graph_breaks", "gate_cases"]

HEADS, HEAD_DIM = 4, 64
LONGEST = 4096

_PARTS: tuple[tuple[str, Phase, str, int], ...] = (
    ("speed", "forward", "float32", 1024),
    ("speed", "forward", "float32", LONGEST),
    ("speed", "forward", "bfloat16", 1024),
    ("speed", "forward", "bfloat16", LONGEST),
    ("speed", "forward+backward", "float32", 1024),
    ("speed", "forward+backward", "bfloat16", 1024),
    ("decode", "decode", "float32", 1024),
    ("decode", "decode", "float32", LONGEST),
)


def gate_cases(attentions: Iterable[str]) -> Iterator[Case]:
    """Yield every case of some attentions.

    Args:
        attentions: registered names.
    """
    for name in attentions:
        for suite, phase, dtype, length in _PARTS:
            yield Case(suite, name, length, dtype, phase, heads=HEADS, head_dim=HEAD_DIM)
        yield Case("recall", name, 256, "float32", "training", heads=1, head_dim=64, task="mqar")


def counts_graph_breaks(case: Case) -> bool:
    """Return True if graph breaks are counted in a case: once for an attention is enough."""
    return (case.phase, case.dtype, case.length) == ("forward", "float32", 1024)
