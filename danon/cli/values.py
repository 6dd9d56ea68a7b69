"""Values of options: what a user may type, and an error that names it and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import typer

__all__ = ["integer", "number", "one_of", "parameters", "some_of", "tokens"]

UNITS = {"": 1, "k": 2**10, "m": 2**20}
DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
MAX_TOKENS = 2**40
"""Largest length that is believed to be meant; no machine holds such a sequence."""
MAX_PARAMETERS = 1e14
"""Largest model that is believed to be meant."""


def tokens(text: str | int) -> int:
    """Read a number of tokens, such as ``16384``, ``16k`` (the same), ``128K`` or ``1M``.

    Args:
        text: what the user typed.

    Returns:
        The number of tokens; k is 1024 and M is 1024 x 1024, as in all tables.

    Raises:
        typer.BadParameter: the text is no whole number of tokens above 0.
    """
    match = re.fullmatch(r"([0-9]{1,15})([km]?)", str(text).strip().lower())
    length = int(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= length <= MAX_TOKENS:
        raise typer.BadParameter(
            f"{text!r}: must be a whole number of tokens above 0, such as 16384, 16k or 1M"
        )
    return length


def integer(minimum: int) -> Callable[[str | int], int]:
    """Return a reader of whole numbers.

    Args:
        minimum: the smallest allowed number.
    """

    def read(text: str | int) -> int:
        try:
            value = int(str(text))
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise typer.BadParameter(f"{text!r}: must be a whole number, at least {minimum}")
        return value

    return read


def number(text: str | float) -> float:
    """Read a number above 0.

    Args:
        text: what the user typed.

    Raises:
        typer.BadParameter: the text is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:  # nor not a number
        raise typer.BadParameter(f"{text!r}: must be a number above 0")
    return value


def parameters(text: str | float) -> float:
    """Read a number of parameters, such as ``350M``, ``7B``, ``1.3B`` or ``1T``.

    Args:
        text: what the user typed.

    Returns:
        The number; M is a million, B 1e9 and T 1e12.

    Raises:
        typer.BadParameter: the text is no such number.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([kmbt]?)", str(text).strip().lower())
    value = float(match[1]) * DECIMAL[match[2]] if match else 0.0
    if not 1 <= value <= MAX_PARAMETERS:
        raise typer.BadParameter(
            f"{text!r}: must be a number of parameters, such as 350M, 7B or 1.5T, at most 100T"
        )
    return value


def one_of(names: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """Return a reader of one of several names.

    Args:
        names: returns the allowed names; called only when an option is read.
    """

    def read(text: str) -> str:
        if text not in (known := tuple(names())):
            raise typer.BadParameter(f"{text!r}: must be one of {', '.join(known)}")
        return text

    return read


def some_of(names: Iterable[str]) -> Callable[[str], str]:
    """Return a reader of several names, comma separated.

    Args:
        names: allowed names.
    """
    known = tuple(names)

    def read(text: str) -> str:
        for name in text.split(","):
            if name.strip() not in known:
                raise typer.BadParameter(f"{name.strip()!r}: must be of {', '.join(known)}")
        return text

    return read
