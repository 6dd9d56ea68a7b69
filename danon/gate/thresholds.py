"""Thresholds: the times and metrics that a repository accepts, in a file for diffs.

Times are relative to dense attention in the same process: absolute times belong to a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from danon.runs.files import replace_file
from danon.runs.schema import first_problem

__all__ = ["PORTABLE", "Accepted", "Threshold", "Thresholds", "ThresholdsError", "Timing"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Words = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^(speed|decode|recall/\w+)/[\w.-]+/N\d+/\w+/[\w+]+/\w+$")]

RUNTIME = ("torch", "device")
MACHINE = (*RUNTIME, "cpu_capability", "cpu", "cores", "cpu_limit")
"""Entries of a fingerprint that identify a machine."""
PORTABLE = ("parameters", "flops", "state_bytes")
"""Exact metrics that are the same on every machine and with every torch."""


class ThresholdsError(ValueError):
    """A file of thresholds is missing or wrong."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accepted(_Strict):
    """A manual change of a threshold, with its previous values.

    Attributes:
        when: date, ISO-8601.
        commit: whose figures were accepted.
        by: name of the person.
        why: reason that the person gave.
        relative_time: previous value; None for a case that is not timed.
        facts: previous values of the exact metrics.
    """

    when: Words
    commit: Words
    by: Words
    why: Words
    relative_time: Positive | None
    facts: dict[str, Count]


class Timing(_Strict):
    """Times of one case.

    Attributes:
        relative: time over that of dense attention, CPU time of one thread.
        spread: standard deviation of log(head / base) between pairs of processes of the same code.
        drift: standard deviation of log(relative time) between processes.
    """

    relative: Positive
    spread: Positive
    drift: Positive


class Threshold(_Strict):
    """Threshold of one case.

    Attributes:
        time: None for a case that is not timed.
        facts: exact metrics by name.
        model: digest of the trained weights that they are about, empty if there are none.
        history: manual changes, the first first.
    """

    time: Timing | None
    facts: dict[str, Count]
    model: str = ""
    history: tuple[Accepted, ...] = ()


class Thresholds(_Strict):
    """Thresholds of a repository.

    Attributes:
        format: version of the file.
        commit: that was measured.
        when: date, ISO-8601.
        pairs: number of pairs of processes that each case was measured in.
        fingerprint: of the machine that measured.
        cases: by :attr:`Case.id`.
    """

    format: Literal[2] = 2
    commit: Words
    when: Words
    pairs: Annotated[int, Field(ge=2)]
    fingerprint: dict[str, str]
    cases: dict[Name, Threshold]

    @classmethod
    def read(cls, path: Path) -> Thresholds:
        """Read a file.

        Args:
            path: of the file.

        Raises:
            ThresholdsError: It is missing; or wrong, with the place and what is allowed there.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ThresholdsError(
                f"{path} is not there: `nox -s calibrate` measures it, and --against REV compares "
                "two commits without it"
            ) from None
        except ValidationError as error:
            raise ThresholdsError(f"{path}: {first_problem(error)}") from None

    def write(self, path: Path) -> None:
        """Write it sorted, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = json.dumps(self.model_dump(), indent=1, sort_keys=True)
        replace_file(path, f"{values}\n".encode())

    def comparable(self, fingerprint: Mapping[str, str]) -> bool:
        """Return True if graph breaks and bytes that tensors keep are the same on a machine.

        Args:
            fingerprint: of that machine.
        """
        return all(self.fingerprint.get(name) == fingerprint.get(name) for name in RUNTIME)

    def same_machine(self, fingerprint: Mapping[str, str]) -> bool:
        """Return True if times and peak bytes are the same, too: libraries of a processor differ.

        Args:
            fingerprint: of that machine.
        """
        return all(self.fingerprint.get(name) == fingerprint.get(name) for name in MACHINE)
