"""Nested lists of digits to evaluate (Nangia and Bowman 2018): the structure has to be understood.

Shapes: tokens and answers (examples, N) int64; an answer of -100 is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import TYPE_CHECKING

from danon.data.tasks.base import Task, no_answers, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLOSE", "DIGIT", "OPERATORS", "ListOps"]

DIGIT = 1
"""Token of the digit 0, nine follow; token 0 pads."""
OPERATORS: dict[int, Callable[[Sequence[int]], int]] = {
    11: max,
    12: min,
    13: lambda x: int(median(x)),
    14: lambda x: sum(x) % 10,
}
"""Tokens that open a list: MAX, MIN, MED (rounded down) and SM, the sum modulo 10."""
CLOSE = 15
"""Token that closes a list."""
MAX_ARGUMENTS = 10
"""Most arguments of a list; the fewest are two."""
NESTED_SHARE = 0.25
"""Share of the arguments that are lists, as long as the depth allows."""


class TooLongError(Exception):
    """A list has no room left."""


@register
@dataclass(frozen=True)
class ListOps(Task):
    """Lists of an operator and its arguments, digits or lists; items are the depth they may have.

    Sizes as in the Long Range Arena (Tay et al. 2020): two to ten arguments, and at least a quarter
    of the length. Padding comes first. The answer, a digit, is asked at the last token, which
    closes the whole list.
    """

    name = "listops"
    title = "nested lists to evaluate (Nangia and Bowman 2018)"
    question = "Nested lists of digits with operators: which digit is their value?"
    vocabulary: int = field(default=16, init=False)

    def min_items(self) -> int:
        """Return the least depth of which a list can fill the length."""
        depth, room = 0, 1
        while room < self.length:  # of lists with nothing but lists in them
            depth, room = depth + 1, 2 + MAX_ARGUMENTS * room
        return depth

    def max_items(self) -> int:
        """Return the depth of a list whose every list has one other argument."""
        return (self.length - 1) // 3

    @property
    def answers(self) -> int:
        """Number of answers in an example, whatever its depth."""
        return 1

    @property
    def chance(self) -> float:
        """Accuracy of guessing a digit."""
        return 0.1

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw lists, padded at the front."""
        import torch

        draw = Random(seed)
        ids = torch.zeros(count, self.length, dtype=torch.int64)
        answers = no_answers(ids)
        for row in range(count):
            tokens, value = self._example(draw)
            ids[row, -len(tokens) :] = torch.tensor(tokens)
            answers[row, -1] = DIGIT + value
        return ids, answers

    def _example(self, draw: Random) -> tuple[list[int], int]:
        """Draw the tokens of a list neither too short nor too long, and its value."""
        while True:
            tokens: list[int] = []
            try:
                value = self._grow(tokens, self.items, draw)
            except TooLongError:
                continue
            if len(tokens) >= self.length / 4:
                return tokens, value

    def _grow(self, tokens: list[int], depth: int, draw: Random) -> int:
        """Append a list of at most that depth and return its value."""
        operator = draw.choice(list(OPERATORS))
        tokens.append(operator)
        values = []
        for _ in range(draw.randint(2, MAX_ARGUMENTS)):
            if depth > 1 and draw.random() < NESTED_SHARE:
                values.append(self._grow(tokens, depth - 1, draw))
            else:
                values.append(draw.randrange(10))
                tokens.append(DIGIT + values[-1])
        tokens.append(CLOSE)
        if len(tokens) > self.length:
            raise TooLongError
        return OPERATORS[operator](values)
