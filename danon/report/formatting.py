"""How figures are written, everywhere alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from danon.report.figure import Figure

__all__ = [
    "format_accuracy",
    "format_bits",
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
]

NOTHING = "-"


def format_length(length: int) -> str:
    """1024 -> 1k, 1048576 -> 1M, 1000 -> 1000."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if length and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def _three_digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def format_speedup(figure: Figure | None) -> str:
    """``3.42``; ``~8.1`` extrapolated; ``3.4?`` when its interval stayed wide."""
    if figure is None or not math.isfinite(figure.value):
        return NOTHING
    before, after = "~" * figure.extrapolated, "?" * (not figure.conclusive)
    return f"{before}{_three_digits(figure.value)}{after}"


def format_interval(figure: Figure | None) -> str:
    """``3.30-3.55``, empty where there is none."""
    if figure is None or not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return ""
    return f"{_three_digits(figure.low)}-{_three_digits(figure.high)}"


def format_flops(flops: float) -> str:
    """GFLOP/s."""
    return _three_digits(flops / 1e9) if math.isfinite(flops) else NOTHING


def format_share(value: float) -> str:
    """A fraction of one, in percent."""
    return f"{value:.0%}" if math.isfinite(value) else NOTHING


def format_distance(value: float) -> str:
    """``0.031``, ``46.1``, ``2.3e-07``; a plain 0 is none at all."""
    if not 0.0005 <= value < math.inf:
        return format_error(value)
    return f"{value:.3f}" if value < 0.9995 else _three_digits(value)


def format_signed(figure: Figure) -> str:
    """An exponent: ``+0.52``, ``-0.10``; ``+0.5?`` without an interval."""
    if not math.isfinite(figure.value):
        return NOTHING
    return f"{figure.value:+.2f}{'' if math.isfinite(figure.low) else '?'}"


def format_shares(parts: dict[str, float]) -> str:
    """``near 71% nodes 20% sinks 9%``; a name that all have in front is said once."""
    owners = {name.partition(".")[0] for name in parts if "." in name}
    one = len(owners) == 1 and all("." in name for name in parts)
    told = [
        f"{name.partition('.')[2] if one else name} {format_accuracy(part)}"
        for name, part in parts.items()
    ]
    return " ".join((*(f"{owner}:" for owner in owners if one), *told)) or NOTHING


def format_accuracy(value: float) -> str:
    """In percent: ``98%``; ``>99%`` and ``<1%`` where rounding would say all or none."""
    if not math.isfinite(value):
        return NOTHING
    return ">99%" if 0.995 <= value < 1 else "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def format_bits(value: float) -> str:
    """Bits per byte, to the thousandth."""
    return f"{value:.3f}" if math.isfinite(value) else NOTHING


def format_perplexity(value: float) -> str:
    """``37.55``, ``214``, ``3.1e+06``."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"


def format_mebibytes(value: float) -> str:
    """MiB."""
    return _three_digits(value / 2**20) if math.isfinite(value) else NOTHING


def format_error(value: float) -> str:
    """Two digits: ``0.20``, ``3.1e-07``."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:#.2g}".rstrip(".") if value else "0"


def format_seconds(value: float) -> str:
    """``3.75 s``, ``118 ms``, ``45.0 us``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value * 1e6)} us" if math.isfinite(value) else NOTHING


def format_number(value: float) -> str:
    """Three digits: ``0.0312``, ``46.1``, ``1.25e+09``."""
    return f"{value:.3g}" if math.isfinite(value) else NOTHING


def format_unit(value: float, unit: str) -> str:
    """Return a value as its unit is read best: ``118 ms``, ``3.20 MiB``, ``46.1``.

    Args:
        value: in the unit.
        unit: of a metric; the unit itself is printed only where its prefix depends on the value.
    """
    if unit == "s":
        return format_seconds(value)
    if unit == "B" and math.isfinite(value):
        return f"{format_mebibytes(value)} MiB"
    return format_number(value)


def format_list(settings: Mapping[str, Any]) -> str:
    """Settings in a line: ``window 512, decay 0.125``; those of a part in parentheses."""
    return ", ".join(f"{name} {_value(x)}" for name, x in settings.items())


def _value(x: object) -> str:
    if isinstance(x, Mapping):
        return f"({format_list(x)})"
    return f"{x:.3g}" if isinstance(x, float) else str(x)
