"""What an attention costs a model that was trained with dense attention, when it is put into it.

The model stays as it is, but for the task "adapted", which trains a copy of it on for a little.
Everyone gets the same text and questions, and about the same entries a query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from time import perf_counter
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.registry import REFERENCE
from danon.bench.cost_forecast import UNKNOWN
from danon.bench.eligibility import attention_costs, check_eligible
from danon.bench.profile import Profile
from danon.bench.shapes import configuration
from danon.bench.suite import UnmeasuredError
from danon.bench.verification import Verifier
from danon.data.corpora import CorpusError, document, rest_of_corpus
from danon.data.passkey import prompts
from danon.evaluation.attention_swap import build_per_layer, logits_of, perplexity, swap_attention
from danon.evaluation.finetuning import finetune
from danon.evaluation.pretrained_plans import PretrainedPlan
from danon.evaluation.training_plans import PAIR_FRACTIONS
from danon.runs.case import Case, CaseResult

__all__ = ["PretrainedEvaluator"]

Figures = tuple[dict[str, float], dict[str, list[list[float]]], list[float]]
"""Metrics, curves, and the seconds of each forward pass of the model."""
OTHERS = 5_000_000
"""Characters that are trained on, at most."""
PROBE = 2048
"""Tokens that the correctness check of an attention takes, at most."""


class PretrainedEvaluator:
    """Asks a model with each attention in its layers."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._verifier = Verifier()
        self._passes: dict[str, dict[int, float]] = {}  # attention, length: seconds of one
        self._texts: dict[PretrainedPlan, Tensor] = {}
        self._others: dict[PretrainedPlan, Tensor] = {}
        self._dense: dict[tuple[PretrainedPlan, int], float] = {}

    def result(self, case: Case) -> CaseResult:
        """Put the attention into the model, and judge it at the length of the case."""
        plan = self._profile.plan(case)
        assert isinstance(plan, PretrainedPlan)
        text = self._text(case, plan)
        if reason := self._too_long(case, plan):
            raise UnmeasuredError("over budget", reason)
        module, check = self._examined(case, plan, PAIR_FRACTIONS)
        ask = {"text": self._read, "passkey": self._recalled, "adapted": self._adapted}[case.task]
        metrics, curves, seconds = ask(case, plan, text)
        known = self._passes.setdefault(case.attention, {})
        known[case.length] = min(*seconds, known.get(case.length, math.inf))
        shape = plan.source.shape(case.length)
        metrics |= {"forward_s": min(seconds)}
        metrics |= attention_costs(
            case,
            module,
            lambda: registry.get(REFERENCE).build(shape).eval().to(case.device),
            self._verifier,
            seconds=self._profile.seconds,
            width=self._profile.width,
        )
        return CaseResult(
            case,
            "measured",
            "",
            module.description,
            metrics,
            {"candidate_s": seconds},
            check,
            configuration(case.attention, module, case.length // PAIR_FRACTIONS),
            curves,
        )

    def _text(self, case: Case, plan: PretrainedPlan) -> Tensor:
        """Tokens of the text.

        Raises:
            UnmeasuredError: the model or the text is not there; says what to install.
        """
        if reason := plan.source.unavailable():
            raise UnmeasuredError("unavailable", reason)
        if plan not in self._texts:
            try:
                self._texts[plan] = plan.source.encode(document(*plan.text))
            except CorpusError as error:
                raise UnmeasuredError("unavailable", str(error)) from error
        text = self._texts[plan]
        if len(text) < case.length:
            raise UnmeasuredError(
                "unavailable", f"{plan.text[1]} has {len(text)} tokens, must have {case.length}"
            )
        return text

    def _too_long(self, case: Case, plan: PretrainedPlan) -> str:
        """Why the plan cannot afford the case, by the longest one measured; empty if it can."""
        known = self._passes.get(case.attention, {})
        shorter = max((n for n in known if n < case.length), default=None)
        if shorter is None:
            return ""
        one = known[shorter] * (case.length / shorter) ** UNKNOWN
        return _over_budget(case, plan, one, f"{shorter} tokens")

    def _examined(
        self, case: Case, plan: PretrainedPlan, share: int
    ) -> tuple[BaseAttention, dict[str, Any]]:
        shape = plan.source.shape(case.length)
        return check_eligible(case, shape, case.length // share, PROBE, self._verifier)

    def _read(self, case: Case, plan: PretrainedPlan, text: Tensor) -> Figures:
        """Perplexity, with a quarter of the pairs and, where it has such a size, other shares."""
        ids, seconds = text[: case.length], []
        found: dict[int | None, float] = {}  # visible pairs: perplexity
        for share in dict.fromkeys((PAIR_FRACTIONS, *plan.shares)):
            try:
                module, _ = self._examined(case, plan, share)
            except UnmeasuredError as reason:
                if reason.status == "failed":
                    raise
                continue
            pairs = module.visible_pairs(case.length)
            if pairs in found:  # it has one size only
                continue
            with self._placed(case, plan, share) as model:
                start = perf_counter()
                found[pairs] = perplexity(model, ids)
                seconds.append(perf_counter() - start)
            if not math.isfinite(found[pairs]):
                raise UnmeasuredError("failed", f"its perplexity is {found[pairs]}")
        own = next(iter(found.values()))
        if case.attention == REFERENCE:
            self._dense[plan, case.length] = own
        elif (plan, case.length) not in self._dense:  # dense was measured before the run resumed
            self._dense[plan, case.length] = perplexity(plan.source.model.to(case.device), ids)
        metrics = {"perplexity": own, "perplexity_ratio": own / self._dense[plan, case.length]}
        every = case.length * (case.length + 1) / 2
        curve = sorted([pairs / every, value] for pairs, value in found.items() if pairs)
        return metrics, {"perplexity_by_share": curve}, seconds

    def _recalled(self, case: Case, plan: PretrainedPlan, text: Tensor) -> Figures:
        """Share of the hidden numbers that the model would write, digit by digit."""
        seconds, digits = [], []
        whole: dict[float, list[float]] = {depth: [] for depth in plan.depths}
        asked = prompts(plan.source.encode, text, case.length, plan.depths, plan.examples)
        with self._placed(case, plan, PAIR_FRACTIONS) as model:
            for prompt in asked:
                last = len(prompt.ids) - min(answer.start for answer in prompt.answers)
                start = perf_counter()
                said = logits_of(model, prompt.ids, last).argmax(-1).cpu()
                seconds.append(perf_counter() - start)
                right = F.pad(said == prompt.ids[-last:], (len(prompt.ids) - last, 0))
                for answer in prompt.answers:
                    found = right[answer.start : answer.stop]
                    digits.append(float(found.float().mean()))
                    whole[answer.depth].append(float(found.all()))
        curve = [[depth, fmean(found)] for depth, found in whole.items()]
        metrics = {"accuracy": fmean(y for _, y in curve), "accuracy_digits": fmean(digits)}
        return metrics, {"accuracy_by_depth": curve}, seconds

    def _adapted(self, case: Case, plan: PretrainedPlan, text: Tensor) -> Figures:
        """Perplexity before and after a short training on other texts of the corpus."""
        assert plan.adaptation is not None
        if plan not in self._others:
            self._others[plan] = plan.source.encode(rest_of_corpus(*plan.text, limit=OTHERS))
        ids, learned = text[: case.length], self._others[plan]
        if len(learned) <= case.length:
            reason = f"the rest of {plan.text[0]} has {len(learned)} tokens, must have more"
            raise UnmeasuredError("unavailable", reason)
        with self._placed(case, plan, PAIR_FRACTIONS) as model:
            start = perf_counter()
            before = perplexity(model, ids)
            seconds = [perf_counter() - start]
        if reason := _over_budget(case, plan, seconds[0], "one pass"):
            raise UnmeasuredError("over budget", reason)
        trained = finetune(
            plan.source.model.to(case.device),
            self._seated(case, plan, PAIR_FRACTIONS),
            learned,
            case.length,
            plan.adaptation,
        )
        with trained as (model, train_s):
            start = perf_counter()
            after = perplexity(model, ids)
            seconds.append(perf_counter() - start)
        if not math.isfinite(after):
            raise UnmeasuredError("failed", f"its perplexity is {after}")
        metrics = {"perplexity": after, "perplexity_before": before, "train_s": train_s}
        return metrics, {}, seconds

    def _seated(self, case: Case, plan: PretrainedPlan, share: int) -> list[BaseAttention]:
        return build_per_layer(case.attention, plan.source, case.length, case.length // share)

    @contextmanager
    def _placed(self, case: Case, plan: PretrainedPlan, share: int) -> Iterator[Any]:
        """The model with the attention of a case in it, in a size."""
        attentions = self._seated(case, plan, share)
        with swap_attention(plan.source.model.to(case.device), attentions) as model:
            yield model


def _over_budget(case: Case, plan: PretrainedPlan, one: float, by: str) -> str:
    """Why the plan cannot afford a case of which one pass takes so many seconds, or nothing."""
    seconds = one * plan.passes(case.task)
    if seconds <= plan.cap_s:
        return ""
    return f"estimated {seconds:.0f} s, going by {by}; the profile allows {plan.cap_s:.0f} s a case"
