"""Times of a stage's layers, taken from the passes that it makes anyway.

timer = LayerTimer(stage, device)                   # with layers 3 and 4 of the model
...                                                 # forward passes
timer.times()                                       # {3: 0.0021, 4: 0.0020, "behind": 0.0007}
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from danon.distributed.stages import BackboneStage

__all__ = ["LayerTimer"]

LIMIT = 1000
"""Passes that are kept, at most."""


class LayerTimer:
    """Times of forward passes by layer; a backward pass is taken to be in proportion.

    Args:
        stage: whose layers are timed; passes without training do not count.
        device: where it computes. On an accelerator events measure, which wait for nothing.
    """

    def __init__(self, stage: BackboneStage, device: torch.device) -> None:
        self._stage, self._device = stage, device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}
        self._begun: dict[str, Any] = {}
        self._hooks = [
            hook
            for name, module in (*stage.layers.items(), ("all", stage))
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._begin(name)),
                module.register_forward_hook(lambda *_, name=name: self._end(name)),
            )
        ]

    def times(self) -> dict[int | str, float]:
        """Return the median seconds of each layer by its number, and forget the passes.

        The rest of the stage is ``before`` the first layer or ``behind`` the last one.
        """
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        medians = {
            name: statistics.median(self._seconds(*pair) for pair in marks)
            for name, marks in self._marks.items()
        }
        self._marks.clear()
        rest = medians.pop("all", 0.0) - sum(medians.values())
        found: dict[int | str, float] = {int(name): seconds for name, seconds in medians.items()}
        if self._stage.enters or self._stage.leaves:
            found["before" if self._stage.enters else "behind"] = max(0.0, rest)
        return found

    def remove(self) -> None:
        """Time no more passes."""
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if self._device.type == "cpu":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000

    def _begin(self, name: str) -> None:
        self._begun[name] = self._now()

    def _end(self, name: str) -> None:
        marks = self._marks.setdefault(name, [])
        if self._stage.training and len(marks) < LIMIT:
            marks.append((self._begun.pop(name), self._now()))
