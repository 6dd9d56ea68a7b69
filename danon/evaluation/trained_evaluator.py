"""Quality of a small model that is trained with an attention on a task or a text.

All attentions get the same model, examples, steps, learning rates and seeds, and about the same
entries a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from danon.attention.registry import REFERENCE
from danon.bench.eligibility import PROBE, attention_costs, check_eligible
from danon.bench.profile import Profile
from danon.bench.shapes import configuration
from danon.bench.suite import SuiteContext, UnmeasuredError
from danon.bench.verification import Verifier
from danon.data.corpora import corpus, sample_windows
from danon.evaluation.model_saver import ModelSaver
from danon.evaluation.small_model import measured_attention, sized
from danon.evaluation.small_model_training import (
    EVAL_SEED,
    TrainingRun,
    bits_at,
    eval_examples,
    learn_language,
    learn_recall,
    require_affordable,
    score_answers,
)
from danon.evaluation.training_plans import LanguagePlan, Plan, RecallPlan
from danon.processes.interruption import Interruption
from danon.runs.case import Case, CaseResult
from danon.training import IGNORED

__all__ = ["TrainedModelEvaluator", "by_depth"]

BUCKETS = 16
"""Ranges of positions of the curve of bits."""
TENTHS = 10
"""Ranges of depth of the curve of right answers."""


class TrainedModelEvaluator:
    """Evaluator that trains every attention once for a task; the cases of a task share the models.

    Args:
        profile: plans of the trainings.
        saver: stores the best model of each training; None stores none.
    """

    def __init__(self, profile: Profile, saver: ModelSaver | None = None) -> None:
        self._profile = profile
        self._saver = saver
        self._verifier = Verifier()
        self._runs: dict[tuple[str, Plan], list[TrainingRun] | BaseException] = {}
        self._checks: dict[tuple[str, Plan], dict[str, Any]] = {}

    @classmethod
    def of(cls, context: SuiteContext) -> Self:
        """Return the evaluator of a session, which keeps models where the run has a folder."""
        run_dir = context.run_dir
        saver = None if run_dir is None else ModelSaver(run_dir, context.note)
        return cls(context.profile, saver)

    def result(self, case: Case) -> CaseResult:
        """Train, unless an earlier case has, and evaluate at the length of the case.

        Args:
            case: of the suite recall or language.

        Raises:
            UnmeasuredError: the attention is not eligible, over budget, or its training diverged.
        """
        plan = self._profile.plan(case)
        if isinstance(plan, RecallPlan):
            return self._evaluate_recall(case, plan)
        assert isinstance(plan, LanguagePlan)
        return self._evaluate_language(case, plan)

    def _evaluate_recall(self, case: Case, plan: RecallPlan) -> CaseResult:
        runs = self._trained(case, plan, lambda rate, seed: learn_recall(case, plan, rate, seed))
        metrics = dict[str, float]()
        curves = dict[str, list[list[float]]]()
        for task in (test for test in plan.tests if test.length == case.length):
            ids, answers = eval_examples(task, EVAL_SEED)
            right = torch.stack([score_answers(run.model, ids, answers) for run in runs])
            accuracies = right.mean(1).tolist()
            metrics |= _spread(f"accuracy_{task.items}_items", accuracies)
            metrics |= _spread("accuracy", accuracies) | {
                "items": float(task.items)
            }  # the most items last
            metrics["majority"] = _majority_class_accuracy(answers)
            if (depths := task.depths(ids)) is not None:
                curves["accuracy_by_depth"] = by_depth(right.mean(0), depths.flatten())
        row = self._row(case, plan, runs, metrics, "accuracy", accuracies)
        return replace(row, curves=curves)

    def _evaluate_language(self, case: Case, plan: LanguagePlan) -> CaseResult:
        runs = self._trained(case, plan, lambda rate, seed: learn_language(case, plan, rate, seed))
        windows = sample_windows(corpus(plan.corpus)[2], plan.held_out, plan.context, EVAL_SEED)
        bits = [bits_at(run.model, *windows) for run in runs]
        means = [float(by_position.mean()) for by_position in bits]
        metrics = _spread("bits_per_byte", means)
        curves = runs[0].curves | {"bits_by_position": _by_position(bits[0])}
        row = self._row(case, plan, runs, metrics, "bits_per_byte", means)
        return replace(row, curves=curves)

    def _row(
        self,
        case: Case,
        plan: Plan,
        runs: list[TrainingRun],
        metrics: dict[str, float],
        metric: str,
        values: list[float],
    ) -> CaseResult:
        """Return the result of a case, with the costs of the attention in the model.

        Args:
            case: the case.
            plan: plan of the trainings.
            runs: a training for each seed.
            metrics: of the evaluation.
            metric: name of the task's metric.
            values: its value for each run.
        """
        module, seconds = measured_attention(runs[0].model), [run.seconds for run in runs]
        metrics |= {
            "train_s": fmean(seconds),
            "train_tokens": float(plan.tokens),
            "train_threads": float(min(run.threads for run in runs)),
            "learning_rate": runs[0].rate,
            "seeds": float(len(runs)),
            "parameters": float(sum(p.numel() for p in runs[0].model.parameters())),
        }
        metrics |= attention_costs(
            case,
            module,
            lambda: sized(REFERENCE, plan.shape).eval().to(case.device),
            self._verifier,
            seconds=self._profile.seconds,
            width=self._profile.width,
        )
        if self._saver is not None and case.length == plan.lengths[-1]:
            seed = max(range(len(runs)), key=lambda number: runs[number].score)
            self._saver.save(
                case,
                plan,
                runs[seed].model,
                seed=seed,
                learning_rate=runs[seed].rate,
                metric=metric,
                value=values[seed],
            )
        check = self._checks[case.attention, plan]
        config = configuration(case.attention, module, plan.shape.entries)
        return CaseResult(
            case,
            "measured",
            "",
            module.description,
            metrics,
            {"candidate_s": seconds},
            check,
            config,
        )

    def _trained(
        self, case: Case, plan: Plan, learn: Callable[[float, int], TrainingRun]
    ) -> list[TrainingRun]:
        """Return a training for each seed, at the learning rate that was best for the first seed.

        Raises:
            UnmeasuredError: the attention cannot run here, is wrong, takes too long, sees later
                tokens, or diverged.
        """
        key = case.attention, plan
        if key not in self._runs:
            try:
                self._runs[key] = self._train(case, plan, learn)
            except Interruption:
                raise
            except BaseException as reason:  # noqa: BLE001  the other cases of the task fail alike
                self._runs[key] = reason
        runs = self._runs[key]
        if isinstance(runs, BaseException):
            raise runs
        return runs

    def _train(
        self, case: Case, plan: Plan, learn: Callable[[float, int], TrainingRun]
    ) -> list[TrainingRun]:
        shape = plan.shape
        _, check = check_eligible(case, shape.config(), shape.entries, PROBE, self._verifier)
        self._checks[case.attention, plan] = check
        require_affordable(case, plan)
        first = [learn(rate, 0) for rate in plan.rates]
        converged = [run for run in first if not run.diverged]
        if not converged:
            reasons = (f"learning rate {run.rate:g} {run.diverged}" for run in first)
            raise UnmeasuredError("failed", "; ".join(reasons))
        best = max(converged, key=lambda run: run.score)
        runs = [best]
        for seed in range(1, plan.seeds):
            runs.append(learn(best.rate, seed))
            if runs[-1].diverged:
                raise UnmeasuredError("failed", f"seed {seed} {runs[-1].diverged}")
        return runs


def _majority_class_accuracy(answers: Tensor) -> float:
    """Return the accuracy of always predicting the most frequent answer."""
    asked = answers[answers != IGNORED]
    return float(asked.bincount().max() / len(asked))


def by_depth(right: Tensor, depths: Tensor) -> list[list[float]]:
    """Return the share of right answers in each tenth of the depths.

    Args:
        right: 1 or 0 for each answer (answers,).
        depths: depth of each answer (answers,), from 0 to below 1.

    Returns:
        The middle of each tenth that has answers, and its share.
    """
    tenth = (depths * TENTHS).long()
    return [[(i + 0.5) / TENTHS, float(right[tenth == i].mean())] for i in tenth.unique().tolist()]


def _by_position(bits: Tensor) -> list[list[float]]:
    """Return the mean bits (N,) in ranges of positions: [last position, bits]."""
    ends = torch.linspace(0, len(bits), BUCKETS + 1, dtype=torch.float32).long().unique().tolist()
    return [[b, float(bits[a:b].mean())] for a, b in pairwise(ends)]


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean over the seeds, and the least and the most of several."""
    mean = {name: fmean(values)}
    return mean | {f"{name}_low": min(values), f"{name}_high": max(values)} if values[1:] else mean
