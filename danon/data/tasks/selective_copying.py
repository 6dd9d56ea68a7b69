"""Selective copying: tokens among blanks, asked for again in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.data.tasks.base import Task, no_answers, register, sample_without_repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SelectiveCopying"]


@register
class SelectiveCopying(Task):
    """Selective copying (Gu and Dao 2023, "Mamba"): tokens among blanks, asked for in order.

    Token 0 is the blank, token 1 asks for the next.
    """

    name = "copying"
    title = "selective copying (Gu and Dao 2023)"
    question = "Tokens stand among blanks: which are they, in order?"

    @property
    def chance(self) -> float:
        """Accuracy of guessing a token that is neither the blank nor the question."""
        return 1 / (self.vocabulary - 2)

    def max_items(self) -> int:
        """Return the most tokens to copy: half of the example."""
        return self.length // 2

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the tokens to copy and where they stand."""
        import torch

        g = torch.Generator().manual_seed(seed)
        N, P = self.length, self.items
        at = sample_without_repeat(torch.ones(N - P), count, P, g).sort(1).values
        values = torch.randint(2, self.vocabulary, (count, P), generator=g)
        ids = torch.zeros(count, N, dtype=torch.int64).scatter_(1, at, values)
        ids[:, N - P :] = 1
        answers = no_answers(ids)
        answers[:, N - P :] = values
        return ids, answers
