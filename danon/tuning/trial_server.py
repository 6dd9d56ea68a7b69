"""The process that measures the trials of a study, one after the other.

It speaks JSON, a line each way, over the descriptor it is given.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from danon.attention.discovery import discover
from danon.bench.contract import check_contract
from danon.console.reasons import one_line
from danon.measure.fingerprint import fingerprint
from danon.measure.memory_limit import limit_memory
from danon.processes.json_messages import write_message
from danon.tuning.targets.architecture import ArchitectureTarget
from danon.tuning.targets.hyperparameters import HyperparameterTarget, TuningTarget
from danon.tuning.targets.quantization import QuantizationTarget
from danon.tuning.targets.schedule import ScheduleTarget

__all__ = ["TrialServer"]

KINDS: dict[str, Callable[[str, int, str, str], TuningTarget]] = {
    "hyperparameters": HyperparameterTarget,
    "architecture": ArchitectureTarget,
    "quantization": QuantizationTarget,
    "schedule": ScheduleTarget,
}


class TrialServer:
    """Answers requests, which are its methods."""

    _tuned: TuningTarget
    _steps: Iterator[dict[str, float]]

    def open(self, kind: str, attention: str, length: int, dtype: str, device: str) -> None:
        """Prepare to measure.

        Raises:
            ValueError: there is nothing to tune, or it cannot run here; says why.
        """
        if kind not in KINDS:
            raise ValueError(f"--kind {kind!r}: must be one of {', '.join(KINDS)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda': torch finds no CUDA device here; use --device cpu")
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
            limit_memory()
        own = discover([attention], [])[1]
        for name in own:
            check_contract(name, [dtype], device)
        self._device = torch.device(device)
        self._tuned = KINDS[kind](own[0] if own else attention, length, dtype, device)

    def describe(self) -> dict[str, Any]:
        space = self._tuned.space
        return {
            "space": space.to_json(),
            "default": dict(space.default),
            "starts": [dict(choice) for choice in self._tuned.starts],
            "known": list(self._tuned.objectives),
            "machine": fingerprint(self._device),
        }

    def settings(self, choice: dict[str, Any]) -> dict[str, Any]:
        """What a choice stands for."""
        self._tuned.space.check(choice)
        return self._tuned.settings(choice)

    def begin(self, choice: dict[str, Any], seed: int) -> None:
        """A trial; what is left of the one before is not measured."""
        self._tuned.space.check(choice)
        self._steps = self._tuned.steps(choice, seed)

    def advance(self) -> dict[str, float] | None:
        """More figures of the trial, None when there are no more."""
        return next(self._steps, None)


def main() -> None:
    """Serve until the other end is closed."""
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
