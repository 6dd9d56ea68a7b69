"""Who measures what an attention is worth in a model, by task or suite."""

from __future__ import annotations

from danon.bench.profile import Profile
from danon.bench.runner import ModelEvaluator
from danon.evaluation.lookup_evaluator import LookupEvaluator
from danon.evaluation.model_saver import ModelSaver
from danon.evaluation.pretrained_evaluator import PretrainedEvaluator
from danon.evaluation.trained_evaluator import TrainedModelEvaluator

__all__ = ["evaluators"]


def evaluators(profile: Profile, saver: ModelSaver | None = None) -> dict[str, ModelEvaluator]:
    """Return the evaluators of a profile.

    Args:
        profile: says how much is asked.
        saver: takes the models that are trained; None: they are not kept.

    Returns:
        Evaluators by the name of a task, or of a suite for all its other tasks.
    """
    trained = TrainedModelEvaluator(profile, saver)
    return {
        "recall": trained,
        "language": trained,
        "pretrained": PretrainedEvaluator(profile),
        "lookup": LookupEvaluator(profile),
    }
