"""Describe the space that a study searches: named ranges, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Categorical", "Float", "Range", "Space"]


@dataclass(frozen=True)
class Categorical:
    """A range of listed values: numbers, names, True and False, None."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Categorical(()): must have values to choose from")

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.values))


@dataclass(frozen=True)
class Float:
    """A range of numbers from low to high; ``log`` samples them on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not (finite and self.low < self.high and (self.low > 0 or not self.log)):
            raise ValueError(f"{self!r}: must be finite and low < high, and low > 0 where log")

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


Range = Categorical | Float


@dataclass(frozen=True)
class Space:
    """The ranges of a study, and the settings that a choice stands for.

    A choice is one value for each range. Where one setting bounds another, the ranges hold what
    can be chosen freely, and ``settings`` computes the rest.

    Attributes:
        ranges: the ranges, by name.
        default: the choice that stands for the default settings; a study begins with it.
        settings: function from a choice to the settings. By default they are the choice itself.

    Example:
        >>> space = Space({"window": Categorical((64, 128))}, {"window": 128})
        >>> space.settings({"window": 64})
        {'window': 64}
    """

    ranges: Mapping[str, Range]
    default: Mapping[str, Any]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=dict)

    def __post_init__(self) -> None:
        self.check(self.default)

    def check(self, choice: Mapping[str, Any]) -> None:
        """Refuse a choice that is not in this space.

        Args:
            choice: a value for each range.

        Raises:
            ValueError: a value is missing, unknown or out of its range; says which.
        """
        for name in sorted({*choice, *self.ranges}):
            if name not in self.ranges:
                raise ValueError(f"{name}: must be one of {', '.join(self.ranges)}")
            if name not in choice:
                raise ValueError(f"{name} is missing: must be {self.ranges[name]}")
            if choice[name] not in self.ranges[name]:
                raise ValueError(f"{name} = {choice[name]!r}: must be {self.ranges[name]}")

    def to_json(self) -> str:
        """Return the ranges in JSON, the same text for equal ranges."""
        ranges = {
            name: {"kind": type(values).__name__, **asdict(values)}
            for name, values in self.ranges.items()
        }
        return json.dumps(ranges, sort_keys=True)
