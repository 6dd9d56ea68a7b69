"""Recommendation of an attention, from recorded figures alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from danon.measure.machines import comparable, similar
from danon.measure.proportions import difference_interval
from danon.report import configuration, formatting, quality_tables, run_origin, tables
from danon.report.figure import Figure
from danon.report.quality_tables import LOOKUP
from danon.report.remarks import Remark, doubtful, remarks
from danon.report.tables import REFERENCE, View

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from danon.report.quality_tables import Score, Task
    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

    Run = tuple[RunInfo, Sequence[CaseResult]]
    Machine = Mapping[str, Any]

__all__ = ["Finding", "Option", "Recommendation", "recommend"]

MAX_LOSS = {"accuracy": 0.01, "bits_per_byte": 0.015, "perplexity": 0.05}
"""Allowed loss against dense attention: share of answers; relative bits and perplexity."""
LEARNED = 0.9
"""Least accuracy of dense attention at which a task can compare attentions."""

Finding = Literal["as good", "worse", "cannot tell", "not measured"]
"""Quality of an attention beside dense attention's, by the records."""


@dataclass(frozen=True)
class Option:
    """One attention, with the settings that its speed was measured with.

    Attributes:
        attention: registered name.
        speedup: speed-up over dense attention at the requested length.
        peak: peak bytes there (in decoding: bytes of the state); NaN if not measured with these
            settings.
        fits: True if the peak is within the allowed memory.
        semantics: description of the attention with these settings.
        config: settings; empty if not recorded.
        score: score in the task, possibly with other settings or at another length; None without
            one.
        finding: conclusion from the score for these settings at this length.
        doubts: reasons why the score does not decide, in words.
        other_settings: True if the score is not recorded to have these settings.
        remarks: notes on its figures; an attention with a doubt is not recommended.
    """

    attention: str
    speedup: Figure
    peak: float
    fits: bool
    semantics: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    score: Score | None = None
    finding: Finding = "not measured"
    doubts: tuple[str, ...] = ()
    other_settings: bool = False
    remarks: tuple[Remark, ...] = ()

    @property
    def good(self) -> bool:
        """True if the records show a loss against dense attention of at most :data:`MAX_LOSS`."""
        return self.finding == "as good"


@dataclass(frozen=True)
class Recommendation:
    """A recommendation, and the records it is based on.

    Attributes:
        best: the fastest option that fits, is as good and not in doubt; None without one.
        options: all attentions with a speed at this length, the fastest first.
        missing: missing measurements, in words.
        costs: run and view of speed and memory.
        judged: run, task and length of the quality.
        machines: fingerprints of the machines that measured the speed.
        similar: True if these machines are like this one in what decides speed.
        lengths: lengths at which the phase was measured on a comparable machine, in tokens.
        incomparable: runs whose speeds do not compare with this machine's.
    """

    best: Option | None
    options: tuple[Option, ...]
    missing: tuple[str, ...]
    costs: tuple[RunInfo, View] | None
    judged: tuple[RunInfo, Task, int] | None
    machines: tuple[Machine, ...] = ()
    similar: bool = False
    lengths: tuple[int, ...] = ()
    incomparable: tuple[RunInfo, ...] = ()

    @property
    def undecided(self) -> tuple[Option, ...]:
        """Options that may be better than the best one, but lack measurements."""
        ahead = self.options[: self.options.index(self.best)] if self.best else self.options
        return tuple(
            option
            for option in ahead
            if option.attention != REFERENCE
            and (
                (option.finding == "cannot tell" and (option.fits or math.isnan(option.peak)))
                or (option.good and math.isnan(option.peak))
            )
        )


@dataclass(frozen=True)
class _Costs:
    """Speed and memory of one view of one run."""

    info: RunInfo
    view: View
    options: tuple[Option, ...]
    digests: Mapping[str, str]
    machines: tuple[Machine, ...]
    similar: bool

    @property
    def rank(self) -> tuple[bool, int, int]:
        peaks = sum(not math.isnan(option.peak) for option in self.options)
        return self.similar, peaks, len(self.options)


def recommend(
    runs: Iterable[Run],
    *,
    length: int,
    memory_bytes: float,
    task: str,
    phase: str,
    here: Sequence[Machine],
) -> Recommendation:
    """Recommend an attention from recorded runs.

    Speed, memory and quality of an option have the same configuration. Quality measured with other
    settings or at another length is shown, but decides nothing.

    Args:
        runs: recorded runs, the preferred ones first.
        length: tokens N.
        memory_bytes: most peak bytes of one call beyond its inputs.
        task: ``recall``, ``language``, ``pretrained``, or the name of one of their tasks.
        phase: ``forward``, ``forward+backward`` or ``decode``.
        here: fingerprints of the target machine, one a device. Runs of similar machines are
            preferred; runs of machines that do not compare are ignored.

    Returns:
        The best option, all options, and the missing measurements.

    Raises:
        ValueError: no run has the task; the message lists the recorded ones.
    """
    runs = list(runs)
    tasks = _tasks(runs, task)
    lengths: set[int] = set()
    candidates, incomparable = [], []
    for info, results in runs:
        machines = tuple(run_origin.machine_fingerprints(results, info))
        speeds = [r for r in results if _is_speed(r, phase)]
        if not all(any(comparable(one, other) for other in here) for one in machines):
            incomparable += [info] if any(r.case.length == length for r in speeds) else []
            continue
        lengths |= {r.case.length for r in speeds}
        alike = all(any(similar(one, other) for other in here) for one in machines)
        for view, options, digests in _views(results, length, phase, memory_bytes):
            candidates.append(_Costs(info, view, options, digests, machines, alike))
    if not candidates:
        judged = max(
            ((info, one, one.headline) for info, one in tasks),
            key=lambda item: (len(item[1].rows), item[2]),
            default=None,
        )
        return Recommendation(
            None,
            (),
            (f"{phase} at {length} tokens",),
            None,
            judged,
            lengths=tuple(sorted(lengths)),
            incomparable=tuple(incomparable),
        )
    costs = max(candidates, key=lambda item: item.rank)
    judged, options = _judged(costs, tasks, length)
    used = {costs.info.run_id, *([judged[0].run_id] if judged else [])}
    notes = remarks(r for run, results in runs if run.run_id in used for r in results)
    options = tuple(replace(option, remarks=notes.get(option.attention, ())) for option in options)
    seen = dict.fromkeys(r.case.attention for _, results in runs for r in results)
    measured = {option.attention for option in options}
    lacking = {
        f"{phase} at {length} tokens": [name for name in seen if name not in measured],
        f"memory at {length} tokens": [o.attention for o in options if math.isnan(o.peak)],
        task: [o.attention for o in options if o.score is None],
    }
    missing = [f"{what}: {', '.join(of)}" for what, of in lacking.items() if of]
    sure = [option for option in options if not doubtful(option.remarks)]
    best = next((option for option in sure if option.fits and option.good), None)
    return Recommendation(
        best,
        options,
        tuple(missing),
        (costs.info, costs.view),
        judged,
        costs.machines,
        costs.similar,
        tuple(sorted(lengths)),
        tuple(incomparable),
    )


def _is_speed(result: CaseResult, phase: str) -> bool:
    suite = "decode" if phase == "decode" else "speed"
    case = result.case
    return (case.suite, case.phase, result.status) == (suite, phase, "measured")


def _views(
    results: Sequence[CaseResult], length: int, phase: str, memory_bytes: float
) -> Iterator[tuple[View, tuple[Option, ...], dict[str, str]]]:
    """Yield each view with a speed at a length, its options, fastest first, and their digests."""
    data = tables.table(results)
    for view in (v for v in tables.views(data) if v.phase == phase):
        (speed, ratio), (memory, peak) = (
            view.source("speed", "speedup"),
            view.source("memory", "peak_bytes"),
        )
        curves = tables.Curves(view.of(data))
        of = {(r.case.suite, r.case.attention): r for r in results if view.has(r.case, length)}
        options, digests = [], {}
        for name in dict.fromkeys(attention for suite, attention in of if suite == speed):
            faster = curves.get(speed, name, ratio).get(length)
            if faster is None:
                continue
            timed, weighed = of[speed, name], of.get((memory, name))
            digests[name] = configuration.digest(timed)
            bytes_ = curves.get(memory, name, peak).get(length, Figure(math.nan)).value
            if weighed is None or not configuration.same(
                digests[name], configuration.digest(weighed)
            ):
                bytes_ = math.nan
            options.append(
                Option(
                    name, faster, bytes_, bytes_ <= memory_bytes, timed.semantics, {**timed.config}
                )
            )
        options.sort(key=lambda option: -option.speedup.value)
        if options:
            yield view, tuple(options), digests


def _tasks(runs: Sequence[Run], task: str) -> list[tuple[RunInfo, Task]]:
    """Return the requested tasks of every run in which dense attention solves them.

    Raises:
        ValueError: no run has the task.
    """
    names: set[str] = set()
    matches = []
    for info, results in runs:
        tasks = quality_tables.tasks(results, info.command, info.suites)
        names |= {name for t in tasks for name in (t.suite, t.name)}
        # Lookups need their own name: with settings for speed they answer another question.
        matches += [
            (info, t) for t in tasks if task == t.name or (task == t.suite and t.name != LOOKUP)
        ]
    if not matches and names and task not in names | quality_tables.known_tasks():
        raise ValueError(f"task {task!r}: must be one of {', '.join(sorted(names))}")
    return [(info, t) for info, t in matches if any(_solved(t, n) for n in t.lengths)]


def _solved(task: Task, length: int) -> bool:
    """Return True if dense attention solves the task; without that no loss can be measured."""
    dense = task.score(REFERENCE, length)
    return dense is not None and (not task.higher or dense.quality.value >= LEARNED)


def _judged(
    costs: _Costs, tasks: Sequence[tuple[RunInfo, Task]], length: int
) -> tuple[tuple[RunInfo, Task, int] | None, tuple[Option, ...]]:
    """Return the task that decides most options, and the options with their scores in it."""
    candidates = []
    for info, task in tasks:
        at = max((n for n in task.lengths if _solved(task, n)), key=lambda n: (n == length, n))
        options = tuple(_with_score(option, costs, task, at, length) for option in costs.options)
        others = [option for option in options if option.attention != REFERENCE]
        rank = (
            sum(option.finding in ("as good", "worse") for option in others),
            sum(option.score is not None for option in others),
            at,
        )
        candidates.append((rank, (info, task, at), options))
    if not candidates:
        return None, costs.options
    _, judged, options = max(candidates, key=lambda item: item[0])
    return judged, options


def _with_score(option: Option, costs: _Costs, task: Task, at: int, length: int) -> Option:
    score, dense = task.score(option.attention, at), task.score(REFERENCE, at)
    assert dense is not None
    if option.attention == REFERENCE:
        return dataclasses.replace(option, score=score, finding="as good")
    if score is None:
        return option
    doubts = []
    digest = costs.digests[option.attention]
    other = not configuration.same(digest, score.settings)
    if other and digest and score.settings:
        text = f"{task.name} was measured with other settings: {score.semantics or 'not stated'}"
        doubts.append(f"{text}, {task.write(score.quality.value)}")
    elif other:
        doubts.append("its settings are not recorded")
    if at != length:
        doubts.append(f"judged at {formatting.format_length(at)} tokens")
    lost, allowed = _loss(task, score, dense), MAX_LOSS[task.metric]
    if lost is None:
        doubts.append("one seed" if task.trained else "no interval is recorded")
    elif lost[0] <= allowed < lost[1]:
        doubts.append(
            f"the intervals overlap: it loses {lost[0]:.1%} to {lost[1]:.1%}, "
            f"at most {allowed:.1%} is allowed"
        )
    if doubts:
        return dataclasses.replace(
            option, score=score, finding="cannot tell", doubts=tuple(doubts), other_settings=other
        )
    assert lost is not None
    good = lost[1] <= allowed
    return dataclasses.replace(option, score=score, finding="as good" if good else "worse")


def _loss(task: Task, score: Score, dense: Score) -> tuple[float, float] | None:
    """Return the bounds of the loss against dense attention; None without an interval.

    For questions that both answered, it is a 95 % interval. For trained models, it is the range
    between the worst seed of one and the best seed of the other.
    """
    if math.isfinite(score.answers):
        return difference_interval(int(score.lost), int(score.gained), int(score.answers))
    if not (score.seeds > 1 and dense.seeds > 1):
        return None
    a, b = score.quality, dense.quality
    if task.higher:
        return b.low - a.high, b.high - a.low
    return a.low / b.high - 1, a.high / b.low - 1
