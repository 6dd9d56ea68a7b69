"""What attentions are worth in models, as the scoreboard and the report show it."""

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
"""The task whose attentions have the settings that speed is measured with."""
WRITTEN = {
    "accuracy": formatting.format_accuracy,
    "bits_per_byte": formatting.format_bits,
    "perplexity": formatting.format_perplexity,
}


@dataclass(frozen=True)
class Score:
    """What came of one attention at one length.

    Attributes:
        quality: in the metric of the task; its interval is the least and the most of the seeds.
        share: of dense attention's pairs that are seen; NaN for a recurrence.
        speedup: of the forward pass of the attention, as it is in the model, over dense attention.
        peak: bytes of that pass.
        items: what there was to find; NaN for text.
        answers: questions that dense attention was asked, too; NaN where they are not compared.
        lost: of these, how many dense attention alone answers right.
        gained: of these, how many dense attention alone answers wrong.
        semantics: in the model.
        settings: digest of the configuration in the model; empty if not recorded.
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
        """What is paid, the less the better; nothing known is the most."""
        paid = -self.speedup.value if of == "speedup" else getattr(self, of)
        return paid if math.isfinite(paid) else math.inf


@dataclass(frozen=True)
class Row:
    """One attention in a task: length -> score.

    Attributes:
        remarks: what a reader must know of its figures.
    """

    attention: str
    role: Role
    scores: dict[int, Score]
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task and how every attention did in it, best first at the longest length.

    Attributes:
        name: of what is recalled, of the text, or of what a pretrained model is asked.
        higher: whether the more of the metric, the better.
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
        """Whether figures at the longest length have a range over seeds."""
        found = (row.scores.get(self.headline) for row in self.rows)
        return any(score and self.spread(score.quality) for score in found)

    @property
    def by_depth(self) -> bool:
        """Whether right answers are known by where they are to be found."""
        found = (score for row in self.rows for score in row.scores.values())
        return any("accuracy_by_depth" in score.curves for score in found)

    @property
    def trained(self) -> bool:
        """Whether models were trained for it, each with one attention."""
        return self.suite != "pretrained"

    @property
    def about(self) -> str:
        """The task in words."""
        record = task_registry.find(self.suite, self.name)
        if self.metric == "bits_per_byte":
            return f"{record.title if record else 'text'}, bits/B"
        return record.title if record else self.name

    @property
    def question(self) -> str:
        """What an example asks, in a sentence; empty for text."""
        record = task_registry.find(self.suite, self.name)
        return record.question if record else ""

    def items(self, length: int) -> float:
        """What there was to find at a length; NaN for text."""
        found = (row.scores[length].items for row in self.rows if length in row.scores)
        return next(found, math.nan)

    def score(self, attention: str, length: int) -> Score | None:
        found = (row.scores.get(length) for row in self.rows if row.attention == attention)
        return next(found, None)

    def resized(self, attention: str, length: int) -> bool:
        """Return whether a figure is of other settings than time, memory and pairs of its row.

        Those are of the longest length, and an attention may be sized anew for each.
        """
        score, cost = self.score(attention, length), self.score(attention, self.headline)
        return score is not None and cost is not None and score.settings != cost.settings

    def loss(self, score: Score | None) -> float:
        """Quality such that less is better; without a score it is the most."""
        if score is None:
            return math.inf
        return -score.quality.value if self.higher else score.quality.value

    def write(self, value: float) -> str:
        """``98%``, ``2.131`` or ``37.55``."""
        return WRITTEN.get(self.metric, formatting.format_number)(value)

    def spread(self, quality: Figure) -> str:
        """``93-98%``, empty with one seed."""
        if not (math.isfinite(quality.low) and math.isfinite(quality.high)):
            return ""
        return f"{self.write(quality.low).rstrip('%')}-{self.write(quality.high)}"

    def front(self, length: int, costs: Sequence[Cost] = ("speedup", "peak")) -> frozenset[str]:
        """The Pareto front: no other is as good in quality and all costs, and better in one.

        By the figures alone, whatever their intervals; those of a point are of one case.
        What is in doubt is not on it, and takes nobody's place there.
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
    """Return every task with figures: suite by suite, else as they come.

    Args:
        results: of one run.
        command: as it was typed.
        suites: what they say of themselves, as stored with the run.
    """
    measured = [r for r in results if r.case.task and r.status == "measured"]
    infos = suite_infos(measured, suites)
    by_task: dict[tuple[str, str], list[CaseResult]] = {}
    for result in measured:
        by_task.setdefault((result.case.suite, result.case.task), []).append(result)
    said = remarks(results)
    made = []
    for suite, info in infos.items():
        for name in (task for owner, task in by_task if owner == suite):
            judge = info.judge(name)
            if judge is not None and not judge.listed:
                made.append(_task(suite, name, judge, by_task[suite, name], command, said))
    return [task for task in made if task.rows]


def hardest(among: Sequence[Task], suite: str) -> Task | None:
    """Of the tasks of a suite the first that goes to the longest length."""
    return max((t for t in among if t.suite == suite), key=lambda t: t.headline, default=None)


def attentions(among: Sequence[Task]) -> dict[str, Role]:
    """All that have figures and their roles, best first in the first task, then in the next."""
    found = {row.attention: row.role for task in among for row in task.rows}

    def rank(name: str) -> tuple[float, ...]:
        return tuple(task.loss(task.score(name, task.headline)) for task in among)

    return {name: found[name] for name in sorted(found, key=rank)}


def _task(
    suite: str,
    name: str,
    judge: Metric,
    results: Sequence[CaseResult],
    command: str,
    said: Mapping[str, tuple[Remark, ...]],
) -> Task:
    metric, higher = judge.name, judge.better == "higher"
    scores: dict[str, dict[int, Score]] = {}
    for result in sorted(results, key=lambda r: r.case.length):
        score = _score(result, metric)
        if math.isfinite(score.quality.value):
            scores.setdefault(result.case.attention, {})[result.case.length] = score
    lengths = tuple(sorted({n for found in scores.values() for n in found}))
    rows = [Row(a, role(a, command), found, said.get(a, ())) for a, found in scores.items()]
    task = Task(suite, name, metric, higher, lengths, ())

    def rank(row: Row) -> tuple[float, ...]:
        """At the longest length; shorter ones decide between equals."""
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
