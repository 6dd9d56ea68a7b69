"""Induction: a stretch of random tokens occurs again, and each asks for its successor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.data.tasks.base import Task, no_answers, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Induction"]


@register
class Induction(Task):
    """Random tokens, and then some again (Olsson et al. 2022): each is asked for its successor.

    Items are the tokens that are repeated, the last ones of the example. The first is not asked:
    it may stand elsewhere too, and nothing before it tells which is meant.
    """

    name = "induction"
    title = "induction (Olsson et al. 2022)"
    question = "A stretch of tokens occurs again: which token comes next?"
    unasked = 2

    def max_items(self) -> int:
        """Return the most tokens to repeat: half of the example."""
        return self.length // 2

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the tokens and which of them occur again."""
        import torch

        g = torch.Generator().manual_seed(seed)
        N, P = self.length, self.items
        ids = torch.randint(0, self.vocabulary, (count, N), generator=g)
        first = torch.randint(0, N - 2 * P + 1, (count, 1), generator=g) + torch.arange(P)
        again = ids.gather(1, first)
        ids[:, N - P :] = again
        answers = no_answers(ids)
        answers[:, N - P + 1 : N - 1] = again[:, 2:]
        return ids, answers
