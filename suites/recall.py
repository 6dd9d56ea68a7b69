"""Accuracy of recalling what the context says once, by a model trained for it."""

from __future__ import annotations

from danon.bench.suite import register
from danon.evaluation.trained_suite import TrainedSuite
from danon.runs.suite_info import ANY_TASK, Metric

__all__ = ["Recall"]


@register
class Recall(TrainedSuite):
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
