"""What models are asked to find again: tokens and the answers wanted, drawn anew for every example.

Shapes: tokens and answers (examples, N) int64; an answer of -100 is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from danon.training import IGNORED

__all__ = [
    "Induction",
    "Lookup",
    "MultiQueryRecall",
    "NeedleInAHaystack",
    "SelectiveCopying",
    "Task",
]

GAP_POWER = 0.1
"""a of the law s^(a - 1) by which keys draw their places behind the pairs; zoology has 0.01."""


@dataclass(frozen=True)
class Task(ABC):
    """Examples of one length.

    Attributes:
        name: of the task, as in a case.
        length: tokens N.
        items: how much there is to find in an example.
        vocabulary: different tokens.
    """

    name: ClassVar[str]
    unasked: ClassVar[int] = 0
    """Items of an example that have no answer."""

    length: int
    items: int
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        least, most = self.least(), self.most()
        if not least <= self.items <= most:
            raise ValueError(
                f"{self.name}: items = {self.items}: must be from {least} to {most} for length = "
                f"{self.length} and vocabulary = {self.vocabulary}"
            )

    @property
    def answers(self) -> int:
        """Of an example."""
        return self.items - self.unasked

    def least(self) -> int:
        """Items that an example needs."""
        return 1 + self.unasked

    @abstractmethod
    def most(self) -> int:
        """Items that an example has room for."""

    @abstractmethod
    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens and answers; the same for the same seed."""

    def depths(self, ids: Tensor) -> Tensor | None:
        """Where each answer is to be found (examples, answers): 0 the first token, 1 the questions.

        None for a task whose questions do not all stand at the end, or need more than one place.
        """
        return None


class MultiQueryRecall(Task):
    """Multi-query associative recall (Arora et al. 2023, "Zoology"); items are pairs.

    First come P pairs of a key and its value, each key once; then each key is asked for once, and
    the answer at its place is its value. Every second token behind the pairs is a place: the s-th
    one is drawn, without repetition, in proportion to s^(GAP_POWER - 1). With 4 P tokens all places
    are taken. Everything else is random tokens. Half of the vocabulary are keys, the other half
    values.
    """

    name = "mqar"

    def most(self) -> int:
        return min(self.length // 4, self.vocabulary // 2 - 1)

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        N, P, half = self.length, self.items, self.vocabulary // 2
        keys = 1 + _without_repeat(torch.ones(half - 1), count, P, g)
        values = half + _without_repeat(torch.ones(half), count, P, g)
        ids = torch.randint(0, self.vocabulary, (count, N), generator=g)
        ids[:, : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
        space = torch.arange(1, (N - 2 * P) // 2 + 1, dtype=torch.float64)
        at = 2 * P + 2 * _without_repeat(space ** (GAP_POWER - 1), count, P, g)
        answers = torch.full_like(ids, IGNORED)
        return ids.scatter(1, at, keys), answers.scatter(1, at, values)


class Lookup(Task):
    """Associative recall over any distance; items are pairs of a key and its value.

    Pairs lie anywhere, each key once, and each is asked for once, later: half of them at a gap
    that may be anything, half at one whose logarithm may, since most of what is looked up was read
    recently. Everything else is other tokens. The first half of the vocabulary are keys.
    """

    name = "lookup"

    def most(self) -> int:
        return min(self.length // 4, self.vocabulary // 2 - 1)

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        N, P, half = self.length, self.items, self.vocabulary // 2
        ids = torch.randint(half, self.vocabulary, (count, N), generator=g)
        answers = torch.full_like(ids, IGNORED)
        keys = 1 + _without_repeat(torch.ones(half - 1), count, P, g)
        for example in range(count):
            pairs, asked = _placed(N // 2, P, g)
            ids[example, 2 * pairs] = ids[example, 2 * asked] = keys[example]
            values = ids[example, 2 * pairs + 1]
            answers[example, 2 * asked] = values
        return ids, answers


class NeedleInAHaystack(Task):
    """A needle in a haystack: a marker and its value, anywhere among random tokens.

    Each of the first ``items`` tokens of the vocabulary is a marker, which the haystack has once;
    all are asked for at the end. What matters can be told when it is read.
    """

    name = "needle"

    def most(self) -> int:
        return min(self.length // 4, self.vocabulary // 2)

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        N, P = self.length, self.items
        ids = torch.randint(P, self.vocabulary, (count, N), generator=g)
        at = 2 * _without_repeat(torch.ones((N - P) // 2), count, P, g)
        marks = torch.arange(P).expand(count, -1)
        ids.scatter_(1, at, marks)
        values = ids.gather(1, at + 1)
        ids[:, N - P :] = marks
        answers = torch.full_like(ids, IGNORED)
        answers[:, N - P :] = values
        return ids, answers

    def depths(self, ids: Tensor) -> Tensor:
        haystack, marks = ids[:, : -self.items], ids[:, -self.items :]
        at = (haystack[:, None] == marks[..., None]).int().argmax(2)
        return at / haystack.shape[1]


class SelectiveCopying(Task):
    """Selective copying (Gu and Dao 2023, "Mamba"): tokens among blanks, wanted again in order.

    Token 0 is the blank, token 1 asks for the next.
    """

    name = "copying"

    def most(self) -> int:
        return self.length // 2

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        N, P = self.length, self.items
        at = _without_repeat(torch.ones(N - P), count, P, g).sort(1).values
        values = torch.randint(2, self.vocabulary, (count, P), generator=g)
        ids = torch.zeros(count, N, dtype=torch.int64).scatter_(1, at, values)
        ids[:, N - P :] = 1
        answers = torch.full_like(ids, IGNORED)
        answers[:, N - P :] = values
        return ids, answers


class Induction(Task):
    """Random tokens, and then some again (Olsson et al. 2022): each is asked for its successor.

    Items are the tokens that are repeated, the last ones of the example. The first is not asked:
    it may stand elsewhere too, and nothing before it tells which is meant.
    """

    name = "induction"
    unasked = 2

    def most(self) -> int:
        return self.length // 2

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        N, P = self.length, self.items
        ids = torch.randint(0, self.vocabulary, (count, N), generator=g)
        first = torch.randint(0, N - 2 * P + 1, (count, 1), generator=g) + torch.arange(P)
        again = ids.gather(1, first)
        ids[:, N - P :] = again
        answers = torch.full_like(ids, IGNORED)
        answers[:, N - P + 1 : N - 1] = again[:, 2:]
        return ids, answers


def _placed(places: int, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places (count,) of pairs, and of the questions after them; no two are the same."""
    pairs = torch.randperm(places - count, generator=g)[:count]  # the rest is room for questions
    free = torch.ones(places, dtype=torch.bool)
    free[pairs] = False
    asked = []
    drawn = torch.rand(count, generator=g, dtype=torch.float64)
    for number, (pair, x) in enumerate(zip(pairs.tolist(), drawn.tolist(), strict=True)):
        room = places - 1 - pair
        gap = room * x if number % 2 else room**x
        later = pair + 1 + free[pair + 1 :].nonzero()[:, 0]
        asked.append(int(later[(later - pair - gap).abs().argmin()]))
        free[asked[-1]] = False
    return pairs, torch.tensor(asked)


def _without_repeat(weight: Tensor, rows: int, draws: int, g: torch.Generator) -> Tensor:
    """(rows, draws) indices, different within a row."""
    return torch.multinomial(weight.expand(rows, -1), draws, generator=g)
