"""What of an attention, or of how it is run, a study may choose: ranges, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Categorical", "Float", "Range", "Space"]


@dataclass(frozen=True)
class Categorical:
    """One of some values: numbers, names, True and False, None."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Categorical(()): must have values to choose from")

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(some) and value == some for some in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.values))


@dataclass(frozen=True)
class Float:
    """A number from low to high; ``log``: small ones are told apart more finely."""

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
    """What there is to choose, and what a choice stands for.

    Attributes:
        ranges: by name.
        default: the choice that stands for the default settings; a study begins with it.
        settings: makes the settings of a choice; as they are without. Where one setting bounds
            another, the ranges are of what can be chosen freely.
    """

    ranges: Mapping[str, Range]
    default: Mapping[str, Any]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=dict)

    def __post_init__(self) -> None:
        self.check(self.default)

    def check(self, choice: Mapping[str, Any]) -> None:
        """Raises: ValueError: the choice is not one of this space; says what is not."""
        for name in sorted({*choice, *self.ranges}):
            if name not in self.ranges:
                raise ValueError(f"{name}: must be one of {', '.join(self.ranges)}")
            if name not in choice:
                raise ValueError(f"{name} is missing: must be {self.ranges[name]}")
            if choice[name] not in self.ranges[name]:
                raise ValueError(f"{name} = {choice[name]!r}: must be {self.ranges[name]}")

    def to_json(self) -> str:
        """The ranges, the same for equal ones."""
        ranges = {
            name: {"kind": type(some).__name__, **asdict(some)}
            for name, some in self.ranges.items()
        }
        return json.dumps(ranges, sort_keys=True)
