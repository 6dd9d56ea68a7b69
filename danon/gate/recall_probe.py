"""What the gate asks of a small trained model: the recall of the profile quick."""

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


def train(attention: str, place: Path) -> None:
    """Train a model with that attention and keep its weights, in half precision.

    Raises:
        UnmeasuredError: it cannot run here, is wrong, sees later tokens, takes longer than the
            profile quick allows, or diverged.
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
    torch.save({"plan": PLAN.digest, "state": state}, place)


def recall(attention: str, place: Path) -> dict[str, float] | str:
    """Share of right answers to each test of a model with those weights, or why they are no use.

    Returns:
        ``recall_<pairs>``, from 0 to 1.
    """
    try:
        saved = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  whatever torch makes of a damaged file
        return f"{place.name} cannot be read: {type(error).__name__}"
    if saved["plan"] != PLAN.digest:
        return f"{place.name} was trained for other questions: calibrate again"
    model = build_small_model(attention, PLAN.shape, 0).eval()
    try:
        model.load_state_dict(saved["state"])
    except RuntimeError as error:  # it names every parameter in a line of its own
        lines = [line.strip() for line in str(error).splitlines()]
        return f"{place.name} does not fit: {'; '.join(lines[1:3] or lines)}"
    return {
        f"recall_{test.items}": float(score_answers(model, *eval_examples(test, EVAL_SEED)).mean())
        for test in PLAN.tests
    }
