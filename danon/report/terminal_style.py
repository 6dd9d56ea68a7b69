"""Elements that all tables of the terminal share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from danon.report import formatting
from danon.report.remarks import MARK, Remark

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NAME", "STYLES", "WIDE", "heading_at", "marked_name"]

STYLES = {"ours": "bold green", "yours": "bold magenta", "reference": "bold", "baseline": ""}
WIDE = 130  # columns from which what an attention computes has a column of its own
NAME = 7  # characters of a task


def heading_at(length: int) -> str:
    """Return the second line of a heading."""
    return f"\nat {formatting.format_length(length)}"


def marked_name(attention: str, remarks: Sequence[Remark]) -> Text:
    """Return the name of an attention, with a mark if there are remarks on it."""
    return Text(f"{attention} {MARK}" if remarks else attention)
