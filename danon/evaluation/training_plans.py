"""Plans of trainings: tasks, steps, learning rates and seeds, equal for every attention."""

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
"""A query may see one in eight tokens, which is a quarter of the pairs of dense attention."""
WARMUP = 20
"""Steps of warm-up, at most a fifth of a training."""
BYTES = 256
TOKENS_PER_S = 30_000
"""Training speed of a small model; only the proportions between cases matter."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Settings that every training has.

    Attributes:
        rates: learning rates that the first seed tries; the others take its best.
        seeds: number of trainings with that rate.
        cap_s: most seconds of all trainings of an attention, by a forecast.
        width: width C of the model.
        heads: heads of an attention.
        layers: layers of the model.
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
        """Number of trainings of one attention."""
        return len(self.rates) + self.seeds - 1

    def weight(self, case: Case) -> float:
        """Return roughly the seconds of a case: the first case of an attention trains."""
        expected = min(self.runs * self.tokens / TOKENS_PER_S, self.cap_s)
        return expected if case.length == self.lengths[0] else 0.5

    def cases(self, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of an attention on a device."""
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
        """Tasks of the cases, here one."""
        return (self.task,)

    @property
    @abstractmethod
    def task(self) -> str:
        """Name of the task in a case."""

    @property
    def digest(self) -> str:
        """Digest of the settings and examples; figures compare where it is equal.

        It is of values alone, so a renamed class or field does not change it.
        """
        settings = json.dumps([self.suite, _values(replace(self, cap_s=0.0))])
        hashed = hashlib.sha256(settings.encode())
        for ids, answers, _ in self.samples():
            hashed.update(ids.numpy().tobytes() + answers.numpy().tobytes())
        return hashed.hexdigest()[:12]

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Shape of the model."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the cases, the longest last."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of one training."""

    @abstractmethod
    def samples(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield a batch of each kind, tokens and answers (B, N), and its number in a training."""

    def settings(self, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Return the fields that every :class:`~danon.training.TrainingConfig` shares."""
        warmup = min(WARMUP, steps // 5)
        return {"learning_rate": rate, "seed": seed, "weight_decay": 0.1, "warmup_steps": warmup}

    def _shape(self, vocabulary: int, length: int) -> Shape:
        return Shape(
            vocabulary, length, length // PAIR_FRACTIONS, self.width, self.heads, self.layers
        )


@dataclass(frozen=True, kw_only=True)
class RecallPlan(Plan):
    """A training on a task, and its tests.

    Attributes:
        stages: curriculum from easy to hard.
        tests: tests from easy to hard; those of one length share a case.
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
        """Return the batches of a stage: its own, and half as many of the earlier stages.

        Without those, questions that an attention cannot answer make it forget those it can.
        """
        stage, earlier = self.stages[number], self.stages[:number]
        return [stage, *(replace(s, steps=max(1, stage.steps // 2 // number)) for s in earlier)]

    def samples(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for number in range(len(self.stages)):
            for part in self.parts(number):
                yield *part.task.examples(part.batch, 0), part.steps


@dataclass(frozen=True)
class ContextStage:
    """Batches of text in contexts of one length.

    Attributes:
        context: tokens N of a context.
        batch: contexts of a batch.
        steps: number of batches.
    """

    context: int
    batch: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return self.context * self.batch * self.steps


@dataclass(frozen=True, kw_only=True)
class LanguagePlan(Plan):
    """A byte-level language model from scratch.

    Attributes:
        corpus: a name of :mod:`danon.data.corpora`.
        stages: from short contexts, which are learned in less time, to that of the evaluation.
        held_out: windows of the validation text, and as many of the test text.
        evaluations: evaluations of a stage, at equal distances.
    """

    suite: ClassVar[str] = "language"

    corpus: str
    stages: tuple[ContextStage, ...]
    held_out: int
    evaluations: int

    @property
    def task(self) -> str:
        return self.corpus

    @property
    def context(self) -> int:
        """Tokens N of an evaluated window."""
        return self.stages[-1].context

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.context,)

    @property
    def shape(self) -> Shape:
        return self._shape(BYTES, self.context)

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    def samples(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for stage in self.stages:
            text = corpus(self.corpus)[0]
            yield *sample_windows(text, stage.batch, stage.context, 0), stage.steps


def _values(x: object) -> object:
    """Return the values of a dataclass and of those in it, a task's name first."""
    if is_dataclass(x):
        names = [x.name] if isinstance(x, Task) else []
        return [*names, *(_values(getattr(x, field.name)) for field in fields(x))]
    return [_values(one) for one in x] if isinstance(x, tuple) else x
