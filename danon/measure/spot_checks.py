"""Some of the timed calls, drawn at random, kept to be checked after the clock has stopped.

Which calls are kept, and which rows of their outputs, is drawn by the system's random numbers
after each call has returned: an attention cannot know.

Half of what is kept are calls that differ from the one before in later tokens alone. They come
first, and some of their rows are later tokens: an output that is remembered is wrong there, by
whatever of the inputs it is remembered.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danon.measure.correctness import WRITTEN, output_fault
from danon.measure.varied_inputs import Variation, VariedInputs

__all__ = ["KEPT_CALLS", "KEPT_ROWS", "KeptCall", "SpotChecks"]

KEPT_CALLS = 8
"""Calls of a timing that are kept, at most."""
KEPT_ROWS = 8
"""Rows of each output that are kept."""


@dataclass(frozen=True)
class KeptCall:
    """One of the timed calls.

    Attributes:
        number: of the call, from 1.
        variation: its inputs.
        rows: positions (R,).
        output: on the rows, (B, H, R, D).
        gradients: of q, k, v and the parameters; empty for a forward pass.
        fault: what was wrong before any values were compared; empty if nothing.
    """

    number: int
    variation: Variation
    rows: Tensor
    output: Tensor
    gradients: tuple[Tensor | None, ...]
    fault: str


class SpotChecks:
    """Two reservoirs of the calls so far: each is as likely to be kept as any other of its kind.

    Args:
        inputs: of the calls.
        calls: to keep, an even number.
        rows: of each output.
    """

    def __init__(
        self, inputs: VariedInputs, calls: int = KEPT_CALLS, rows: int = KEPT_ROWS
    ) -> None:
        self._inputs, self._most, self._rows = inputs, calls // 2, rows
        self._random = random.SystemRandom()
        self._calls = 0
        self._seen = {True: 0, False: 0}  # by whether only later tokens differ
        self._kept: dict[bool, list[KeptCall]] = {True: [], False: []}

    def observe(
        self, variation: Variation, output: object, gradients: tuple[Tensor | None, ...] = ()
    ) -> None:
        """Take a call that has just returned, if it is drawn."""
        self._calls += 1
        later = variation.turn < self._inputs.q.shape[2]
        self._seen[later] += 1
        kept = self._kept[later]
        place = len(kept)
        if place == self._most:
            place = self._random.randrange(self._seen[later])
        if place < self._most:
            kept[place : place + 1] = [self._keep(variation, output, gradients)]

    def first_fault(self, check: Callable[[KeptCall], str], enough: Callable[[int], bool]) -> str:
        """Check what was kept, in random order, calls with other later tokens first.

        Args:
            check: why a call was wrong; empty if it was right.
            enough: after so many right ones, whether the rest need not be checked.

        Returns:
            Which call was wrong and why, in one line; empty if none was.
        """
        drawn = [
            kept for some in self._kept.values() for kept in self._random.sample(some, len(some))
        ]
        for checked, kept in enumerate(drawn):
            if enough(checked):
                break
            if fault := kept.fault or check(kept):
                return f"timed call {kept.number} of {self._calls}: {fault}"
        return ""

    def _keep(
        self, variation: Variation, output: object, gradients: tuple[Tensor | None, ...]
    ) -> KeptCall:
        inputs = self._inputs
        length = inputs.q.shape[2]
        anywhere = self._random.sample(range(length), min(self._rows, length))
        later = range(variation.turn, length)
        drawn = self._random.sample(later, min((self._rows + 1) // 2, len(later)))
        drawn += [row for row in anywhere if row not in drawn]
        rows = torch.tensor(sorted(drawn[: len(anywhere)]), device=inputs.q.device)
        fault = output_fault(output, (inputs.q, inputs.k, inputs.v))
        if fault:
            return KeptCall(self._calls, variation, rows, inputs.q, (), fault)
        assert isinstance(output, Tensor)
        taken = output.detach()[:, :, rows].clone()  # first of all: it is to be there by now
        copies = tuple(None if x is None else x.detach().clone() for x in gradients)
        if not inputs.unchanged(variation):
            fault = WRITTEN
        return KeptCall(self._calls, variation, rows, taken, copies, fault)
