"""Bits per byte of a small language model trained with each attention."""

from __future__ import annotations

from danon.bench.model_suite import ModelSuite
from danon.bench.suite import Session, register
from danon.evaluation.trained_evaluator import TrainedModelEvaluator
from danon.runs.case import Case, CaseResult
from danon.runs.suite_info import ANY_TASK, Metric

__all__ = ["Language"]


@register
class Language(ModelSuite):
    """Trains a small model on text with each attention, and evaluates it on other text."""

    name = "language"
    description = "Bits per byte of held-out text, of a small model trained from scratch."
    order = 70
    metrics = (
        Metric(
            "bits_per_byte",
            "bits per byte of held-out text",
            better="lower",
            judges=(ANY_TASK,),
            listed=False,
        ),
    )

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._evaluator = TrainedModelEvaluator.of(session)

    def measure(self, case: Case) -> CaseResult:
        """Train unless an earlier case has, and evaluate at the length of the case."""
        return self._evaluator.result(case)
