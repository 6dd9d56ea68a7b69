"""The curriculum of a training: whole batches of tasks, from easy to hard."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from danon.data.tasks.base import Task

__all__ = ["CurriculumDataset", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Batches of one task.

    Attributes:
        task: the task.
        batch: examples of a batch.
        steps: number of batches.
    """

    task: Task
    batch: int
    steps: int


class CurriculumDataset(Dataset[tuple[Tensor, Tensor]]):
    """Dataset of whole batches, since examples of different stages differ in length.

    Args:
        parts: stages that are trained on.
        seed: seed of the examples.
    """

    def __init__(self, parts: list[Stage], seed: int) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        for number, part in enumerate(parts):
            drawn = part.task.examples(part.batch * part.steps, 100 * seed + number)
            self.batches += zip(*(x.split(part.batch) for x in drawn), strict=True)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the tokens and answers (batch, N) of a batch."""
        return self.batches[index]
