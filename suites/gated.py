"""What the gate asks of a small trained model: the recall of the profile quick."""

from __future__ import annotations

from pathlib import Path

import torch

from suites.curricula import QUICK
from suites.examine import UnmeasuredError, examined
from suites.learner import learner
from suites.quality import PROBE
from suites.training import JUDGING, learn_recall, marked, questions
from suites.verify import Verifier

__all__ = ["PLAN", "recall", "train"]

(PLAN,) = QUICK[0]


def train(attention: str, place: Path) -> None:
    """Train a model with that attention and keep its weights, in half precision.

    Raises:
        UnmeasuredError: it cannot run here, is wrong, sees later tokens, or diverged.
    """
    (case,) = (case for case in PLAN.cases(attention, "cpu") if case.length == PLAN.lengths[-1])
    examined(case, PLAN.shape.config(), PLAN.shape.entries, PROBE, Verifier())
    run = learn_recall(case, PLAN, PLAN.rates[0], 0)
    if run.diverged:
        raise UnmeasuredError("failed", run.diverged)
    torch.save({name: x.half() for name, x in run.model.state_dict().items()}, place)


def recall(attention: str, place: Path) -> dict[str, float] | str:
    """Share of right answers to each test of a model with those weights, or why they do not fit.

    Returns:
        ``recall_<pairs>``, from 0 to 1.
    """
    model = learner(attention, PLAN.shape, 0).eval()
    try:
        model.load_state_dict(torch.load(place, weights_only=True))
    except RuntimeError as error:  # it names every parameter in a line of its own
        return "; ".join(line.strip() for line in str(error).splitlines()[1:3])
    return {
        f"recall_{test.items}": float(marked(model, *questions(test, JUDGING)).mean())
        for test in PLAN.tests
    }
