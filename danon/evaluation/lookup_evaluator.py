"""Accuracy of a small lookup model over 16384 tokens with another attention in it.

The attention has the settings of the speed suite, or those of its name, and no size for the task.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.registry import REFERENCE
from danon.bench.eligibility import attention_costs, check_eligible
from danon.bench.shapes import config_for, configuration
from danon.bench.suite import UnmeasuredError
from danon.bench.verification import Verifier
from danon.data.qkv import text_qkv
from danon.evaluation.lookup_model import EXAMPLES, num_queries, right_answers
from danon.evaluation.pretrained_plans import LookupPlan
from danon.measure.threads import fewer_threads_beside_load
from danon.runs.case import Case, CaseResult

if TYPE_CHECKING:
    from danon.bench.profile import Profile

__all__ = ["LookupEvaluator"]

PROBE = 2048
"""Most tokens of the correctness check of an attention."""
SHORTER = 4
"""A pass is forecast from one over this many times fewer tokens."""


class LookupEvaluator:
    """Evaluator of the lookup model with each attention in its last layer.

    Args:
        profile: plans of the questions.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._verifier = Verifier()
        self._dense: dict[tuple[int, str], Tensor | None] = {}
        self._too_long: dict[tuple[str, str], int] = {}  # by attention and device: tokens

    def result(self, case: Case) -> CaseResult:
        """Put the attention of a case into the model, and return its accuracy and costs.

        Args:
            case: of the task lookup.

        Raises:
            UnmeasuredError: the attention is not eligible or over budget.
        """
        plan = self._profile.plan(case)
        assert isinstance(plan, LookupPlan)
        shape, key = config_for(case), (case.attention, case.device)
        if (shorter := self._too_long.get(key, case.length)) < case.length:
            raise UnmeasuredError("over budget", f"{shorter} tokens are over budget already")
        module, check = check_eligible(case, shape, None, PROBE, self._verifier)
        expected = EXAMPLES * _forecast(module, case)
        if expected > plan.cap_s:
            self._too_long[key] = case.length
            raise UnmeasuredError(
                "over budget",
                f"{EXAMPLES} passes would take {expected:.0f} s, going by a shorter one; the "
                f"profile allows {plan.cap_s:.0f} s",
            )
        start = perf_counter()
        with fewer_threads_beside_load(torch.device(case.device)):
            right = right_answers(registry.get(case.attention).build, case.length, 0, case.device)
        seconds = perf_counter() - start
        if case.attention == REFERENCE:
            self._dense[case.length, case.device] = right
        metrics = {
            "accuracy": float(right.mean()),
            "items": float(num_queries(case.length)),
            "asked_s": seconds,
            **self._beside_dense(case, plan, right),
            **attention_costs(
                case,
                module,
                lambda: registry.get(REFERENCE).build(shape).eval().to(case.device),
                self._verifier,
                seconds=self._profile.seconds,
                width=self._profile.width,
            ),
        }
        return CaseResult(
            case,
            "measured",
            "",
            module.description,
            metrics,
            {"candidate_s": [seconds]},
            check,
            configuration(case.attention, module),
        )

    def _beside_dense(self, case: Case, plan: LookupPlan, right: Tensor) -> dict[str, float]:
        """Count the questions that only dense attention, or only this one, answers right.

        The questions are the same, so the difference of two accuracies is more precise than either
        accuracy. There are no counts where dense attention itself is over budget.
        """
        key = case.length, case.device
        if key not in self._dense:  # a resumed run has dense attention's row and not its answers
            dense = registry.get(REFERENCE).build(config_for(case)).eval().to(case.device)
            affordable = EXAMPLES * _forecast(dense, case) <= plan.cap_s
            build = registry.get(REFERENCE).build
            with fewer_threads_beside_load(torch.device(case.device)):
                self._dense[key] = (
                    right_answers(build, case.length, 0, case.device) if affordable else None
                )
        dense_right = self._dense[key]
        if dense_right is None:
            return {}
        return {
            "answers": float(len(right)),
            "lost_answers": float(((dense_right == 1) & (right == 0)).sum()),
            "gained_answers": float(((dense_right == 0) & (right == 1)).sum()),
        }


def _forecast(module: BaseAttention, case: Case) -> float:
    """Forecast the seconds of a pass, as if time grew with the square of the length."""
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
