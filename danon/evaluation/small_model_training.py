"""How a small model is trained on a task, and asked afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from danon.bench.suite import UnmeasuredError
from danon.data.corpora import CorpusError, corpus, sample_windows
from danon.data.tasks.base import Task
from danon.evaluation.curriculum import CurriculumDataset
from danon.evaluation.small_model import (
    EVAL_TOKENS,
    AnswerTrainer,
    answer_logits,
    build_small_model,
)
from danon.evaluation.training_plans import LanguagePlan, Plan, RecallPlan
from danon.measure.threads import fewer_threads_beside_load
from danon.models import Backbone
from danon.runs.case import Case
from danon.training import TrainingConfig

__all__ = [
    "EVAL_SEED",
    "TrainingRun",
    "bits_at",
    "eval_examples",
    "learn_language",
    "learn_recall",
    "require_affordable",
    "score_answers",
]

EVAL_SEED = 1_000_000
"""Seed of the examples that are judged; those that are learned from have smaller ones."""
ASKED = 4096
"""Answers that an accuracy is taken over, if so many examples have them."""
EXAMPLES = 1024
"""That an accuracy is taken over, at most."""
FORECASTS = 3
"""A training is over budget only if so many steps say so: somebody else may have slowed one."""


@dataclass
class TrainingRun:
    """One training.

    Attributes:
        threads: that it was computed with, the fewest of its stages.
        score: what learning rates are chosen by, the higher the better; NaN if it diverged.
        points: step, seconds and bits of every evaluation of the last fit.
        curves: of the result.
    """

    rate: float
    model: Backbone
    diverged: str = ""
    seconds: float = 0.0
    threads: float = math.inf
    score: float = math.nan
    points: list[tuple[int, float, float]] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


def require_affordable(case: Case, plan: Plan) -> None:
    """Raises: UnmeasuredError: the text is missing, or training takes longer than allowed."""
    seconds = math.inf
    for _ in range(FORECASTS):
        try:
            with fewer_threads_beside_load(torch.device(case.device)):
                seconds = min(seconds, _forecast(case, plan))
        except CorpusError as error:
            raise UnmeasuredError("unavailable", str(error)) from error
        if seconds <= plan.cap_s:
            return
    raise UnmeasuredError(
        "over budget",
        f"training would take {seconds:.0f} s, going by one step; the profile allows "
        f"{plan.cap_s:.0f} s",
    )


def _forecast(case: Case, plan: Plan) -> float:
    """Seconds of all trainings of an attention, going by a step of each kind."""
    model = build_small_model(case.attention, plan.shape, 0).to(case.device)
    total = 0.0
    for ids, answers, steps in plan.samples():
        batch = ids.to(case.device), answers.to(case.device)
        for _ in range(2):  # the first one warms up
            start = perf_counter()
            F.cross_entropy(*answer_logits(model, *batch)).backward()
            if case.device == "cuda":
                torch.cuda.synchronize()
            seconds = perf_counter() - start
        total += steps * seconds
    return total * plan.runs


def learn_recall(case: Case, plan: RecallPlan, rate: float, seed: int) -> TrainingRun:
    run = TrainingRun(rate, build_small_model(case.attention, plan.shape, seed).to(case.device))
    for number in range(len(plan.stages)):
        dataset = CurriculumDataset(plan.parts(number), seed=seed * len(plan.stages) + number)
        config = TrainingConfig(
            steps=len(dataset),
            batch_size=1,
            log_every=len(dataset),
            **plan.settings(rate * (1 - number / len(plan.stages)), seed, len(dataset)),
        )
        if not _fit(run, config, dataset):
            return run
    run.score = float(
        score_answers(run.model, *eval_examples(plan.tests[-1], EVAL_SEED - 1)).mean()
    )
    return run


def learn_language(case: Case, plan: LanguagePlan, rate: float, seed: int) -> TrainingRun:
    run = TrainingRun(rate, build_small_model(case.attention, plan.shape, seed).to(case.device))
    learned, chosen_by, _ = corpus(plan.corpus)
    asked = TensorDataset(*sample_windows(chosen_by, plan.held_out, plan.context, EVAL_SEED - 1))
    by_tokens: list[list[float]] = []
    by_seconds: list[list[float]] = []
    tokens, stages = 0, len(plan.readings)
    for number, reading in enumerate(plan.readings):
        data = sample_windows(
            learned, reading.batch * reading.steps, reading.context, seed * stages + number
        )
        config = TrainingConfig(
            steps=reading.steps,
            batch_size=reading.batch,
            log_every=reading.steps,
            eval_every=max(1, reading.steps // plan.judged),
            **plan.settings(rate * (1 - number / stages), seed, reading.steps),
        )
        seconds = run.seconds
        if not _fit(run, config, TensorDataset(*data), asked):
            return run
        each = reading.batch * reading.context
        by_tokens += [[tokens + step * each, bits] for step, _, bits in run.points]
        by_seconds += [[seconds + after, bits] for _, after, bits in run.points]
        tokens += reading.tokens
    run.score = -run.points[-1][2]
    run.curves = {"bits_by_tokens": by_tokens, "bits_by_seconds": by_seconds}
    return run


def _fit(
    run: TrainingRun,
    config: TrainingConfig,
    data: Dataset[Any],
    judged: TensorDataset | None = None,
) -> bool:
    """Train; False if it diverged."""
    points: list[tuple[int, float, float]] = []  # step, seconds of training, loss

    def listen(step: int, metrics: Mapping[str, float]) -> None:
        if "eval_loss" in metrics:
            points.append((step, perf_counter() - start - trainer.judging_s, metrics["eval_loss"]))

    trainer = AnswerTrainer(run.model, config, listeners=(listen,), progress=False)
    with fewer_threads_beside_load(run.model.embed.weight.device) as threads:
        start = perf_counter()
        found = trainer.fit(data, judged)
        run.seconds += perf_counter() - start - trainer.judging_s
    run.threads = min(run.threads, threads)
    run.model.eval()
    if found.outcome == "diverged":
        run.diverged = f"diverged at step {found.step}"
        return False
    run.points = [(step, seconds, loss / math.log(2)) for step, seconds, loss in points]
    return True


def eval_examples(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    return task.examples(min(-(-ASKED // task.answers), EXAMPLES), seed)


@torch.no_grad()
def score_answers(model: Backbone, ids: Tensor, answers: Tensor) -> Tensor:
    """1 or 0 for every answer, in order (examples * answers,)."""
    found = []
    for some, wanted in _slices(model, ids, answers):
        logits, targets = answer_logits(model, some, wanted)
        found.append(logits.argmax(-1) == targets)
    return torch.cat(found).double().cpu()


@torch.no_grad()
def bits_at(model: Backbone, ids: Tensor, following: Tensor) -> Tensor:
    """Mean bits of the bytes at each position (N,)."""
    losses = [
        F.cross_entropy(*answer_logits(model, some, wanted), reduction="none").view(some.shape)
        for some, wanted in _slices(model, ids, following)
    ]
    return torch.cat(losses).mean(0) / math.log(2)


def _slices(model: Backbone, ids: Tensor, answers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    device, size = model.embed.weight.device, max(1, EVAL_TOKENS // ids.shape[1])
    for some, wanted in zip(ids.split(size), answers.split(size), strict=True):
        yield some.to(device), wanted.to(device)
