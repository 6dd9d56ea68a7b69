"""Accuracy of recalling what the context says once, by a model trained for it."""

from __future__ import annotations

from danon.bench.model_suite import ModelSuite
from danon.bench.suite import Session, register
from danon.evaluation.trained_evaluator import TrainedModelEvaluator
from danon.runs.case import Case, CaseResult
from danon.runs.suite_info import ANY_TASK, Metric

__all__ = ["Recall"]


@register
class Recall(ModelSuite):
    """Trains a small model with each attention, and asks it questions."""

    name = "recall"
    description = "Right answers of a small model trained on a synthetic task."
    order = 60
    metrics = (
        Metric(
            "accuracy",
            "fraction of right answers",
            better="higher",
            judges=(ANY_TASK,),
            listed=False,
        ),
    )

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._evaluator = TrainedModelEvaluator.of(session)

    def measure(self, case: Case) -> CaseResult:
        """Train unless an earlier case has, and ask at the length of the case."""
        return self._evaluator.result(case)
