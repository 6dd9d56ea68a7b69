"""Comparison of two runs, or of two attentions of one run, case by case.

    comparison = compare_runs([RecordedRun.read(a)], [RecordedRun.read(b)])
    [(figure.case.id, figure.change.value) for figure in comparison.moved]

Speed-ups are tested beside the noise of the comparison (:mod:`danon.report.run_noise`). Figures
that are the same in every run of one code are compared as they are. All others are shown with the
reason why nothing is concluded from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

from danon.config.mechanism import mechanisms
from danon.report import run_noise
from danon.report.compared_metrics import CONTENDED, Pair, compared_metrics, read_figure
from danon.report.figure import NO_FIGURE, Figure
from danon.report.run_pool import Pooled, pool_runs
from danon.report.suite_infos import suite_infos
from danon.report.tables import mechanism
from danon.runs.case import REFERENCE, Case

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from danon.runs.case import CaseResult
    from danon.runs.journal import RecordedRun
    from danon.runs.suite_info import Metric

__all__ = ["Compared", "Comparison", "Unpaired", "compare_attentions", "compare_runs"]

Outcome = Literal["moved", "same", "untested"]
FIRST, SECOND = "the first run", "the second run"
UNFINISHED = ("RUNNING", "KILLED", "FAILED")


@dataclass(frozen=True)
class Compared:
    """One figure of a case on both sides.

    Attributes:
        case: the case; of two attentions, that of the first.
        metric: description of the figure.
        before: figure of the first side.
        after: figure of the second side.
        change: relative change, 0.2 for 20 % more; NaN where there is none. Its 95 % interval is of
            this figure alone.
        outcome: moved, same, or untested.
        reason: why it is untested; empty otherwise.
        p: chance after Holm's correction; NaN if the figure is not tested.
        least: least relative change of a tested figure that stands out; NaN for others.
    """

    case: Case
    metric: Metric
    before: Figure
    after: Figure
    change: Figure = NO_FIGURE
    outcome: Outcome = "untested"
    reason: str = ""
    p: float = math.nan
    least: float = math.nan

    @property
    def better(self) -> bool:
        """True if the figure changed in the direction that is better."""
        return (self.change.value > 0) == (self.metric.better == "higher")

    @property
    def size(self) -> float:
        """The size of the change, equal for twice and for half; 0 without one."""
        if math.isnan(self.change.value):
            return 0.0
        return abs(math.log1p(self.change.value)) if self.change.value > -1 else math.inf


@dataclass(frozen=True)
class Unpaired:
    """A case that has figures on one side only.

    Attributes:
        case: the case.
        reason: what the other side has in its place.
        detail: reason that the other side gives; empty if it lacks the case.
        broken: True if the case failed on one side and has figures on the other.
    """

    case: Case
    reason: str
    detail: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Comparison:
    """All figures of two sides.

    Attributes:
        names: headings of the two sides.
        runs: runs of both sides; of two attentions, the same one.
        differences: what else differs between the runs, a phrase each.
        figures: compared figures, in the order of measurement.
        unpaired: cases with figures on one side.
        unmeasured: cases without figures on both sides.
        doubtful: attentions with a doubtful case on either side.
        dense_change: median relative change of dense attention's own time; NaN on two machines.
    """

    names: tuple[str, str]
    runs: tuple[tuple[RecordedRun, ...], tuple[RecordedRun, ...]]
    differences: tuple[str, ...]
    figures: tuple[Compared, ...]
    unpaired: tuple[Unpaired, ...]
    unmeasured: tuple[Case, ...]
    doubtful: frozenset[str]
    dense_change: float

    @property
    def one_run(self) -> bool:
        """True for two attentions of one run."""
        return self.runs[0] is self.runs[1]

    @property
    def runs_by_name(self) -> list[tuple[str, tuple[RecordedRun, ...]]]:
        """The runs of each side by its heading; a single run is called so."""
        if self.one_run:
            return [("run", self.runs[0])]
        return list(zip(self.names, self.runs, strict=True))

    @property
    def moved(self) -> list[Compared]:
        """Figures that moved, the largest changes first."""
        return self._sorted("moved")

    @property
    def same(self) -> list[Compared]:
        """Figures that did not move, the largest changes first."""
        return self._sorted("same")

    @property
    def untested(self) -> list[Compared]:
        """Figures from which nothing is concluded, the largest changes first."""
        return self._sorted("untested")

    @property
    def broken(self) -> list[Unpaired]:
        """Cases that failed on one side only."""
        return [case for case in self.unpaired if case.broken]

    @property
    def tested(self) -> list[Compared]:
        """Figures that were tested beside noise."""
        return [figure for figure in self.figures if not math.isnan(figure.p)]

    @property
    def reasons(self) -> dict[str, int]:
        """Reasons why cases or figures cannot be compared, the most frequent first."""
        reasons = [case.reason for case in self.unpaired] + [x.reason for x in self.untested]
        return dict(Counter(reasons).most_common())

    def of(self, attention: str) -> Comparison:
        """Return the part about one attention.

        Args:
            attention: registered name.
        """
        return dataclasses.replace(
            self,
            figures=tuple(x for x in self.figures if x.case.attention == attention),
            unpaired=tuple(x for x in self.unpaired if x.case.attention == attention),
            unmeasured=tuple(case for case in self.unmeasured if case.attention == attention),
        )

    def _sorted(self, outcome: Outcome) -> list[Compared]:
        chosen = [figure for figure in self.figures if figure.outcome == outcome]
        # Times and quality before sizes and errors, whose changes have no noise beside them.
        return sorted(chosen, key=lambda x: (not math.isnan(x.p), x.size), reverse=True)


def compare_runs(
    before: Sequence[RecordedRun], after: Sequence[RecordedRun], attention: str = ""
) -> Comparison:
    """Compare two runs, or two groups of repeated runs.

    Args:
        before: the first run, or several of the same code and machine.
        after: the second run, or several.
        attention: registered name to keep; empty: all. Noise is learned from all.

    Raises:
        ValueError: a run is given twice, or none has an attention of that name.
    """
    runs = (*before, *after)
    ids = [run.info.run_id for run in runs]
    if twice := next((run for run in ids if ids.count(run) > 1), ""):
        raise ValueError(f"run {twice} is given twice: name two different runs")
    sides = [pool_runs(side) for side in (before, after)]
    if attention and not any(case.attention == attention for side in sides for case in side):
        raise _unknown(attention, *runs)
    comparison = _compare(("before", "after"), (tuple(before), tuple(after)), sides[0], sides[1])
    return comparison.of(attention) if attention else comparison


def compare_attentions(run: RecordedRun, first: str, second: str) -> Comparison:
    """Compare two attentions of one run.

    Args:
        run: the run.
        first: registered name.
        second: registered name, compared with the first.

    Raises:
        ValueError: the names are equal, or the run lacks one.
    """
    if first == second:
        raise ValueError(f"attention {first} is given twice: name two different attentions")
    sides = [
        {x.case: Pooled(x, (x,)) for x in run.results if x.case.attention == name}
        for name in (first, second)
    ]
    for name, side in zip((first, second), sides, strict=True):
        if not side:
            raise _unknown(name, run)
    beside = {dataclasses.replace(case, attention=first): x for case, x in sides[1].items()}
    runs = (run,)
    return _compare((first, second), (runs, runs), sides[0], beside)


def _unknown(name: str, *runs: RecordedRun) -> ValueError:
    known = dict.fromkeys(result.case.attention for run in runs for result in run.results)
    return ValueError(f"attention {name!r} is not recorded; recorded: {', '.join(known) or 'none'}")


def _compare(
    names: tuple[str, str],
    runs: tuple[tuple[RecordedRun, ...], tuple[RecordedRun, ...]],
    first: Mapping[Case, Pooled],
    second: Mapping[Case, Pooled],
) -> Comparison:
    one_run = runs[0] is runs[1]
    both = (*runs[0], *runs[1])
    infos = suite_infos(
        [x.result for side in (first, second) for x in side.values()],
        {name: suite for run in both for name, suite in run.info.suites.items()},
    )
    places = names if one_run else (FIRST, SECOND)
    same_seed = len({run.info.seed for run in both}) == 1
    figures, pairs = list[Compared](), list[Pair]()
    unpaired, unmeasured = list[Unpaired](), list[Case]()
    for case in dict.fromkeys((*first, *second)):
        found = first.get(case), second.get(case)
        one, other = (None if x is None else x.result for x in found)
        members = [() if x is None else x.members for x in found]
        if one is None or other is None or "measured" != one.status or "measured" != other.status:
            if lonely := _unpaired(case, (one, other), places):
                unpaired.append(lonely)
            else:
                unmeasured.append(case)
            continue
        machines = [_machine(x, side[0]) for x, side in zip((one, other), runs, strict=True)]
        pair = Pair(one, other, machines[0], machines[1], one_run, (members[0], members[1]))
        for metric in compared_metrics(infos[case.suite], pair):
            figures.append(_figure(pair, metric, same_seed))
            pairs.append(pair)
    return Comparison(
        names,
        runs,
        () if one_run else tuple(_differences(runs)),
        tuple(_tested(figures, pairs, learn_noise=not one_run)),
        tuple(unpaired),
        tuple(unmeasured),
        frozenset(
            case.attention
            for side in (first, second)
            for case, x in side.items()
            if CONTENDED in x.result.metrics
        ),
        math.nan if one_run else _dense_change(runs),
    )


def _machine(result: CaseResult, run: RecordedRun) -> Mapping[str, Any]:
    machine: Mapping[str, Any] = result.place.get("machine", run.info.fingerprint)
    return machine


def _unpaired(
    case: Case, sides: Sequence[CaseResult | None], places: Sequence[str]
) -> Unpaired | None:
    """Return the case if one side has figures of it; else None."""
    statuses = ["" if side is None else side.status for side in sides]
    if "measured" not in statuses:
        return None
    lacking = 1 - statuses.index("measured")
    status = statuses[lacking]
    if not status:
        return Unpaired(case, f"only in {places[1 - lacking]}")
    reason = f"{status} in {places[lacking]}"
    lacks = sides[lacking]
    return Unpaired(case, reason, lacks.reason if lacks else "", broken=status == "failed")


def _figure(pair: Pair, metric: Metric, same_seed: bool) -> Compared:
    """Return a figure of both sides; timed ones are tested later."""
    before, after = (read_figure(side, metric) for side in (pair.before, pair.after))
    change = Figure(after.value / before.value - 1) if before.value else NO_FIGURE
    if before.value == after.value:
        change = Figure(0.0)
    figure = Compared(pair.before.case, metric, before, after, change)
    if reason := pair.obstacle(metric, before, after, same_seed):
        return dataclasses.replace(figure, reason=reason)
    return dataclasses.replace(figure, outcome="moved" if pair.differs(before, after) else "same")


def _tested(
    figures: Sequence[Compared], pairs: Sequence[Pair], *, learn_noise: bool
) -> Iterator[Compared]:
    """Yield the figures, those with noise tested together."""
    testable = [
        (i, figure, pair)
        for i, (figure, pair) in enumerate(zip(figures, pairs, strict=True))
        if not figure.reason
    ]
    noisy = [(i, figure, pair) for i, figure, pair in testable if pair.is_noisy(figure.metric)]
    names = {figure.case.attention for figure in figures}
    changes = [
        run_noise.Change(
            math.log1p(figure.change.value),
            pair.error(figure.before, figure.after),
            (figure.case.suite, figure.metric.name),
            _family(figure.case.attention, names),
            pair.rounds,
            pair.repeated(figure.metric),
        )
        for _, figure, pair in noisy
    ]
    verdicts = dict(
        zip(
            (i for i, _, _ in noisy), run_noise.judge(changes, learn_noise=learn_noise), strict=True
        )
    )
    # On their own: answers are equal in equal runs, times are not.
    shares = [x for x in testable if x[0] not in verdicts and x[2].is_share(x[1].metric)]
    judged = [pair.share_change(figure.before, figure.after) for _, figure, pair in shares]
    chances = run_noise.adjust([verdict.p for verdict in judged])
    for (i, _, _), verdict, p in zip(shares, judged, chances, strict=True):
        verdicts[i] = dataclasses.replace(verdict, p=p)
    for index, figure in enumerate(figures):
        if index not in verdicts:
            yield figure
            continue
        verdict = verdicts[index]
        yield dataclasses.replace(
            figure,
            outcome="moved" if verdict.p < run_noise.SIGNIFICANT else "same",
            change=Figure(figure.change.value, math.expm1(verdict.low), math.expm1(verdict.high)),
            p=verdict.p,
            least=math.expm1(verdict.least),
        )


def _family(attention: str, names: set[str]) -> str:
    """Return a name that attentions of shared code have in common."""
    if mechanism(attention) in mechanisms():
        return "danon"
    return min(n for n in names if f"{attention}-".startswith(f"{n}-"))


def _dense_change(runs: Sequence[Sequence[RecordedRun]]) -> float:
    """Return the median relative change of dense attention's time on one machine."""
    times: list[dict[tuple[Case, Any], list[float]]] = [{}, {}]
    for known, side in zip(times, runs, strict=True):
        for run in side:
            for x in run.results:
                machine = _machine(x, run).get("id")
                if x.case.attention == REFERENCE and "time_s" in x.metrics and not x.case.task:
                    known.setdefault((x.case, machine), []).append(x.metrics["time_s"])
    changes = [
        median(times[1][place]) / median(seconds) - 1
        for place, seconds in times[0].items()
        if place in times[1] and place[1] is not None
    ]
    return median(changes) if changes else math.nan


def _differences(runs: Sequence[Sequence[RecordedRun]]) -> Iterator[str]:
    """Yield what differs between the first run and any other, beside their figures."""
    both = [run for side in runs for run in side]
    one, said = both[0].info, set[str]()
    for other in (run.info for run in both[1:]):
        facts = [(name, getattr(one, name), getattr(other, name)) for name in ("profile", "seed")]
        for kind, here, there in (
            ("", one.fingerprint, other.fingerprint),
            ("package ", one.versions, other.versions),
        ):
            names = dict.fromkeys((*here, *there))
            facts += [(kind + n, here.get(n, "none"), there.get(n, "none")) for n in names]
        differ = [f"{n} {x} and {y}" for n, x, y in facts if x != y and n != "id"]
        yield from (text for text in differ if text not in said)
        said |= set(differ)
    for place, side in zip((FIRST, SECOND), runs, strict=True):
        for run in side:
            if run.status in UNFINISHED:
                name = place if len(side) == 1 else f"{run.info.run_id}, of {place}s,"
                yield f"{name} is {run.status}: it may lack cases"
