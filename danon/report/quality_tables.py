"""Quality of attentions in models, as the terminal and the report show it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from danon.report import configuration, formatting
from danon.report.figure import Figure
from danon.report.pareto import pareto_front
from danon.report.remarks import Remark, doubtful, remarks
from danon.report.suite_infos import suite_infos
from danon.report.tables import figure, role, speedup
from danon.runs import task_registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.report.tables import Role
    from danon.runs.case import CaseResult
    from danon.runs.suite_info import Metric, SuiteInfo

__all__ = ["Cost", "Row", "Score", "Task", "attentions", "hardest", "known_tasks", "tasks"]

Cost = Literal["share", "speedup", "peak"]
LOOKUP = "lookup"
"""The task whose attentions have the settings of the speed suite."""
WRITTEN = {
    "accuracy": formatting.format_accuracy,
    "bits_per_byte": formatting.format_bits,
    "perplexity": formatting.format_perplexity,
}


HEADINGS = {"accuracy": "right answers", "bits_per_byte": "bits per byte"}
"""Metrics in words; others are words."""


@dataclass(frozen=True)
class Score:
    """Quality and costs of one attention at one length.

    Attributes:
        quality: value in the metric of the task; its interval is the range over the seeds.
        share: share of dense attention's pairs that are seen; NaN for a recurrence.
        speedup: speed-up of the attention's forward pass over dense attention, in the model's size.
        peak: peak bytes of that pass.
        items: number of items to find; NaN for text.
        train_s: seconds of training.
        learning_rate: chosen learning rate.
        seeds: number of seeds.
        semantics: description of the attention in the model.
        settings: digest of the configuration in the model; empty if not recorded.
        answers: questions that dense attention answered, too; NaN without a comparison.
        lost: questions that only dense attention answers right.
        gained: questions that only dense attention answers wrong.
        curves: points by name of the curve.
    """

    quality: Figure
    share: float
    speedup: Figure
    peak: float
    items: float
    train_s: float
    learning_rate: float
    seeds: float
    semantics: str
    settings: str = ""
    answers: float = math.nan
    lost: float = math.nan
    gained: float = math.nan
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def cost(self, of: Cost) -> float:
        """Return a cost such that less is better; infinite if it was not measured."""
        paid = -self.speedup.value if of == "speedup" else getattr(self, of)
        return paid if math.isfinite(paid) else math.inf


@dataclass(frozen=True)
class Row:
    """One attention in a task.

    Attributes:
        attention: registered name.
        role: role in the comparison.
        scores: length -> score.
        remarks: notes on its figures.
    """

    attention: str
    role: Role
    scores: dict[int, Score]
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task with the scores of all attentions.

    Attributes:
        suite: name of the suite.
        name: name of the task: a recall task, a text, or a task of a pretrained model.
        metric: metric of its quality.
        higher: True if higher values are better.
        lengths: lengths with scores, ascending, in tokens.
        rows: attentions, the best at the longest length first.
    """

    suite: str
    name: str
    metric: str
    higher: bool
    lengths: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def headline(self) -> int:
        """The longest length, which is the hardest."""
        return self.lengths[-1]

    @property
    def ranged(self) -> bool:
        """True if figures at the longest length have a range over seeds."""
        scores = (row.scores.get(self.headline) for row in self.rows)
        return any(score and self.spread(score.quality) for score in scores)

    @property
    def by_depth(self) -> bool:
        """True if accuracy is recorded by the depth of the answer in the context."""
        scores = (score for row in self.rows for score in row.scores.values())
        return any("accuracy_by_depth" in score.curves for score in scores)

    @property
    def trained(self) -> bool:
        """True if models were trained for it, each with one attention."""
        return self.suite != "pretrained"

    @property
    def heading(self) -> str:
        """The metric in words."""
        return HEADINGS.get(self.metric, self.metric)

    @property
    def about(self) -> str:
        """The task in words."""
        record = task_registry.find(self.suite, self.name)
        if self.metric == "bits_per_byte":
            return f"{record.title if record else 'text'}, bits/B"
        return record.title if record else self.name

    @property
    def question(self) -> str:
        """The question of an example, in a sentence; empty for text."""
        record = task_registry.find(self.suite, self.name)
        return record.question if record else ""

    def items(self, length: int) -> float:
        """Return the number of items to find at a length; NaN for text."""
        items = (row.scores[length].items for row in self.rows if length in row.scores)
        return next(items, math.nan)

    def score(self, attention: str, length: int) -> Score | None:
        """Return the score of an attention at a length, or None."""
        scores = (row.scores.get(length) for row in self.rows if row.attention == attention)
        return next(scores, None)

    def resized(self, attention: str, length: int) -> bool:
        """Return True if a score has other settings than time, memory and pairs of its row.

        Those are measured at the longest length; an attention may have another size at each length.
        """
        score, cost = self.score(attention, length), self.score(attention, self.headline)
        return score is not None and cost is not None and score.settings != cost.settings

    def loss(self, score: Score | None) -> float:
        """Return quality such that less is better; infinite without a score."""
        return math.inf if score is None else self.loss_of(score.quality.value)

    def loss_of(self, value: float) -> float:
        """Return a value of the metric such that less is better; infinite if it is NaN."""
        if not math.isfinite(value):
            return math.inf
        return -value if self.higher else value

    def write(self, value: float) -> str:
        """Format a value of the metric: ``98%``, ``2.131`` or ``37.55``."""
        return WRITTEN.get(self.metric, formatting.format_number)(value)

    def spread(self, quality: Figure) -> str:
        """Format the range over seeds: ``93-98%``; empty with one seed."""
        if not (math.isfinite(quality.low) and math.isfinite(quality.high)):
            return ""
        return f"{self.write(quality.low).rstrip('%')}-{self.write(quality.high)}"

    def front(self, length: int, costs: Sequence[Cost] = ("speedup", "peak")) -> frozenset[str]:
        """Return the attentions on the Pareto front of quality and costs.

        No other attention is as good in quality and all costs, and better in one. Intervals are
        ignored; quality and costs of an attention are from one case. Attentions in doubt are left
        out.

        Args:
            length: tokens.
            costs: costs to compare beside quality.
        """
        points = {
            row.attention: (self.loss(score), *map(score.cost, costs))
            for row in self.rows
            if not doubtful(row.remarks) and (score := row.scores.get(length))
        }
        return frozenset(pareto_front(points))


def known_tasks() -> frozenset[str]:
    """Return the names of all installed tasks, recorded or not."""
    return frozenset(task_registry.names())


def tasks(
    results: Sequence[CaseResult], command: str, suites: Mapping[str, SuiteInfo] | None = None
) -> list[Task]:
    """Return every task with figures, suite by suite, in the order of the results.

    Args:
        results: results of one run.
        command: command of the run, as typed.
        suites: descriptions of the suites, as stored with the run.
    """
    measured = [r for r in results if r.case.task and r.status == "measured"]
    infos = suite_infos(measured, suites)
    by_task: dict[tuple[str, str], list[CaseResult]] = {}
    for result in measured:
        by_task.setdefault((result.case.suite, result.case.task), []).append(result)
    notes = remarks(results)
    tables = []
    for suite, info in infos.items():
        for name in (task for owner, task in by_task if owner == suite):
            judge = info.judge(name)
            if judge is not None and not judge.listed:
                tables.append(_task(suite, name, judge, by_task[suite, name], command, notes))
    return [task for task in tables if task.rows]


def hardest(among: Sequence[Task], suite: str) -> Task | None:
    """Return the first task of a suite that has the longest length; None without one."""
    return max((t for t in among if t.suite == suite), key=lambda t: t.headline, default=None)


def attentions(among: Sequence[Task]) -> dict[str, Role]:
    """Return attentions with their roles, best first in the first task, then in the next."""
    roles = {row.attention: row.role for task in among for row in task.rows}

    def rank(name: str) -> tuple[float, ...]:
        return tuple(task.loss(task.score(name, task.headline)) for task in among)

    return {name: roles[name] for name in sorted(roles, key=rank)}


def _task(
    suite: str,
    name: str,
    judge: Metric,
    results: Sequence[CaseResult],
    command: str,
    notes: Mapping[str, tuple[Remark, ...]],
) -> Task:
    metric, higher = judge.name, judge.better == "higher"
    scores: dict[str, dict[int, Score]] = {}
    for result in sorted(results, key=lambda r: r.case.length):
        score = _score(result, metric)
        if math.isfinite(score.quality.value):
            scores.setdefault(result.case.attention, {})[result.case.length] = score
    lengths = tuple(sorted({n for by_length in scores.values() for n in by_length}))
    rows = [
        Row(name, role(name, command), by_length, notes.get(name, ()))
        for name, by_length in scores.items()
    ]
    task = Task(suite, name, metric, higher, lengths, ())

    def rank(row: Row) -> tuple[float, ...]:
        """Return losses, the longest length first; shorter ones decide between equals."""
        return tuple(task.loss(row.scores.get(n)) for n in reversed(lengths))

    return dataclasses.replace(task, rows=tuple(sorted(rows, key=rank)))


def _score(result: CaseResult, metric: str) -> Score:
    metrics = result.metrics

    def number(name: str) -> float:
        return metrics.get(name, math.nan)

    return Score(
        quality=figure(metrics, metric),
        share=number("pairs_share"),
        speedup=speedup({"attention": result.case.attention, **metrics}),
        peak=number("peak_bytes"),
        items=number("items"),
        train_s=number("train_s"),
        learning_rate=number("learning_rate"),
        seeds=number("seeds"),
        semantics=result.semantics,
        settings=configuration.digest(result),
        answers=number("answers"),
        lost=number("lost_answers"),
        gained=number("gained_answers"),
        curves=result.curves,
    )
