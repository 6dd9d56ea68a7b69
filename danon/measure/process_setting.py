"""A setting of the process, and the words for a difference between two of its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Setting",
    "describe_change",
    "describe_changed_entries",
    "describe_nothing",
    "describe_values",
    "list_names",
]

MAX_NAMES = 3
"""Names of changed entries that a description lists; further ones are counted."""
MAX_WORD_LENGTH = 40
"""Characters of a value in a description."""


def describe_values(before: object, now: object) -> str:
    """Return both values: ``on -> off``."""
    return f"{_word(before)} -> {_word(now)}"


def describe_changed_entries(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the names of the entries of a dictionary that differ."""
    return list_names(
        sorted(
            str(name)
            for name in before.keys() | now.keys()
            if name not in before or name not in now or before[name] != now[name]
        )
    )


def describe_change(before: object, now: object) -> str:
    """Return ``changed``: for values that would say nothing to a reader."""
    return "changed"


def describe_nothing(before: object, now: object) -> str:
    """Return an empty text: the setting is set back without a note."""
    return ""


def list_names(names: Sequence[str]) -> str:
    """Return the first names of a list and the number of the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


@dataclass(frozen=True)
class Setting:
    """One thing that a process has once.

    Attributes:
        name: in words.
        read: returns its value; two values are compared.
        write: sets a value that was read; None: it cannot be set back.
        describe: a difference in words, from the value before and the one now; empty: the
            difference is not reported.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object] | None
    describe: Callable[[Any, Any], str] = describe_values


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value).removeprefix("torch.")
    return text if len(text) <= MAX_WORD_LENGTH else f"{text[: MAX_WORD_LENGTH - 3]}..."
