"""Quality of a model trained with dense attention when another attention replaces it.

The model stays as it is, except for the task "adapted", which trains a copy of it shortly. All
attentions get the same text and questions, and about the same entries a query.
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
TRAINING_CHARACTERS = 5_000_000
"""Most characters of the training text."""
PROBE = 2048
"""Most tokens of the correctness check of an attention."""


class PretrainedEvaluator:
    """Evaluator of a pretrained model with each attention in its layers.

    Args:
        profile: plans of the texts and the questions.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._verifier = Verifier()
        self._passes: dict[str, dict[int, float]] = {}  # attention -> length -> seconds of a pass
        self._texts: dict[PretrainedPlan, Tensor] = {}
        self._training_texts: dict[PretrainedPlan, Tensor] = {}
        self._dense: dict[tuple[PretrainedPlan, int], float] = {}

    def result(self, case: Case) -> CaseResult:
        """Put the attention of a case into the model, and measure its quality and costs.

        Args:
            case: of the suite pretrained.

        Raises:
            UnmeasuredError: the model, the text or the attention is not eligible, or over budget.
        """
        plan = self._profile.plan(case)
        assert isinstance(plan, PretrainedPlan)
        text = self._text(case, plan)
        if reason := self._too_long(case, plan):
            raise UnmeasuredError("over budget", reason)
        module, check = self._check_eligible(case, plan, PAIR_FRACTIONS)
        evaluate = {
            "text": self._perplexity,
            "passkey": self._recall,
            "adapted": self._adapted_perplexity,
        }[case.task]
        metrics, curves, seconds = evaluate(case, plan, text)
        passes = self._passes.setdefault(case.attention, {})
        passes[case.length] = min(*seconds, passes.get(case.length, math.inf))
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
        """Return the tokens of the text (n,).

        Raises:
            UnmeasuredError: the model or the text is missing; says what to install.
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
        """Return the reason if a case exceeds the budget, by a shorter one; else an empty text."""
        passes = self._passes.get(case.attention, {})
        shorter = max((n for n in passes if n < case.length), default=None)
        if shorter is None:
            return ""
        seconds = passes[shorter] * (case.length / shorter) ** UNKNOWN
        return _over_budget(case, plan, seconds, f"{shorter} tokens")

    def _check_eligible(
        self, case: Case, plan: PretrainedPlan, share: int
    ) -> tuple[BaseAttention, dict[str, Any]]:
        shape = plan.source.shape(case.length)
        return check_eligible(case, shape, case.length // share, PROBE, self._verifier)

    def _perplexity(self, case: Case, plan: PretrainedPlan, text: Tensor) -> Figures:
        """Measure the perplexity with a quarter of the pairs, and with the plan's other shares."""
        ids, seconds = text[: case.length], []
        by_pairs: dict[int | None, float] = {}  # visible pairs -> perplexity
        for share in dict.fromkeys((PAIR_FRACTIONS, *plan.shares)):
            try:
                module, _ = self._check_eligible(case, plan, share)
            except UnmeasuredError as reason:
                if reason.status == "failed":
                    raise
                continue
            pairs = module.visible_pairs(case.length)
            if pairs in by_pairs:  # it has one size only
                continue
            with self._with_attentions(case, plan, share) as model:
                start = perf_counter()
                by_pairs[pairs] = perplexity(model, ids)
                seconds.append(perf_counter() - start)
            if not math.isfinite(by_pairs[pairs]):
                raise UnmeasuredError("failed", f"its perplexity is {by_pairs[pairs]}")
        headline = next(iter(by_pairs.values()))
        if case.attention == REFERENCE:
            self._dense[plan, case.length] = headline
        elif (plan, case.length) not in self._dense:  # dense was measured before the run resumed
            self._dense[plan, case.length] = perplexity(plan.source.model.to(case.device), ids)
        ratio = headline / self._dense[plan, case.length]
        metrics = {"perplexity": headline, "perplexity_ratio": ratio}
        all_pairs = case.length * (case.length + 1) / 2
        curve = sorted([pairs / all_pairs, value] for pairs, value in by_pairs.items() if pairs)
        return metrics, {"perplexity_by_share": curve}, seconds

    def _recall(self, case: Case, plan: PretrainedPlan, text: Tensor) -> Figures:
        """Measure the share of the hidden numbers that the model predicts, digit by digit."""
        seconds, digits = [], []
        whole: dict[float, list[float]] = {depth: [] for depth in plan.depths}
        asked = prompts(plan.source.encode, text, case.length, plan.depths, plan.examples)
        with self._with_attentions(case, plan, PAIR_FRACTIONS) as model:
            for prompt in asked:
                last = len(prompt.ids) - min(answer.start for answer in prompt.answers)
                start = perf_counter()
                predicted = logits_of(model, prompt.ids, last).argmax(-1).cpu()
                seconds.append(perf_counter() - start)
                right = F.pad(predicted == prompt.ids[-last:], (len(prompt.ids) - last, 0))
                for answer in prompt.answers:
                    right_digits = right[answer.start : answer.stop]
                    digits.append(float(right_digits.float().mean()))
                    whole[answer.depth].append(float(right_digits.all()))
        curve = [[depth, fmean(numbers)] for depth, numbers in whole.items()]
        metrics = {"accuracy": fmean(y for _, y in curve), "accuracy_digits": fmean(digits)}
        return metrics, {"accuracy_by_depth": curve}, seconds

    def _adapted_perplexity(self, case: Case, plan: PretrainedPlan, text: Tensor) -> Figures:
        """Measure the perplexity before and after a short training on the rest of the corpus."""
        assert plan.adaptation is not None
        if plan not in self._training_texts:
            self._training_texts[plan] = plan.source.encode(
                rest_of_corpus(*plan.text, limit=TRAINING_CHARACTERS)
            )
        ids, learned = text[: case.length], self._training_texts[plan]
        if len(learned) <= case.length:
            reason = f"the rest of {plan.text[0]} has {len(learned)} tokens, must have more"
            raise UnmeasuredError("unavailable", reason)
        with self._with_attentions(case, plan, PAIR_FRACTIONS) as model:
            start = perf_counter()
            before = perplexity(model, ids)
            seconds = [perf_counter() - start]
        if reason := _over_budget(case, plan, seconds[0], "one pass"):
            raise UnmeasuredError("over budget", reason)
        trained = finetune(
            plan.source.model.to(case.device),
            self._build(case, plan, PAIR_FRACTIONS),
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

    def _build(self, case: Case, plan: PretrainedPlan, share: int) -> list[BaseAttention]:
        return build_per_layer(case.attention, plan.source, case.length, case.length // share)

    @contextmanager
    def _with_attentions(self, case: Case, plan: PretrainedPlan, share: int) -> Iterator[Any]:
        """Put the attention of a case into the model, in a size."""
        attentions = self._build(case, plan, share)
        with swap_attention(plan.source.model.to(case.device), attentions) as model:
            yield model


def _over_budget(case: Case, plan: PretrainedPlan, pass_s: float, by: str) -> str:
    """Return the reason if a case exceeds the budget, by the seconds of a pass; else nothing."""
    seconds = pass_s * plan.passes(case.task)
    if seconds <= plan.cap_s:
        return ""
    return f"estimated {seconds:.0f} s, going by {by}; the profile allows {plan.cap_s:.0f} s a case"
