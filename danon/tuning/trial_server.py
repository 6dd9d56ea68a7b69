"""Serve requests to measure trials, in a process of its own.

It speaks JSON, a line each way, over the descriptor it is given.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from danon.attention.discovery import discover
from danon.bench.contract import check_contract
from danon.console.reasons import one_line
from danon.measure.fingerprint import fingerprint
from danon.measure.memory_limit import limit_memory
from danon.processes.json_messages import write_message
from danon.tuning import target
from danon.tuning.subject import Description
from danon.tuning.target import TuningTarget

__all__ = ["TrialServer"]


class TrialServer:
    """The measuring process; each of its methods answers a request."""

    _target: TuningTarget
    _description: Description
    _steps: Iterator[dict[str, float]]

    def open(
        self, kind: str, attention: str, device: str, length: int | None, dtype: str | None
    ) -> None:
        """Prepare to measure.

        Args:
            kind: name of the kind of study.
            attention: registered name, or ``file.py:Class``.
            device: ``cpu`` or ``cuda``.
            length: tokens; None for the default of the kind.
            dtype: type of the numbers; None for the default of the kind.

        Raises:
            ValueError: there is nothing to tune, or it cannot run here; says why.
        """
        cls = target.get(kind)
        length = cls.default_length if length is None else length
        dtype = cls.default_dtype if dtype is None else dtype
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda': torch finds no CUDA device here; use --device cpu")
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
            limit_memory()
        user_names = discover([attention], [])[1]
        for name in user_names:
            check_contract(name, [dtype], device)
        self._target = cls(user_names[0] if user_names else attention, length, dtype, device)
        space = self._target.space
        self._description = Description(
            length=length,
            dtype=dtype,
            space=space.to_json(),
            default=dict(space.default),
            starts=tuple(dict(choice) for choice in self._target.starts),
            objectives=cls.objectives,
            kind=cls.description,
            machine=fingerprint(torch.device(device)),
        )

    def describe(self) -> dict[str, Any]:
        """Return the fields of a :class:`Description`."""
        return asdict(self._description)

    def settings(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that a choice stands for."""
        self._target.space.check(choice)
        return self._target.settings(choice)

    def begin(self, choice: dict[str, Any], seed: int) -> None:
        """Begin a trial, and drop what is left of the one before."""
        self._target.space.check(choice)
        self._steps = self._target.steps(choice, seed)

    def advance(self) -> dict[str, float] | None:
        """Measure more figures of the trial; None when there are no more."""
        return next(self._steps, None)


def main() -> None:
    """Serve until the other end closes."""
    trials = TrialServer()
    with socket.socket(fileno=int(sys.argv[1])).makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                answer = {"value": getattr(trials, request.pop("do"))(**request)}
            except ValueError as error:  # in words for a user
                answer = {"error": str(error)}
            except Exception as error:  # noqa: BLE001  the other end says it
                traceback.print_exc()
                answer = {"error": one_line(error)}
            write_message(lines, answer)


if __name__ == "__main__":
    main()
