"""Associative recall over any distance, which the suite `pretrained` asks a small model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.data.tasks.base import Task, no_answers, register, sample_without_repeat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Lookup"]


@register
class Lookup(Task):
    """Associative recall over any distance; items are pairs of a key and its value.

    Pairs lie anywhere, each key once, and each is asked for once, later. Half of them are asked at
    a gap that is uniform, half at one whose logarithm is, since most of what is looked up was read
    recently. Everything else is other tokens. The first half of the vocabulary are keys.
    """

    name = "lookup"
    title = "keys read anywhere before, by a small model that has learned to look them up"
    question = "A key that stood anywhere before stands once more: which token followed it?"
    suite = "pretrained"

    @property
    def chance(self) -> float:
        """Accuracy of guessing a token that is no key."""
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def max_items(self) -> int:
        """Return the most pairs: a quarter of the tokens, and no more than there are keys."""
        return min(self.length // 4, self.vocabulary // 2 - 1)

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the other tokens, the keys, and where each pair and its question lie."""
        import torch

        g = torch.Generator().manual_seed(seed)
        N, P, half = self.length, self.items, self.vocabulary // 2
        ids = torch.randint(half, self.vocabulary, (count, N), generator=g)
        answers = no_answers(ids)
        keys = 1 + sample_without_repeat(torch.ones(half - 1), count, P, g)
        for example in range(count):
            pairs, asked = _sample_positions(N // 2, P, g)
            ids[example, 2 * pairs] = ids[example, 2 * asked] = keys[example]
            values = ids[example, 2 * pairs + 1]
            answers[example, 2 * asked] = values
        return ids, answers


def _sample_positions(
    positions: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw positions (count,) of pairs, and of the questions after them; no two are the same."""
    import torch

    # The last positions stay free, as room for questions.
    pairs = torch.randperm(positions - count, generator=generator)[:count]
    free = torch.ones(positions, dtype=torch.bool)
    free[pairs] = False
    asked = []
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    for number, (pair, x) in enumerate(zip(pairs.tolist(), drawn.tolist(), strict=True)):
        room = positions - 1 - pair
        gap = room * x if number % 2 else room**x
        later = pair + 1 + free[pair + 1 :].nonzero()[:, 0]
        asked.append(int(later[(later - pair - gap).abs().argmin()]))
        free[asked[-1]] = False
    return pairs, torch.tensor(asked)
