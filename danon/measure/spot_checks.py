"""Timed calls, drawn at random, that are checked after the clock has stopped.

The system's random numbers draw the calls, and the rows of their outputs, after each call has
returned: an attention cannot know.

Half of the kept calls differ from the one before in later tokens alone. They are checked first, and
some of their rows are later tokens. A remembered output is wrong there, whatever part of the inputs
it is remembered by.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danon.measure.output_checks import WRITTEN, output_fault
from danon.measure.varied_inputs import Variation, VariedInputs

__all__ = ["KEPT_CALLS", "KEPT_ROWS", "KeptCall", "SpotChecks"]

KEPT_CALLS = 8
"""Calls of a timing that are kept, at most."""
KEPT_ROWS = 8
"""Rows of each output that are kept."""


@dataclass(frozen=True)
class KeptCall:
    """A timed call whose output is checked.

    Attributes:
        number: of the call, from 1.
        variation: its inputs.
        rows: positions (R,).
        output: on the rows, (B, H, R, D).
        gradients: of q, k, v and the parameters; empty for a forward pass.
        fault: the fault found before any values were compared; empty if there is none.
    """

    number: int
    variation: Variation
    rows: Tensor
    output: Tensor
    gradients: tuple[Tensor | None, ...]
    fault: str


class SpotChecks:
    """Two reservoir samples of the calls so far: every call of a kind is as likely to be kept.

    Args:
        inputs: of the calls.
        calls: number of calls to keep, even.
        rows: of each output.
    """

    def __init__(
        self, inputs: VariedInputs, calls: int = KEPT_CALLS, rows: int = KEPT_ROWS
    ) -> None:
        """Begin with empty samples."""
        self._inputs, self._capacity, self._rows = inputs, calls // 2, rows
        self._random = random.SystemRandom()
        self._calls = 0
        self._seen = {True: 0, False: 0}  # by whether only later tokens differ
        self._kept: dict[bool, list[KeptCall]] = {True: [], False: []}

    def observe(
        self, variation: Variation, output: object, gradients: tuple[Tensor | None, ...] = ()
    ) -> None:
        """Keep a call that has just returned, if it is drawn.

        Args:
            variation: its inputs.
            output: of the call, (B, H, N, D) if it is right.
            gradients: of q, k, v and the parameters; empty for a forward pass.
        """
        self._calls += 1
        later = variation.turn < self._inputs.q.shape[2]
        self._seen[later] += 1
        kept = self._kept[later]
        index = len(kept)
        if index == self._capacity:
            index = self._random.randrange(self._seen[later])
        if index < self._capacity:
            kept[index : index + 1] = [self._keep(variation, output, gradients)]

    def first_fault(self, check: Callable[[KeptCall], str], enough: Callable[[int], bool]) -> str:
        """Check the kept calls in random order, those with other later tokens first.

        Args:
            check: returns why a call was wrong; empty if it was right.
            enough: returns whether so many right calls suffice.

        Returns:
            Which call was wrong and why, in one line; empty if none was.
        """
        drawn = [
            kept for calls in self._kept.values() for kept in self._random.sample(calls, len(calls))
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
