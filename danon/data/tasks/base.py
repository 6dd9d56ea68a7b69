"""The protocol of a task, its registration, and what tasks share.

Shapes: tokens and answers (examples, N) int64; an answer of -100 is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from danon.runs import task_registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Task", "no_answers", "register", "sample_without_repeat", "task_class"]

_T = TypeVar("_T", bound="type[Task]")


@dataclass(frozen=True)
class Task(ABC):
    """Examples of one length, each a sequence of tokens with right answers at some of them.

    A subclass states ``name``, ``title`` and ``question``, and defines ``max_items`` and
    ``examples``. With ``@register`` it appears in tables and reports.

    Example:
        >>> from danon.data.tasks.base import task_class
        >>> task = task_class("mqar")(length=64, items=8, vocabulary=512)
        >>> ids, answers = task.examples(4, seed=0)
        >>> ids.shape, (answers != -100).sum(1).tolist()
        (torch.Size([4, 64]), [8, 8, 8, 8])

    Args:
        length: tokens N of an example.
        items: number of things to find in an example, such as pairs of a key and a value.
        vocabulary: number of different tokens.

    Attributes:
        name: the task in a case, such as ``mqar``.
        title: a few words for tables, with the paper.
        question: what an example asks, in a sentence.
        suite: suite whose cases have the task.
        unasked: items of an example that have no answer.

    Raises:
        ValueError: ``items`` is not between :meth:`min_items` and :meth:`max_items`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    suite: ClassVar[str] = "recall"
    unasked: ClassVar[int] = 0

    length: int
    items: int
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        """Refuse a number of items that the length or the vocabulary has no room for."""
        least, most = self.min_items(), self.max_items()
        if not least <= self.items <= most:
            raise ValueError(
                f"{self.name}: items = {self.items}: must be from {least} to {most} for length = "
                f"{self.length} and vocabulary = {self.vocabulary}"
            )

    @property
    def answers(self) -> int:
        """Number of answers in an example."""
        return self.items - self.unasked

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1 over the number of tokens that can be an answer."""
        return 1 / self.vocabulary

    def min_items(self) -> int:
        """Return the fewest items that an example can have."""
        return 1 + self.unasked

    @abstractmethod
    def max_items(self) -> int:
        """Return the most items that an example has room for."""

    @abstractmethod
    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw examples, the same for the same seed.

        Args:
            count: number of examples.
            seed: seed of the random numbers.

        Returns:
            Tokens and answers, (count, N) int64 each; -100 where nothing is asked.
        """

    def depths(self, ids: Tensor) -> Tensor | None:
        """Return where the answers are to be found.

        Args:
            ids: tokens (examples, N).

        Returns:
            (examples, answers): 0 at the first token, 1 where the questions begin. None for a task
            whose questions do not all stand at the end, or need more than one token.
        """
        return None


def register(cls: _T) -> _T:
    """Add a task to the table of tasks; a class decorator.

    Args:
        cls: a :class:`Task` with ``name``, ``title`` and ``question``.

    Returns:
        The class.

    Raises:
        ValueError: another task has the name.
    """
    record = task_registry.TaskRecord(
        suite=cls.suite, name=cls.name, title=cls.title, question=cls.question, factory=cls
    )
    task_registry.register(record)
    return cls


def task_class(name: str) -> type[Task]:
    """Return the class of a registered task.

    Args:
        name: the task in a case, such as ``mqar``.

    Raises:
        ValueError: no such task; the message lists the known ones.
    """
    classes = {
        record.name: record.factory
        for record in task_registry.records()
        if record.factory is not None and issubclass(record.factory, Task)
    }
    if name not in classes:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(sorted(classes))}")
    return classes[name]


def no_answers(ids: Tensor) -> Tensor:
    """Return answers that ask nothing, in the shape of the tokens."""
    import torch

    from danon.training import IGNORED

    return torch.full_like(ids, IGNORED)


def sample_without_repeat(
    weight: Tensor, rows: int, draws: int, generator: torch.Generator
) -> Tensor:
    """Draw indices in proportion to a weight, different within a row.

    Args:
        weight: (n,), of each index.
        rows: number of independent draws.
        draws: indices of a row.
        generator: source of the random numbers.

    Returns:
        (rows, draws) int64.
    """
    import torch

    return torch.multinomial(weight.expand(rows, -1), draws, generator=generator)
