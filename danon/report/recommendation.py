"""Which attention to take, from recorded figures alone: nothing is guessed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from danon.measure.machines import comparable, similar
from danon.measure.proportions import difference_interval
from danon.report import configuration, formatting, provenance, quality_tables, tables
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
"""What an attention may lose against dense: share of answers; bits and perplexity relative."""
LEARNED = 0.9
"""Right answers of dense attention, below which a training says nothing about the others."""

Finding = Literal["as good", "worse", "cannot tell", "not measured"]
"""What the records say of an attention's quality beside dense attention's."""


@dataclass(frozen=True)
class Option:
    """One attention, with the settings that its speed was measured with.

    Attributes:
        speedup: over dense attention, at the length asked for.
        peak: bytes there (of decoding: of the state); NaN if not measured with these settings.
        semantics: what it computes with these settings.
        config: the settings; empty if not recorded.
        score: in the task, which may be of other settings or of another length; None if there is
            none.
        finding: what the score says of these settings at this length.
        doubts: why the score does not tell, in words.
        other_settings: the score is not known to be of these settings.
        remarks: what a reader must know; some are doubts, and then it is not recommended.
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
        """Whether the records show that it loses no more against dense than :data:`MAX_LOSS`."""
        return self.finding == "as good"


@dataclass(frozen=True)
class Recommendation:
    """The answer and what it rests on.

    Attributes:
        best: the fastest that fits, is as good and not in doubt; None if there is none.
        options: all with a speed at this length, the fastest first.
        missing: what is not measured, in words.
        costs: the run that speed and memory come from.
        judged: the run that quality comes from, its task, and the length it was judged at.
        machines: fingerprints of those that measured the speed.
        similar: these machines are like this one in what decides speed.
        lengths: tokens at which the phase was measured on a machine that compares.
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
        """Options that may be better than the best one, if more were known of them."""
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
        known = sum(not math.isnan(option.peak) for option in self.options)
        return self.similar, known, len(self.options)


def recommend(
    runs: Iterable[Run],
    *,
    length: int,
    memory_bytes: float,
    task: str,
    phase: str,
    here: Sequence[Machine],
) -> Recommendation:
    """Choose among what was measured.

    Speed, memory and quality of an option are of one configuration. Quality that was measured with
    other settings, or at another length, is shown and decides nothing.

    Args:
        runs: recorded runs, those to prefer first.
        length: tokens N.
        memory_bytes: peak of one call beyond its inputs, at most.
        task: ``recall``, ``language``, ``pretrained``, or the name of a task of theirs.
        phase: forward, forward+backward or decode.
        here: fingerprints of the machine that it is for, one a device. Runs of machines like it are
            preferred; runs whose speeds do not compare with it are not taken.

    Raises:
        ValueError: no run has the task; the message lists what they have.
    """
    known = list(runs)
    tasks = _tasks(known, task)
    lengths: set[int] = set()
    found, incomparable = [], []
    for info, results in known:
        machines = tuple(provenance.machine_fingerprints(results, info))
        speeds = [r for r in results if _is_speed(r, phase)]
        if not all(any(comparable(one, other) for other in here) for one in machines):
            incomparable += [info] if any(r.case.length == length for r in speeds) else []
            continue
        lengths |= {r.case.length for r in speeds}
        alike = all(any(similar(one, other) for other in here) for one in machines)
        for view, options, digests in _views(results, length, phase, memory_bytes):
            found.append(_Costs(info, view, options, digests, machines, alike))
    if not found:
        judged = max(
            ((info, one, one.headline) for info, one in tasks),
            key=lambda some: (len(some[1].rows), some[2]),
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
    costs = max(found, key=lambda some: some.rank)
    judged, options = _judged(costs, tasks, length)
    asked = {costs.info.run_id, *([judged[0].run_id] if judged else [])}
    said = remarks(r for run, results in known if run.run_id in asked for r in results)
    options = tuple(replace(option, remarks=said.get(option.attention, ())) for option in options)
    seen = dict.fromkeys(r.case.attention for _, results in known for r in results)
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
    """Yield each view with a speed at a length, its options the fastest first, their digests."""
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
    """Return what was asked for, of every run in which dense attention can do it.

    Raises:
        ValueError: no run has the task.
    """
    names: set[str] = set()
    found = []
    for info, results in runs:
        known = quality_tables.tasks(results, info.command, info.suites)
        names |= {name for t in known for name in (t.suite, t.name)}
        # Lookups are asked for by name: with settings for speed they answer another question.
        wanted = [t for t in known if task == t.name or (task == t.suite and t.name != LOOKUP)]
        found += [(info, t) for t in wanted]
    if not found and names and task not in names | quality_tables.known_tasks():
        raise ValueError(f"task {task!r}: must be one of {', '.join(sorted(names))}")
    return [(info, t) for info, t in found if any(_tells(t, n) for n in t.lengths)]


def _tells(task: Task, length: int) -> bool:
    """Whether dense attention was judged in it, and can do it: nobody could say what is lost."""
    dense = task.score(REFERENCE, length)
    return dense is not None and (not task.higher or dense.quality.value >= LEARNED)


def _judged(
    costs: _Costs, tasks: Sequence[tuple[RunInfo, Task]], length: int
) -> tuple[tuple[RunInfo, Task, int] | None, tuple[Option, ...]]:
    """Return the task that tells most of the options, and the options with what it tells."""
    found = []
    for info, task in tasks:
        at = max((n for n in task.lengths if _tells(task, n)), key=lambda n: (n == length, n))
        options = tuple(_with_score(option, costs, task, at, length) for option in costs.options)
        others = [option for option in options if option.attention != REFERENCE]
        rank = (
            sum(option.finding in ("as good", "worse") for option in others),
            sum(option.score is not None for option in others),
            at,
        )
        found.append((rank, (info, task, at), options))
    if not found:
        return None, costs.options
    _, judged, options = max(found, key=lambda some: some[0])
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
        said = f"{task.name} was measured with other settings: {score.semantics or 'not stated'}"
        doubts.append(f"{said}, {task.write(score.quality.value)}")
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


def _loss(task: Task, own: Score, dense: Score) -> tuple[float, float] | None:
    """Return the least and the most that is lost against dense; None where nothing says so.

    Of questions that both were asked it is a 95 % interval. Of trained models it is between the
    worst seed of one and the best seed of the other.
    """
    if math.isfinite(own.answers):
        return difference_interval(int(own.lost), int(own.gained), int(own.answers))
    if not (own.seeds > 1 and dense.seeds > 1):
        return None
    a, b = own.quality, dense.quality
    if task.higher:
        return b.low - a.high, b.high - a.low
    return a.low / b.high - 1, a.high / b.low - 1
