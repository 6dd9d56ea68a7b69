"""Formatting of figures, the same in all tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from danon.report.crossover import Crossover
from danon.report.figure import Figure

__all__ = [
    "format_accuracy",
    "format_bits",
    "format_crossover",
    "format_distance",
    "format_error",
    "format_flops",
    "format_interval",
    "format_length",
    "format_list",
    "format_mebibytes",
    "format_perplexity",
    "format_seconds",
    "format_share",
    "format_shares",
    "format_signed",
    "format_speedup",
    "format_unit_interval",
]

NOTHING = "-"
ROUNDING = 0.005
"""Half of the last digit that an interval is printed with."""


def format_length(length: int) -> str:
    """Format a number of tokens: 1024 -> 1k, 1048576 -> 1M, 1000 -> 1000."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if length and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def format_speedup(figure: Figure | None) -> str:
    """Format a speed-up: ``3.42``; ``~8.1`` if extrapolated; ``3.4?`` if its interval is wide."""
    if figure is None or not math.isfinite(figure.value):
        return NOTHING
    before, after = "~" * figure.extrapolated, "?" * (not figure.conclusive)
    return f"{before}{_three_digits(figure.value)}{after}"


def format_crossover(crossover: Crossover | None) -> str:
    """Format a crossover length: ``2.1k``; ``<1k`` or ``>16k`` beyond the measured lengths."""
    if crossover is None:
        return NOTHING
    if crossover.side:
        return f"{crossover.side}{format_length(int(crossover.length))}"
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if crossover.length >= size:
            return f"{crossover.length / size:.2g}{unit}"
    return f"{crossover.length:.0f}"


def format_interval(
    figure: Figure | None, *, least: float = -math.inf, most: float = math.inf
) -> str:
    """Format an interval: ``3.30-3.55``, ``-0.20 to 1.10``; empty without one.

    Args:
        figure: figure with its interval.
        least: least possible value; an interval that goes below it says nothing and is left out.
        most: largest possible value.
    """
    if figure is None or not _possible(figure, least, most):
        return ""
    low, high = (0.0 if abs(end) < ROUNDING else end for end in (figure.low, figure.high))
    return f"{_three_digits(low)}{'-' if low >= 0 else ' to '}{_three_digits(high)}"


def _possible(figure: Figure, least: float, most: float) -> bool:
    low, high = figure.low, figure.high
    return least - ROUNDING < low <= high < most + ROUNDING and math.isfinite(low + high)


def format_flops(flops: float) -> str:
    """Format a rate in GFLOP/s."""
    return _three_digits(flops / 1e9) if math.isfinite(flops) else NOTHING


def format_share(value: float) -> str:
    """Format a fraction in percent."""
    return f"{value:.0%}" if math.isfinite(value) else NOTHING


def format_distance(value: float) -> str:
    """Format a distance: ``0.031``, ``46.1``, ``2.3e-07``; exactly zero is ``0``."""
    if not 0.0005 <= value < math.inf:
        return format_error(value)
    return f"{value:.3f}" if value < 0.9995 else _three_digits(value)


def format_signed(figure: Figure) -> str:
    """Format an exponent: ``+0.52``, ``-0.10``; ``+0.52?`` without an interval."""
    if not math.isfinite(figure.value):
        return NOTHING
    return f"{figure.value:+.2f}{'' if math.isfinite(figure.low) else '?'}"


def format_shares(parts: dict[str, float]) -> str:
    """Format shares: ``near 71% nodes 20% sinks 9%``; a common prefix is written once."""
    owners = {name.partition(".")[0] for name in parts if "." in name}
    one = len(owners) == 1 and all("." in name for name in parts)
    texts = [
        f"{name.partition('.')[2] if one else name} {format_accuracy(part)}"
        for name, part in parts.items()
    ]
    return " ".join((*(f"{owner}:" for owner in owners if one), *texts)) or NOTHING


def format_accuracy(value: float) -> str:
    """Format an accuracy: ``98%``; ``>99%`` and ``<1%`` instead of a rounded 100% or 0%."""
    if not math.isfinite(value):
        return NOTHING
    return ">99%" if 0.995 <= value < 1 else "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def format_bits(value: float) -> str:
    """Format bits per byte, to the thousandth."""
    return f"{value:.3f}" if math.isfinite(value) else NOTHING


def format_perplexity(value: float) -> str:
    """Format a perplexity: ``37.55``, ``214``, ``3.1e+06``."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"


def format_mebibytes(value: float) -> str:
    """Format bytes in MiB."""
    return _three_digits(value / 2**20) if math.isfinite(value) else NOTHING


def format_error(value: float) -> str:
    """Format an error with two digits: ``0.20``, ``3.1e-07``."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:#.2g}".rstrip(".") if value else "0"


def format_seconds(value: float) -> str:
    """Format a duration: ``3.75 s``, ``118 ms``, ``45.0 us``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value * 1e6)} us" if math.isfinite(value) else NOTHING


def format_number(value: float) -> str:
    """Format a number with three digits: ``0.0312``, ``46.1``, ``1.25e+09``."""
    return f"{value:.3g}" if math.isfinite(value) else NOTHING


def format_unit(value: float, unit: str) -> str:
    """Format a value by its unit: ``118 ms``, ``3.20 MiB``, ``46.1``.

    Args:
        value: value in the unit.
        unit: unit of a metric; it is printed only if its prefix depends on the value.
    """
    if unit == "s":
        return format_seconds(value)
    if unit == "B" and math.isfinite(value):
        return f"{format_mebibytes(value)} MiB"
    return format_number(value)


def format_unit_interval(figure: Figure, unit: str) -> str:
    """Format an interval by its unit: ``118 ms to 124 ms``; empty without one.

    An interval of seconds or bytes that goes below zero says nothing and is left out.

    Args:
        figure: figure with its interval.
        unit: unit of a metric.
    """
    if not _possible(figure, -math.inf, math.inf) or (unit in ("s", "B") and figure.low < 0):
        return ""
    return f"{format_unit(figure.low, unit)} to {format_unit(figure.high, unit)}"


def format_list(settings: Mapping[str, Any]) -> str:
    """Format settings: ``window 512, decay 0.125``; nested settings in parentheses."""
    return ", ".join(f"{name} {_value(x)}" for name, x in settings.items())


def _value(x: object) -> str:
    if isinstance(x, Mapping):
        return f"({format_list(x)})"
    return f"{x:.3g}" if isinstance(x, float) else str(x)
