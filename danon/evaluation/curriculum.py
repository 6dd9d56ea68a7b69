"""The order of tasks in a training: from easy to hard, whole batches at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from danon.data.tasks.base import Task

__all__ = ["CurriculumDataset", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Batches of one kind; stages follow each other from easy to hard."""

    task: Task
    batch: int
    steps: int


class CurriculumDataset(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches as examples, since those of different stages differ in length."""

    def __init__(self, parts: list[Stage], seed: int) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        for place, part in enumerate(parts):
            drawn = part.task.examples(part.batch * part.steps, 100 * seed + place)
            self.batches += zip(*(x.split(part.batch) for x in drawn), strict=True)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index]
