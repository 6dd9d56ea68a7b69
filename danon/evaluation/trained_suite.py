"""A suite whose cases train a small model with each attention, and evaluate it."""

from __future__ import annotations

from danon.bench.model_suite import ModelSuite
from danon.bench.suite import SuiteContext
from danon.evaluation.trained_evaluator import TrainedModelEvaluator
from danon.runs.case import Case, CaseResult

__all__ = ["TrainedSuite"]


class TrainedSuite(ModelSuite):
    """A suite whose plans are trainings of the small model."""

    def __init__(self, context: SuiteContext) -> None:
        super().__init__(context)
        self._evaluator = TrainedModelEvaluator.of(context)

    def measure(self, case: Case) -> CaseResult:
        """Train unless an earlier case has, and evaluate at the length of the case."""
        return self._evaluator.result(case)
