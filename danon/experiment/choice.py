"""Which attention to take, from recorded figures alone: nothing is guessed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from danon.experiment import frame, places, quality
from danon.experiment.frame import REFERENCE, Curves, Figure, View
from danon.experiment.quality import LOOKUP

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from danon.experiment.quality import Score, Task
    from danon.experiment.runs import RunInfo
    from danon.measure.case import CaseResult

    Run = tuple[RunInfo, Sequence[CaseResult]]
    Configs = Mapping[tuple[str, str, int], Mapping[str, Any]]
    """By suite, attention and length."""
    Machines = tuple[Mapping[str, Any], ...]

__all__ = ["Choice", "Option", "choose"]

LOSS = {"accuracy": 0.01, "bits_per_byte": 0.015, "perplexity": 0.05}
"""What an attention may lose against dense: share of answers; bits and perplexity relative."""
LEARNED = 0.9
"""Right answers of dense attention, below which a training says nothing about the others."""


@dataclass(frozen=True)
class Option:
    """One attention.

    Attributes:
        speedup: over dense attention, at the length asked for.
        peak: bytes there (of decoding: of the state); NaN if not measured.
        score: in the task, at the longest length it was judged at; None if not measured.
        fits: within the memory.
        good: loses no more against dense than :data:`LOSS`.
        config: that the speed was measured with; empty if not recorded.
    """

    attention: str
    speedup: Figure
    peak: float
    score: Score | None
    fits: bool
    good: bool
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The answer and what it rests on.

    Attributes:
        best: the fastest that fits and is good; None if there is none.
        options: all with a speed at this length, the fastest first.
        missing: what is not measured, in words.
        costs: the run that speed and memory come from.
        machines: fingerprints of those that measured it.
        judged: the run that quality comes from, and its task.
    """

    best: Option | None
    options: tuple[Option, ...]
    missing: tuple[str, ...]
    costs: tuple[RunInfo, View] | None
    judged: tuple[RunInfo, Task] | None
    machines: tuple[Mapping[str, Any], ...] = ()


def choose(
    runs: Iterable[Run], *, length: int, memory_bytes: float, task: str, phase: str, machine: str
) -> Choice:
    """Choose among what was measured.

    Args:
        runs: recorded runs, those to prefer first.
        length: tokens N.
        memory_bytes: peak of one call beyond its inputs, at most.
        task: ``recall``, ``language``, ``pretrained``, or the name of a task of theirs.
        phase: forward, forward+backward or decode.
        machine: id of a fingerprint, whose runs are preferred.

    Raises:
        ValueError: no run has the task; the message lists what they have.
    """
    known = list(runs)
    judged = _judged(known, task)
    costs = _costs(known, length, phase, machine)
    if costs is None:
        return Choice(None, (), (f"{phase} at {length} tokens",), None, judged)
    info, view, curves, names, configs, machines = costs
    speed, memory = view.source("speed", "speedup"), view.source("memory", "peak_bytes")
    options = []
    for name in names:
        faster = curves.get(speed[0], name, speed[1]).get(length)
        if faster is None:
            continue
        peak = curves.get(memory[0], name, memory[1]).get(length, Figure(math.nan)).value
        score = judged[1].score(name, judged[1].headline) if judged else None
        good = judged is not None and _good(judged[1], score)
        config = configs.get((speed[0], name, length), {})
        options.append(Option(name, faster, peak, score, peak <= memory_bytes, good, config))
    options.sort(key=lambda option: -option.speedup.value)
    seen = dict.fromkeys(r.case.attention for _, results in known for r in results)
    lacking = {
        f"{phase} at {length} tokens": [name for name in seen if name not in names],
        f"memory at {length} tokens": [o.attention for o in options if math.isnan(o.peak)],
        task: [o.attention for o in options if o.score is None],
    }
    missing = [f"{what}: {', '.join(of)}" for what, of in lacking.items() if of]
    best = next((option for option in options if option.fits and option.good), None)
    return Choice(best, tuple(options), tuple(missing), (info, view), judged, machines)


def _judged(runs: Sequence[Run], task: str) -> tuple[RunInfo, Task] | None:
    """The run with most attentions in a task, of equals the one that goes to the longest length."""
    names: set[str] = set()
    found = []
    for info, results in runs:
        known = quality.tasks(results, info.command)
        names |= {name for t in known for name in (t.suite, t.name)}
        # Lookups are asked for by name: with settings for speed they answer another question.
        wanted = [t for t in known if task == t.name or (task == t.suite and t.name != LOOKUP)]
        found += [(info, t) for t in wanted if _tells(t)]
    if not found and names and task not in names:
        raise ValueError(f"task {task!r}: must be one of {', '.join(sorted(names))}")
    return max(found, key=lambda pair: (len(pair[1].rows), pair[1].headline), default=None)


def _tells(task: Task) -> bool:
    """Whether dense attention was judged in it, and can do it: nobody could say what is lost."""
    dense = task.score(REFERENCE, task.headline)
    return dense is not None and (not task.higher or dense.quality.value >= LEARNED)


def _costs(
    runs: Sequence[Run], length: int, phase: str, machine: str
) -> tuple[RunInfo, View, Curves, list[str], Configs, Machines] | None:
    """The run all of this machine, else another one, with most speeds at a length and phase."""
    found = []
    for info, results in runs:
        data, machines = frame.table(results), tuple(places.fingerprints(results, info))
        here = all(some.get("id") == machine for some in machines)
        for view in (v for v in frame.views(data) if v.phase == phase):
            rows = view.of(data)
            curves, names = Curves(rows), list(dict.fromkeys(rows["attention"]))
            suite, metric = view.source("speed", "speedup")
            having = [n for n in names if length in curves.get(suite, n, metric)]
            rank = here, len(having)
            if having:
                configs = {
                    (c.suite, c.attention, c.length): result.config
                    for result in results
                    if (c := result.case).phase == view.phase and c.dtype == view.dtype
                }
                found.append((rank, (info, view, curves, having, configs, machines)))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _good(task: Task, score: Score | None) -> bool:
    dense = task.score(REFERENCE, task.headline)
    if score is None or dense is None:
        return False
    if task.higher:
        return score.quality.value >= dense.quality.value - LOSS[task.metric]
    return score.quality.value <= dense.quality.value * (1 + LOSS[task.metric])
