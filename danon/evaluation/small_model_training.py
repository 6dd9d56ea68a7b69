"""Training of the small model on a task or a text, and its evaluation."""

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
"""Seed of the evaluation examples; those of training have smaller ones."""
EVAL_ANSWERS = 4096
"""Answers of an accuracy, if MAX_EVAL_EXAMPLES have as many."""
MAX_EVAL_EXAMPLES = 1024
"""Most examples of an accuracy."""
FORECASTS = 3
"""A training is over budget only if this many forecasts say so: another program may slow one."""


@dataclass
class TrainingRun:
    """One training.

    Attributes:
        rate: learning rate.
        model: the trained model.
        diverged: the step of a divergence in words; empty if there was none.
        seconds: of training, without evaluations.
        threads: number of threads, the fewest of its stages.
        score: figure that learning rates are chosen by, higher is better; NaN if it diverged.
        points: step, seconds and bits of every evaluation of the last fit.
        curves: curves of the result.
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
    """Check that the text is there and the trainings fit the budget of the plan.

    Args:
        case: attention and device.
        plan: the trainings.

    Raises:
        UnmeasuredError: the text is missing, or training takes longer than allowed.
    """
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
    """Forecast the seconds of all trainings of an attention from one step of each kind."""
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
    """Train the small model on the curriculum of a task.

    Args:
        case: attention and device.
        plan: stages and tests.
        rate: learning rate of the first stage; later ones have less.
        seed: seed of the weights and of the examples.
    """
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
    """Train the small model on the contexts of a text.

    Args:
        case: attention and device.
        plan: text and contexts.
        rate: learning rate of the first context; later ones have less.
        seed: seed of the weights and of the windows.
    """
    run = TrainingRun(rate, build_small_model(case.attention, plan.shape, seed).to(case.device))
    training, validation, _ = corpus(plan.corpus)
    held_out = TensorDataset(
        *sample_windows(validation, plan.held_out, plan.context, EVAL_SEED - 1)
    )
    by_tokens: list[list[float]] = []
    by_seconds: list[list[float]] = []
    tokens, stages = 0, len(plan.stages)
    for number, stage in enumerate(plan.stages):
        data = sample_windows(
            training, stage.batch * stage.steps, stage.context, seed * stages + number
        )
        config = TrainingConfig(
            steps=stage.steps,
            batch_size=stage.batch,
            log_every=stage.steps,
            eval_every=max(1, stage.steps // plan.evaluations),
            **plan.settings(rate * (1 - number / stages), seed, stage.steps),
        )
        seconds = run.seconds
        if not _fit(run, config, TensorDataset(*data), held_out):
            return run
        step_tokens = stage.batch * stage.context
        by_tokens += [[tokens + step * step_tokens, bits] for step, _, bits in run.points]
        by_seconds += [[seconds + after, bits] for _, after, bits in run.points]
        tokens += stage.tokens
    run.score = -run.points[-1][2]
    run.curves = {"bits_by_tokens": by_tokens, "bits_by_seconds": by_seconds}
    return run


def _fit(
    run: TrainingRun,
    config: TrainingConfig,
    data: Dataset[Any],
    held_out: TensorDataset | None = None,
) -> bool:
    """Train, and return False if it diverged."""
    points: list[tuple[int, float, float]] = []  # step, seconds of training, loss

    def listen(step: int, metrics: Mapping[str, float]) -> None:
        if "eval_loss" in metrics:
            points.append(
                (step, perf_counter() - start - trainer.evaluation_s, metrics["eval_loss"])
            )

    trainer = AnswerTrainer(run.model, config, listeners=(listen,), progress=False)
    with fewer_threads_beside_load(run.model.embed.weight.device) as threads:
        start = perf_counter()
        result = trainer.fit(data, held_out)
        run.seconds += perf_counter() - start - trainer.evaluation_s
    run.threads = min(run.threads, threads)
    run.model.eval()
    if result.outcome == "diverged":
        run.diverged = f"diverged at step {result.step}"
        return False
    run.points = [(step, seconds, loss / math.log(2)) for step, seconds, loss in points]
    return True


def eval_examples(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the examples of an accuracy: tokens and answers, (examples, N) each."""
    return task.examples(min(-(-EVAL_ANSWERS // task.answers), MAX_EVAL_EXAMPLES), seed)


@torch.no_grad()
def score_answers(model: Backbone, ids: Tensor, answers: Tensor) -> Tensor:
    """Return 1 or 0 for every answer, in order.

    Args:
        model: model of hidden states.
        ids: tokens (examples, N).
        answers: (examples, N), -100 where nothing is asked.

    Returns:
        (examples * answers,) float64 on the CPU.
    """
    right = []
    for batch_ids, batch_answers in _batches(model, ids, answers):
        logits, targets = answer_logits(model, batch_ids, batch_answers)
        right.append(logits.argmax(-1) == targets)
    return torch.cat(right).double().cpu()


@torch.no_grad()
def bits_at(model: Backbone, ids: Tensor, following: Tensor) -> Tensor:
    """Return the mean bits of the bytes at each position.

    Args:
        model: model of hidden states.
        ids: bytes (windows, N).
        following: the byte after each, (windows, N).

    Returns:
        (N,) bits a byte.
    """
    losses = [
        F.cross_entropy(*answer_logits(model, here, after), reduction="none").view(here.shape)
        for here, after in _batches(model, ids, following)
    ]
    return torch.cat(losses).mean(0) / math.log(2)


def _batches(model: Backbone, ids: Tensor, answers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    device, size = model.embed.weight.device, max(1, EVAL_TOKENS // ids.shape[1])
    for batch in zip(ids.split(size), answers.split(size), strict=True):
        yield batch[0].to(device), batch[1].to(device)
