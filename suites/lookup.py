"""What an attention finds in 16384 tokens, put as it is into a small model that looks things up.

It has the settings of the speed suite, or those that its name says, not sizes made for the task.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.measure.case import Case, CaseResult
from suites.attentions import REFERENCE, shape_of
from suites.examine import UnmeasuredError, costs, examined
from suites.exams import LookupPlan
from suites.inputs import text_qkv
from suites.teacher import EXAMPLES, asked, errors
from suites.verify import Verifier

if TYPE_CHECKING:
    from suites.profiles import Profile

__all__ = ["Searcher"]

PROBE = 2048
"""Tokens that the correctness check of an attention takes, at most."""
SHORTER = 4
"""A pass over so many times fewer tokens tells how long one takes, at most."""


class Searcher:
    """Asks the model with each attention in its last layer."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._verifier = Verifier()

    def result(self, case: Case) -> CaseResult:
        """Put the attention into the model, and ask it."""
        plan = self._profile.plan(case)
        assert isinstance(plan, LookupPlan)
        shape = shape_of(case)
        module, check = examined(case, shape, None, PROBE, self._verifier)
        expected = EXAMPLES * _forecast(module, case)
        if expected > plan.cap_s:
            raise UnmeasuredError(
                "over budget",
                f"{EXAMPLES} passes would take {expected:.0f} s, going by a shorter one; the "
                f"profile allows {plan.cap_s:.0f} s",
            )
        start = perf_counter()
        wrong = errors(registry.get(case.attention).build, case.length, 0, case.device)
        seconds = perf_counter() - start
        metrics = {
            "accuracy": 1 - wrong, "items": float(asked(case.length)), "asked_s": seconds,
            **costs(
                case, module, lambda: registry.get(REFERENCE).build(shape).eval().to(case.device),
                self._verifier,
                seconds=self._profile.seconds, width=self._profile.width,
            ),
        }  # fmt: skip
        return CaseResult(
            case, "measured", "", module.semantics, metrics, {"candidate_s": [seconds]}, check,
            module.config.to_dict(),
        )  # fmt: skip


def _forecast(module: BaseAttention, case: Case) -> float:
    """Seconds of a pass, if time grows as dense attention's does."""
    length = max(1, case.length // SHORTER)
    inputs = [x.to(case.device) for x in text_qkv(1, case.heads, length, case.head_dim)]
    seconds = []
    for _ in range(2):  # the first one warms up
        start = perf_counter()
        with torch.no_grad():
            module(*inputs)
        if case.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return min(seconds) * SHORTER**2
