"""A needle in a haystack: marked tokens among random ones, asked for at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.data.tasks.base import Task, no_answers, register, sample_without_repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NeedleInAHaystack"]


@register
class NeedleInAHaystack(Task):
    """A needle in a haystack: a marker and its value, anywhere among random tokens.

    Each of the first ``items`` tokens of the vocabulary is a marker, which the haystack has once.
    All are asked for at the end. What matters can be told when it is read.
    """

    name = "needle"
    title = "a needle in a haystack"
    question = "Markers known in advance stand among random tokens: which token followed each?"

    @property
    def chance(self) -> float:
        """Accuracy of guessing a token that is no marker."""
        return 1 / (self.vocabulary - self.items)

    def max_items(self) -> int:
        """Return the most markers: a quarter of the tokens, half of the vocabulary."""
        return min(self.length // 4, self.vocabulary // 2)

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the haystack and where the markers stand in it."""
        import torch

        g = torch.Generator().manual_seed(seed)
        N, P = self.length, self.items
        ids = torch.randint(P, self.vocabulary, (count, N), generator=g)
        at = 2 * sample_without_repeat(torch.ones((N - P) // 2), count, P, g)
        marks = torch.arange(P).expand(count, -1)
        ids.scatter_(1, at, marks)
        values = ids.gather(1, at + 1)
        ids[:, N - P :] = marks
        answers = no_answers(ids)
        answers[:, N - P :] = values
        return ids, answers

    def depths(self, ids: Tensor) -> Tensor:
        """Return where the marker of each answer stands, as a share of the haystack."""
        haystack, marks = ids[:, : -self.items], ids[:, -self.items :]
        at = (haystack[:, None] == marks[..., None]).int().argmax(2)
        return at / haystack.shape[1]
