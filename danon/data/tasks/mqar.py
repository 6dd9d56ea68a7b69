"""Multi-query associative recall: each key stands once more and asks for its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.data.tasks.base import Task, no_answers, register, sample_without_repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GAP_POWER", "MultiQueryRecall"]

GAP_POWER = 0.1
"""a of the law s^(a - 1) by which keys draw their positions behind the pairs; zoology has 0.01."""


@register
class MultiQueryRecall(Task):
    """Multi-query associative recall (Arora et al. 2023, "Zoology"); items are pairs.

    First come P pairs of a key and its value, each key once. Then each key is asked for once, and
    the answer at its position is its value. Every second token behind the pairs is a position: the
    s-th one is drawn, without repetition, in proportion to s^(GAP_POWER - 1). With 4 P tokens all
    positions are taken. Everything else is random tokens. Half of the vocabulary are keys, the
    other half values.
    """

    name = "mqar"
    title = "multi-query associative recall (Arora et al. 2023)"
    question = "After pairs of a key and its value, each key stands once more: what is its value?"

    @property
    def chance(self) -> float:
        """Accuracy of guessing a value."""
        return 1 / (self.vocabulary // 2)

    def max_items(self) -> int:
        """Return the most pairs: a quarter of the tokens, and no more than there are keys."""
        return min(self.length // 4, self.vocabulary // 2 - 1)

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw keys, values, the other tokens, and where each key asks."""
        import torch

        g = torch.Generator().manual_seed(seed)
        N, P, half = self.length, self.items, self.vocabulary // 2
        keys = 1 + sample_without_repeat(torch.ones(half - 1), count, P, g)
        values = half + sample_without_repeat(torch.ones(half), count, P, g)
        ids = torch.randint(0, self.vocabulary, (count, N), generator=g)
        ids[:, : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
        space = torch.arange(1, (N - 2 * P) // 2 + 1, dtype=torch.float64)
        at = 2 * P + 2 * sample_without_repeat(space ** (GAP_POWER - 1), count, P, g)
        return ids.scatter(1, at, keys), no_answers(ids).scatter(1, at, values)
