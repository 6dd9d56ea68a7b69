"""Bits per byte of a small language model trained with each attention."""

from __future__ import annotations

from danon.bench.suite import register
from danon.evaluation.trained_suite import TrainedSuite
from danon.runs.suite_info import ANY_TASK, Metric

__all__ = ["Language"]


@register
class Language(TrainedSuite):
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
