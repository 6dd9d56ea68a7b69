"""What a repository accepts of its attentions: a file that is read in diffs.

Times are relative to dense attention in the same process, since absolute ones belong to a machine.
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
"""Entries of a fingerprint."""
PORTABLE = ("parameters", "flops", "state_bytes")
"""Exact metrics that no runtime changes."""


class ThresholdsError(ValueError):
    """A file of thresholds that is not there or not right."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accepted(_Strict):
    """That somebody moved a threshold, and what it was before.

    Attributes:
        when: date, ISO-8601.
        commit: whose figures were accepted.
        relative_time: None of a case that is not timed.
    """

    when: Words
    commit: Words
    by: Words
    why: Words
    relative_time: Positive | None
    facts: dict[str, Count]


class Timing(_Strict):
    """Of one case.

    Attributes:
        relative: time over that of dense attention, CPU time of one thread.
        spread: of log(head / base) between pairs of processes of the same code.
        drift: of log(relative time) between processes.
    """

    relative: Positive
    spread: Positive
    drift: Positive


class Threshold(_Strict):
    """Of one case.

    Attributes:
        time: None of what is not timed.
        facts: figures that are the same in every run.
        model: digest of the trained weights that they are about, empty if there are none.
        history: what was accepted, the first first.
    """

    time: Timing | None
    facts: dict[str, Count]
    model: str = ""
    history: tuple[Accepted, ...] = ()


class Thresholds(_Strict):
    """Of a repository.

    Attributes:
        fingerprint: of the machine that they were measured on.
        commit: that they were measured at.
        when: date, ISO-8601.
        pairs: of processes that each case was measured in.
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

        Raises:
            ThresholdsError: it is not there, or says where it is wrong and what is allowed.
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
        """Whether graph breaks and bytes that tensors keep are the same here."""
        return all(self.fingerprint.get(name) == fingerprint.get(name) for name in RUNTIME)

    def same_machine(self, fingerprint: Mapping[str, str]) -> bool:
        """Whether times are, and peak bytes: libraries of a processor take their own."""
        return all(self.fingerprint.get(name) == fingerprint.get(name) for name in MACHINE)
