"""What an attention is worth as part of a model: trained on a task, then asked.

Everyone gets the same model, examples, steps, learning rates and seeds, and about the same entries
a query; only the attention differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from danon.attention import registry
from danon.measure.case import Case, CaseResult
from danon.models import Backbone
from danon.training import IGNORED, TrainingConfig
from suites.attentions import REFERENCE
from suites.corpora import CorpusError, corpus, windows
from suites.examine import UnmeasuredError, costs, examined
from suites.keeper import Keeper
from suites.learner import AnswerTrainer, answered, attention_of, learner, sized
from suites.lessons import Lessons
from suites.plans import LanguagePlan, Plan, RecallPlan
from suites.profiles import Profile
from suites.tasks import Task
from suites.verify import Verifier

__all__ = ["School", "by_depth"]

JUDGING = 1_000_000
"""Seed of the examples that are judged; those that are learned from have smaller ones."""
ASKED = 4096
"""Answers that an accuracy is taken over, if so many examples have them."""
EXAMPLES = 1024
"""That an accuracy is taken over, at most."""
TOGETHER = 16384
"""Tokens that are judged at once."""
BUCKETS = 16
"""Of positions, over which the loss is shown."""
TENTHS = 10
"""Of the depth, over which right answers are shown."""
FORECASTS = 3
"""A training is over budget only if so many steps say so: somebody else may have slowed one."""
PROBE = 256
"""Tokens that the correctness check of an attention takes, at most."""


@dataclass
class Run:
    """One training.

    Attributes:
        score: what learning rates are chosen by, the higher the better; NaN if it diverged.
        points: step, seconds and bits of every evaluation of the last fit.
        curves: of the result.
    """

    rate: float
    model: Backbone
    diverged: str = ""
    seconds: float = 0.0
    score: float = math.nan
    points: list[tuple[int, float, float]] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


class School:
    """Trains every attention once for a task; the cases of a task share the models.

    Args:
        profile: decides what is trained.
        keeper: is given the best model of each training, once it has been judged.
    """

    def __init__(self, profile: Profile, keeper: Keeper | None = None) -> None:
        self._profile = profile
        self._keeper = keeper
        self._verifier = Verifier()
        self._runs: dict[tuple[str, Plan], list[Run] | Exception] = {}
        self._checks: dict[tuple[str, Plan], dict[str, Any]] = {}

    def result(self, case: Case) -> CaseResult:
        """Train, unless a case before has, and judge at the length of the case."""
        kind = registry.get(case.attention)
        try:
            plan = self._profile.plan(case)
            recalls = isinstance(plan, RecallPlan)
            return self._recalled(case, plan) if recalls else self._spoken(case, plan)
        except UnmeasuredError as reason:
            return CaseResult(case, reason.status, str(reason), kind.semantics)

    def _recalled(self, case: Case, plan: RecallPlan) -> CaseResult:
        runs = self._trained(case, plan, lambda rate, seed: _learn_recall(case, plan, rate, seed))
        metrics, curves = {}, {}
        for task in (test for test in plan.tests if test.length == case.length):
            ids, answers = _asked(task, JUDGING)
            right = torch.stack([_right(run.model, ids, answers) for run in runs])
            found = right.mean(1).tolist()
            metrics |= _spread(f"accuracy_{task.items}_items", found)
            metrics |= _spread("accuracy", found) | {"items": float(task.items)}  # the most last
            metrics["majority"] = _majority(answers)
            if (depths := task.depths(ids)) is not None:
                curves["accuracy_by_depth"] = by_depth(right.mean(0), depths.flatten())
        row = self._row(case, plan, runs, metrics, "accuracy", found)
        return replace(row, curves=curves)

    def _spoken(self, case: Case, plan: LanguagePlan) -> CaseResult:
        runs = self._trained(case, plan, lambda rate, seed: _learn_language(case, plan, rate, seed))
        judged = windows(corpus(plan.corpus)[2], plan.held_out, plan.context, JUDGING)
        bits = [_bits(run.model, *judged) for run in runs]
        found = [float(some.mean()) for some in bits]
        metrics = _spread("bits_per_byte", found)
        curves = runs[0].curves | {"bits_by_position": _by_position(bits[0])}
        row = self._row(case, plan, runs, metrics, "bits_per_byte", found)
        return replace(row, curves=curves)

    def _row(
        self, case: Case, plan: Plan, runs: list[Run], metrics: dict[str, float], metric: str,
        found: list[float],
    ) -> CaseResult:  # fmt: skip
        """The judgement, and what the attention that was judged costs.

        Args:
            metrics: of the judgement.
            metric: what the task is judged by.
            found: of each run.
        """
        module, seconds = attention_of(runs[0].model), [run.seconds for run in runs]
        metrics |= {
            "train_s": fmean(seconds), "train_tokens": float(plan.tokens),
            "learning_rate": runs[0].rate, "seeds": float(len(runs)),
            "parameters": float(sum(p.numel() for p in runs[0].model.parameters())),
        }  # fmt: skip
        metrics |= costs(
            case, module, lambda: sized(REFERENCE, plan.shape).eval().to(case.device),
            seconds=self._profile.seconds, width=self._profile.width,
        )  # fmt: skip
        if self._keeper is not None and case.length == plan.lengths[-1]:
            seed = max(range(len(runs)), key=lambda number: runs[number].score)
            self._keeper.keep(
                case, plan, runs[seed].model, seed=seed, learning_rate=runs[seed].rate,
                metric=metric, value=found[seed],
            )  # fmt: skip
        check, config = self._checks[case.attention, plan], module.config.to_dict()
        return CaseResult(
            case, "measured", "", module.semantics, metrics, {"candidate_s": seconds}, check, config
        )

    def _trained(self, case: Case, plan: Plan, learn: Callable[[float, int], Run]) -> list[Run]:
        """A run for each seed, at the learning rate that was best for the first.

        Raises:
            UnmeasuredError: it cannot run here, is wrong, takes too long, sees later tokens, or
                diverged.
        """
        key = case.attention, plan
        if key not in self._runs:
            try:
                self._runs[key] = self._train(case, plan, learn)
            except Exception as reason:  # noqa: BLE001  the other cases of the task fail alike
                self._runs[key] = reason
        runs = self._runs[key]
        if isinstance(runs, Exception):
            raise runs
        return runs

    def _train(self, case: Case, plan: Plan, learn: Callable[[float, int], Run]) -> list[Run]:
        shape = plan.shape
        _, check = examined(case, shape.config(), shape.entries, PROBE, self._verifier)
        self._checks[case.attention, plan] = check
        _affordable(case, plan)
        first = [learn(rate, 0) for rate in plan.rates]
        converged = [run for run in first if not run.diverged]
        if not converged:
            said = (f"learning rate {run.rate:g} {run.diverged}" for run in first)
            raise UnmeasuredError("failed", "; ".join(said))
        best = max(converged, key=lambda run: run.score)
        runs = [best]
        for seed in range(1, plan.seeds):
            runs.append(learn(best.rate, seed))
            if runs[-1].diverged:
                raise UnmeasuredError("failed", f"seed {seed} {runs[-1].diverged}")
        return runs


def _affordable(case: Case, plan: Plan) -> None:
    """Raises: UnmeasuredError: the text is missing, or training takes longer than allowed."""
    seconds = math.inf
    for _ in range(FORECASTS):
        try:
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
    model = learner(case.attention, plan.shape, 0).to(case.device)
    total = 0.0
    for ids, answers, steps in plan.samples():
        batch = ids.to(case.device), answers.to(case.device)
        for _ in range(2):  # the first one warms up
            start = perf_counter()
            F.cross_entropy(*answered(model, *batch)).backward()  # type: ignore[no-untyped-call]
            if case.device == "cuda":
                torch.cuda.synchronize()
            seconds = perf_counter() - start
        total += steps * seconds
    return total * plan.runs


def _learn_recall(case: Case, plan: RecallPlan, rate: float, seed: int) -> Run:
    run = Run(rate, learner(case.attention, plan.shape, seed).to(case.device))
    for number in range(len(plan.stages)):
        lessons = Lessons(plan.parts(number), seed=seed * len(plan.stages) + number)
        config = TrainingConfig(
            steps=len(lessons), batch_size=1, log_every=len(lessons),
            **plan.settings(rate * (1 - number / len(plan.stages)), seed, len(lessons)),
        )  # fmt: skip
        if not _fit(run, config, lessons):
            return run
    run.score = float(_right(run.model, *_asked(plan.tests[-1], JUDGING - 1)).mean())
    return run


def _learn_language(case: Case, plan: LanguagePlan, rate: float, seed: int) -> Run:
    run = Run(rate, learner(case.attention, plan.shape, seed).to(case.device))
    learned, chosen_by, _ = corpus(plan.corpus)
    asked = TensorDataset(*windows(chosen_by, plan.held_out, plan.context, JUDGING - 1))
    by_tokens: list[list[float]] = []
    by_seconds: list[list[float]] = []
    tokens, stages = 0, len(plan.readings)
    for number, reading in enumerate(plan.readings):
        data = windows(
            learned, reading.batch * reading.steps, reading.context, seed * stages + number
        )
        config = TrainingConfig(
            steps=reading.steps, batch_size=reading.batch, log_every=reading.steps,
            eval_every=max(1, reading.steps // plan.judged),
            **plan.settings(rate * (1 - number / stages), seed, reading.steps),
        )  # fmt: skip
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
    run: Run, config: TrainingConfig, data: Dataset[Any], judged: TensorDataset | None = None
) -> bool:
    """Train; False if it diverged."""
    start = perf_counter()
    points: list[tuple[int, float, float]] = []  # step, seconds of training, loss

    def listen(step: int, metrics: dict[str, float]) -> None:
        if "eval_loss" in metrics:
            points.append((step, perf_counter() - start - trainer.judging_s, metrics["eval_loss"]))

    trainer = AnswerTrainer(run.model, config, listeners=(listen,), progress=False)
    found = trainer.fit(data, judged)
    run.seconds += perf_counter() - start - trainer.judging_s
    run.model.eval()
    if found.outcome == "diverged":
        run.diverged = f"diverged at step {found.step}"
        return False
    run.points = [(step, seconds, loss / math.log(2)) for step, seconds, loss in points]
    return True


def _asked(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    return task.examples(min(-(-ASKED // task.answers), EXAMPLES), seed)


def _majority(answers: Tensor) -> float:
    """Accuracy of who always gives the most frequent answer."""
    wanted = answers[answers != IGNORED]
    return float(wanted.bincount().max() / len(wanted))


@torch.no_grad()
def _right(model: Backbone, ids: Tensor, answers: Tensor) -> Tensor:
    """1 or 0 for every answer, in order (examples * answers,)."""
    found = []
    for some, wanted in _slices(model, ids, answers):
        logits, targets = answered(model, some, wanted)
        found.append(logits.argmax(-1) == targets)
    return torch.cat(found).double().cpu()


def by_depth(right: Tensor, depths: Tensor) -> list[list[float]]:
    """Share of right answers in each tenth of the depths (answers,): [its middle, share]."""
    tenth = (depths * TENTHS).long()
    return [[(i + 0.5) / TENTHS, float(right[tenth == i].mean())] for i in tenth.unique().tolist()]


@torch.no_grad()
def _bits(model: Backbone, ids: Tensor, following: Tensor) -> Tensor:
    """Mean bits of the bytes at each position (N,)."""
    losses = [
        F.cross_entropy(*answered(model, some, wanted), reduction="none").view(some.shape)
        for some, wanted in _slices(model, ids, following)
    ]
    return torch.cat(losses).mean(0) / math.log(2)


def _by_position(bits: Tensor) -> list[list[float]]:
    """Mean bits in each stretch of positions (N,): [position it ends at, bits]."""
    ends = torch.linspace(0, len(bits), BUCKETS + 1).long().unique().tolist()
    return [[b, float(bits[a:b].mean())] for a, b in pairwise(ends)]


def _slices(model: Backbone, ids: Tensor, answers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    device, size = model.embed.weight.device, max(1, TOGETHER // ids.shape[1])
    for some, wanted in zip(ids.split(size), answers.split(size), strict=True):
        yield some.to(device), wanted.to(device)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean over the seeds, and the least and the most of several."""
    found = {name: fmean(values)}
    return (
        found | {f"{name}_low": min(values), f"{name}_high": max(values)} if values[1:] else found
    )
