"""The subject of a study, as the user names it and as the measuring process describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Description", "Subject"]


@dataclass(frozen=True)
class Subject:
    """An attention, the kind of study, and the inputs of its trials.

    Attributes:
        kind: name of a :class:`danon.tuning.target.TuningTarget`.
        attention: registered name, or ``file.py:Class``.
        device: ``cpu`` or ``cuda``.
        length: tokens; None for the default of the kind.
        dtype: type of the numbers; None for the default of the kind.
    """

    kind: str
    attention: str
    device: str
    length: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Description:
    """Facts about a subject that only the measuring process knows.

    Attributes:
        length: tokens, the kind's default if the user named none.
        dtype: type of the numbers, likewise.
        space: ranges to choose from, in JSON.
        default: the choice that stands for the default settings.
        starts: choices to measure first, after the default.
        objectives: objectives that the figures cover.
        kind: what the kind of study chooses, in a phrase.
        machine: fingerprint of the machine.
    """

    length: int
    dtype: str
    space: str
    default: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...]
    objectives: tuple[str, ...]
    kind: str
    machine: Mapping[str, Any]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Description:
        """Return the description with these fields, as JSON has them."""
        lists = {name: tuple(values[name]) for name in ("starts", "objectives")}
        return cls(**{**values, **lists})
