"""What the gate asks of a small trained model: the recall of the profile quick."""

from __future__ import annotations

from pathlib import Path

import torch

from suites.curricula import QUICK
from suites.examine import PROBE, UnmeasuredError, examined
from suites.learner import learner
from suites.training import JUDGING, affordable, learn_recall, marked, questions
from suites.verify import Verifier

__all__ = ["PLAN", "recall", "train"]

(PLAN,) = QUICK[0]


def train(attention: str, place: Path) -> None:
    """Train a model with that attention and keep its weights, in half precision.

    Raises:
        UnmeasuredError: it cannot run here, is wrong, sees later tokens, takes longer than the
            profile quick allows, or diverged.
    """
    (case,) = (case for case in PLAN.cases(attention, "cpu") if case.length == PLAN.lengths[-1])
    examined(case, PLAN.shape.config(), PLAN.shape.entries, PROBE, Verifier())
    affordable(case, PLAN)
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
        kept = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  whatever torch makes of a damaged file
        return f"{place.name} cannot be read: {type(error).__name__}"
    if kept["plan"] != PLAN.digest:
        return f"{place.name} was trained for other questions: calibrate again"
    model = learner(attention, PLAN.shape, 0).eval()
    try:
        model.load_state_dict(kept["state"])
    except RuntimeError as error:  # it names every parameter in a line of its own
        lines = [line.strip() for line in str(error).splitlines()]
        return f"{place.name} does not fit: {'; '.join(lines[1:3] or lines)}"
    return {
        f"recall_{test.items}": float(marked(model, *questions(test, JUDGING)).mean())
        for test in PLAN.tests
    }
