"""Loss of a model that was trained with dense attention when an attention replaces it."""

from __future__ import annotations

from danon.bench.model_suite import ModelSuite
from danon.bench.suite import SuiteContext, register
from danon.evaluation.lookup_evaluator import LookupEvaluator
from danon.evaluation.pretrained_evaluator import PretrainedEvaluator
from danon.runs.case import Case, CaseResult
from danon.runs.suite_info import Metric

__all__ = ["Pretrained"]


@register
class Pretrained(ModelSuite):
    """Evaluates a pretrained model with each attention in its layers."""

    name = "pretrained"
    description = "Perplexity and answers of a pretrained model with each attention put into it."
    order = 80
    metrics = (
        Metric(
            "perplexity",
            "perplexity of held-out text",
            better="lower",
            judges=("text", "adapted"),
            listed=False,
        ),
        Metric(
            "accuracy",
            "fraction of right answers",
            better="higher",
            judges=("passkey", "lookup"),
            listed=False,
        ),
    )

    def __init__(self, context: SuiteContext) -> None:
        super().__init__(context)
        self._lookup = LookupEvaluator(context.profile)
        self._pretrained = PretrainedEvaluator(context.profile)

    def measure(self, case: Case) -> CaseResult:
        """Put the attention into the model, and evaluate it."""
        return (self._lookup if case.task == "lookup" else self._pretrained).result(case)
