"""How much is trained: tasks, steps, learning rates and seeds, the same for every attention."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from danon.data.corpora import corpus, sample_windows
from danon.data.tasks.base import Task
from danon.evaluation.curriculum import Stage
from danon.evaluation.small_model import Shape
from danon.runs.case import Case

__all__ = ["PAIR_FRACTIONS", "ContextStage", "LanguagePlan", "Plan", "RecallPlan"]

PAIR_FRACTIONS = 8
"""A query may see one in so many of the tokens: a quarter of the pairs of dense attention."""
WARMUP = 20
"""Steps of it, at most a fifth of a training."""
BYTES = 256
TOKENS_PER_S = 30_000
"""Of a small model on two cores; only the proportions between cases matter."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What every training states.

    Attributes:
        rates: learning rates that the first seed tries; the others take its best.
        seeds: trainings with that rate.
        cap_s: an attention whose trainings should take longer is over budget.
        width: of the model; so are ``heads`` and ``layers``.
    """

    suite: ClassVar[str]
    timed_settings: ClassVar[bool] = False

    rates: tuple[float, ...]
    seeds: int
    cap_s: float
    width: int = 64
    heads: int = 1
    layers: int = 2

    @property
    def runs(self) -> int:
        """Trainings of one attention."""
        return len(self.rates) + self.seeds - 1

    def weight(self, case: Case) -> float:
        """Seconds expected of a case, roughly: the first one of an attention trains."""
        expected = min(self.runs * self.tokens / TOKENS_PER_S, self.cap_s)
        return expected if case.length == self.lengths[0] else 0.5

    def cases(self, attention: str, device: str) -> Iterator[Case]:
        """Of one attention."""
        shape = self.shape
        for length in self.lengths:
            yield Case(
                self.suite,
                attention,
                length,
                "float32",
                "training",
                device,
                heads=shape.heads,
                head_dim=shape.width // shape.heads,
                task=self.task,
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """As a plan that has several."""
        return (self.task,)

    @property
    @abstractmethod
    def task(self) -> str:
        """As in a case."""

    @property
    def digest(self) -> str:
        """Equal where figures compare: the same settings, and the same examples of each kind.

        Of values alone: what classes and fields are called does not change it.
        """
        settings = json.dumps([self.suite, _values(replace(self, cap_s=0.0))])
        hashed = hashlib.sha256(settings.encode())
        for ids, answers, _ in self.samples():
            hashed.update(ids.numpy().tobytes() + answers.numpy().tobytes())
        return hashed.hexdigest()[:12]

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of the model."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Of the cases, the longest last."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Of one training."""

    @abstractmethod
    def samples(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """A batch of each kind, tokens and answers (B, N), and how many there are in a training."""

    def settings(self, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """What every :class:`~danon.training.TrainingConfig` shares."""
        warmup = min(WARMUP, steps // 5)
        return {"learning_rate": rate, "seed": seed, "weight_decay": 0.1, "warmup_steps": warmup}

    def _shape(self, vocabulary: int, length: int) -> Shape:
        return Shape(
            vocabulary, length, length // PAIR_FRACTIONS, self.width, self.heads, self.layers
        )


@dataclass(frozen=True, kw_only=True)
class RecallPlan(Plan):
    """One training on a task, and what is asked afterwards.

    Attributes:
        tests: from easy to hard; the ones of a length share a case.
    """

    suite: ClassVar[str] = "recall"

    stages: tuple[Stage, ...]
    tests: tuple[Task, ...]

    @property
    def task(self) -> str:
        return self.tests[-1].name

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({test.length for test in self.tests}))

    @property
    def shape(self) -> Shape:
        return self._shape(self.tests[-1].vocabulary, max(self.lengths))

    @property
    def tokens(self) -> int:
        parts = (part for number in range(len(self.stages)) for part in self.parts(number))
        return sum(part.batch * part.steps * part.task.length for part in parts)

    def parts(self, number: int) -> list[Stage]:
        """What a stage trains: its own batches, and half as many of the stages before.

        Without those, questions that an attention cannot answer make it forget those it can.
        """
        own, before = self.stages[number], self.stages[:number]
        return [own, *(replace(s, steps=max(1, own.steps // 2 // number)) for s in before)]

    def samples(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for number in range(len(self.stages)):
            for part in self.parts(number):
                yield *part.task.examples(part.batch, 0), part.steps


@dataclass(frozen=True)
class ContextStage:
    """Batches of text in contexts of so many tokens."""

    context: int
    batch: int
    steps: int

    @property
    def tokens(self) -> int:
        """Of it all."""
        return self.context * self.batch * self.steps


@dataclass(frozen=True, kw_only=True)
class LanguagePlan(Plan):
    """A byte-level language model from scratch.

    Attributes:
        corpus: a name of :mod:`danon.data.corpora`.
        readings: from short contexts, which are learned in less time, to the one that is judged.
        held_out: examples to choose by, and as many of other text to judge on; never learned from.
        judged: evaluations of a reading, evenly.
    """

    suite: ClassVar[str] = "language"

    corpus: str
    readings: tuple[ContextStage, ...]
    held_out: int
    judged: int

    @property
    def task(self) -> str:
        return self.corpus

    @property
    def context(self) -> int:
        """Tokens N of what is judged."""
        return self.readings[-1].context

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.context,)

    @property
    def shape(self) -> Shape:
        return self._shape(BYTES, self.context)

    @property
    def tokens(self) -> int:
        return sum(reading.tokens for reading in self.readings)

    def samples(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for reading in self.readings:
            text = corpus(self.corpus)[0]
            yield *sample_windows(text, reading.batch, reading.context, 0), reading.steps


def _values(x: object) -> object:
    """The values of a dataclass and of those in it, a task's name first."""
    if is_dataclass(x):
        named = [x.name] if isinstance(x, Task) else []
        return [*named, *(_values(getattr(x, field.name)) for field in fields(x))]
    return [_values(one) for one in x] if isinstance(x, tuple) else x
