"""Create and resume studies, and read how far they are."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from danon.tracking.store import exclusive
from danon.tuning.objective import Objective
from danon.tuning.storage import experimental
from danon.tuning.subject import Subject

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = [
    "ERROR",
    "FIRST",
    "HISTORY",
    "ORIGIN",
    "REPEAT_INDEX",
    "REPEAT_OF",
    "SURPLUS",
    "Plan",
    "Progress",
    "StudyError",
    "begin",
    "distributions",
    "enqueue",
    "figures_of",
    "make_sampler",
    "plan_of",
    "progress",
    "resume",
]

PLAN = "danon"
"""Attribute of a study: its plan."""
ERROR, HISTORY, ORIGIN = "error", "history", "origin"
"""Attributes of a trial: why it failed, its figures by step, commit and machine."""
FIRST = "first"
"""Attribute of a trial that is measured to the end, whatever its first figures are."""
REPEAT_OF, REPEAT_INDEX = "again", "turn"
"""Attributes of a repeat: the number of the trial it repeats, and which of its repeats it is."""
SURPLUS = "surplus"
"""Attribute of a trial that several workers began although only one was still needed."""
STARTUP_TRIALS = 10
"""Random trials before the sampler uses what it knows."""


class StudyError(RuntimeError):
    """A study that cannot be created, found or resumed; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Facts that all trials of a study have in common; the study stores them.

    Attributes:
        kind: name of the kind of study.
        attention: registered name, or ``file.py:Class``.
        objectives: see :class:`Objective`; so are ``limits``.
        length: tokens.
        dtype: type of the numbers.
        device: ``cpu`` or ``cuda``.
        sampler: ``tpe`` or ``random``.
        seed: seed of the sampler, and of what is measured.
        space: ranges, in JSON.
        known: objectives that the figures of a trial cover.
    """

    kind: str
    attention: str
    objectives: tuple[str, ...]
    limits: Mapping[str, float]
    length: int
    dtype: str
    device: str
    sampler: str
    seed: int
    space: str = ""
    known: tuple[str, ...] = ()

    @property
    def subject(self) -> Subject:
        """Attention and inputs that the trials measure."""
        return Subject(self.kind, self.attention, self.device, self.length, self.dtype)

    @property
    def objective(self) -> Objective:
        """Figures to minimise, and limits to keep."""
        return Objective(self.objectives, self.limits, self.known)

    @property
    def name(self) -> str:
        """Default name of a study with this plan."""
        attention = self.attention.rpartition(":")[2]
        parts = [self.kind, attention, "+".join(self.objectives), f"N{self.length}", self.dtype]
        parts += [f"{name}<={bound:g}" for name, bound in sorted(self.limits.items())]
        parts += [self.device] if self.device != "cpu" else []
        parts += [f"{self.sampler}{self.seed}"] if (self.sampler, self.seed) != ("tpe", 0) else []
        return "-".join(parts)

    @property
    def choices(self) -> float:
        """Number of choices in the space; infinite with a range of numbers."""
        ranges = json.loads(self.space).values()
        return math.prod(
            len(values["values"]) if values["kind"] == "Categorical" else math.inf
            for values in ranges
        )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan with these fields, as a study stores them."""
        lists = {name: tuple(values[name]) for name in ("objectives", "known")}
        return cls(**{**values, **lists})


@dataclass
class Progress:
    """Numbers of trials by their state.

    Attributes:
        complete: trials that were measured to the end.
        pruned: trials that ended early, because they could not be the best.
        failed: trials that raised an error.
        running: trials at work, or whose worker died without notice.
        repeating: running repeats of a choice.
        waiting: trials in the queue.
        died: trials that ended with their worker; they are tried again.
        repeats: complete repeats of a choice.
        choices: different choices that finished.
    """

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    repeating: int = 0
    waiting: int = 0
    died: int = 0
    repeats: int = 0
    choices: int = 0

    @property
    def finished(self) -> int:
        """Trials that a budget counts: complete, pruned or failed."""
        return self.complete + self.pruned + self.failed


def begin(plan: Plan, name: str, storage: RDBStorage, first: Iterable[Mapping[str, Any]]) -> Study:
    """Create the study of a plan, or load it as far as it is.

    Args:
        plan: what its trials have in common.
        name: name of the study.
        storage: database to keep it in.
        first: choices to measure first, unless it has them.

    Raises:
        StudyError: a study of another plan has the name.
    """
    import optuna

    directions = [optuna.study.StudyDirection.MINIMIZE] * len(plan.objectives)
    with exclusive(storage.url):  # of two that begin, one could find a study without a plan
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions, load_if_exists=True
        )
        _check_directions(study, len(plan.objectives))
        if PLAN not in study.user_attrs and not study.get_trials(deepcopy=False):
            study.set_user_attr(PLAN, asdict(plan))
            with experimental():
                study.set_metric_names(list(plan.objectives))
        stored, asked = asdict(plan_of(study)), asdict(plan)
        for field, value in stored.items():
            if asked[field] != value:
                words = f"{field} = {_short(value)}, not {_short(asked[field])}"
                if field == "space":
                    words = f"another space: {differing(value, asked[field])}"
                raise StudyError(
                    f"study {name!r} has {words}: give another --study, or the same options"
                )
        for choice in first:
            enqueue(study, choice, first=True)
    return study


def resume(name: str, storage: RDBStorage) -> Study:
    """Load a study that exists.

    Args:
        name: name of the study.
        storage: database that holds it.

    Raises:
        StudyError: there is none of that name, or danon did not make it; lists those there are.
    """
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        others = ", ".join(sorted(optuna.get_all_study_names(storage)))
        raise StudyError(f"no study {name!r}; there are: {others or 'none'}") from None
    _check_directions(study, len(plan_of(study).objectives))
    return study


def _check_directions(study: Study, objectives: int) -> None:
    """Refuse a study, perhaps made by hand, that does not minimize each objective.

    Raises:
        StudyError: it maximizes something, or has another number of objectives.
    """
    directions = [direction.name.lower() for direction in study.directions]
    if directions != ["minimize"] * objectives:
        raise StudyError(
            f"study {study.study_name!r} is to {', '.join(directions)}: must be to "
            f"{', '.join(['minimize'] * objectives)}; give another --study, or delete this one"
        )


def plan_of(study: Study) -> Plan:
    """Return the plan that a study stores.

    Raises:
        StudyError: danon did not make the study.
    """
    values = study.user_attrs.get(PLAN)
    if values is None:
        raise StudyError(f"study {study.study_name!r} is not one of danon's")
    return Plan.read(values)


def make_sampler(plan: Plan, study: Study, worker: str) -> BaseSampler:
    """Return the sampler that draws the next choices.

    The number of trials is part of its seed, so that a resumed study does not draw its choices
    again. The worker's name is, too: two workers that begin at once draw different choices.
    """
    import optuna

    seed = zlib.crc32(f"{plan.seed} {len(study.get_trials(deepcopy=False))} {worker}".encode())
    if plan.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def distributions(space: str) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions of the ranges of a space, given in JSON."""
    from optuna import distributions as d

    made: dict[str, BaseDistribution] = {}
    for name, values in json.loads(space).items():
        if values["kind"] == "Categorical":
            made[name] = d.CategoricalDistribution(values["values"])
        else:
            made[name] = d.FloatDistribution(values["low"], values["high"], log=values["log"])
    return made


def enqueue(
    study: Study,
    choice: Mapping[str, Any],
    *,
    repeat_of: int | None = None,
    repeat_index: int = 0,
    first: bool = False,
) -> None:
    """Put a choice into the queue of trials.

    Args:
        study: the study.
        choice: a value for each range of the space.
        repeat_of: number of the trial that measured it before; None for a first measurement.
        repeat_index: which repeat it is. Repeats with one index share their random questions, and
            a process if they can.
        first: measure it to the end, and only if it was never asked for.
    """
    attributes: dict[str, Any] = {}
    if repeat_of is not None:
        attributes = {REPEAT_OF: repeat_of, REPEAT_INDEX: repeat_index}
    attributes |= {FIRST: True} if first else {}
    study.enqueue_trial(dict(choice), user_attrs=attributes, skip_if_exists=first)


def progress(study: Study) -> Progress:
    """Count the trials of a study."""
    from optuna.trial import TrialState

    done, different = Progress(), set()
    for trial in study.get_trials(deepcopy=False):
        if SURPLUS in trial.user_attrs:
            continue
        if trial.state == TrialState.RUNNING:
            done.running += 1
            done.repeating += REPEAT_OF in trial.user_attrs
        elif trial.state == TrialState.WAITING:
            done.waiting += 1
        elif trial.state == TrialState.FAIL and ERROR not in trial.user_attrs:
            done.died += 1
        else:
            different.add(json.dumps(trial.params, sort_keys=True))
            if REPEAT_OF in trial.user_attrs:
                done.repeats += trial.state == TrialState.COMPLETE
            elif trial.state == TrialState.COMPLETE:
                done.complete += 1
            elif trial.state == TrialState.PRUNED:
                done.pruned += 1
            else:
                done.failed += 1
    done.choices = len(different)
    return done


def figures_of(trial: FrozenTrial) -> dict[str, float]:
    """Return all figures of a trial; none before its first step."""
    return {name: x for step in trial.user_attrs.get(HISTORY, ()) for name, x in step.items()}


def differing(old: str, new: str) -> str:
    """Describe the ranges in which two spaces, given in JSON, differ."""
    before, after = json.loads(old), json.loads(new)
    names = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    return "; ".join(
        f"{n} was {_short(before.get(n, 'none'))}, is {_short(after.get(n, 'none'))}" for n in names
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
