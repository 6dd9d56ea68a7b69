"""Recall of a small trained model for the gate: the training plan of the profile quick."""

from __future__ import annotations

from pathlib import Path

import torch

from danon.bench.eligibility import PROBE, check_eligible
from danon.bench.suite import UnmeasuredError
from danon.bench.verification import Verifier
from danon.evaluation.small_model import build_small_model
from danon.evaluation.small_model_training import (
    EVAL_SEED,
    eval_examples,
    learn_recall,
    require_affordable,
    score_answers,
)
from danon.evaluation.training_presets import QUICK

__all__ = ["PLAN", "recall", "train"]

(PLAN,) = QUICK[0]


def train(attention: str, path: Path) -> None:
    """Train a model with an attention and save its weights, in half precision.

    Args:
        attention: registered name.
        path: of the file to write.

    Raises:
        UnmeasuredError: The attention cannot run here, is wrong, sees later tokens, takes longer
            than the profile quick allows, or diverged.
    """
    (case,) = (case for case in PLAN.cases(attention, "cpu") if case.length == PLAN.lengths[-1])
    check_eligible(case, PLAN.shape.config(), PLAN.shape.entries, PROBE, Verifier())
    require_affordable(case, PLAN)
    run = learn_recall(case, PLAN, PLAN.rates[0], 0)
    if run.diverged:
        raise UnmeasuredError("failed", run.diverged)
    state = {
        name: x.half() if x.is_floating_point() else x for name, x in run.model.state_dict().items()
    }
    torch.save({"plan": PLAN.digest, "state": state}, path)


def recall(attention: str, path: Path) -> dict[str, float] | str:
    """Return the share of right answers of a model with saved weights, or why they do not fit.

    Args:
        attention: registered name.
        path: of the weights.

    Returns:
        For each test ``recall_<pairs>``, from 0 to 1; or a sentence.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  whatever torch makes of a damaged file
        return f"{path.name} cannot be read: {type(error).__name__}"
    if saved["plan"] != PLAN.digest:
        return f"{path.name} was trained for other questions: calibrate again"
    model = build_small_model(attention, PLAN.shape, 0).eval()
    try:
        model.load_state_dict(saved["state"])
    except RuntimeError as error:  # it names every parameter in a line of its own
        lines = [line.strip() for line in str(error).splitlines()]
        return f"{path.name} does not fit: {'; '.join(lines[1:3] or lines)}"
    return {
        f"recall_{test.items}": float(score_answers(model, *eval_examples(test, EVAL_SEED)).mean())
        for test in PLAN.tests
    }
