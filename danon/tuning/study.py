"""Studies: made, found again, and how far they are."""

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

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = [
    "SURPLUS",
    "Plan",
    "Progress",
    "StudyError",
    "begin",
    "distributions",
    "enqueue",
    "figures_of",
    "plan_of",
    "progress",
    "resume",
    "sampler",
]

ATTRIBUTE = "danon"
"""Of studies: their plan."""
SURPLUS = "surplus"
"""Of trials that several workers began although only one was still wanted."""
STARTUP = 10
"""Trials at random before the sampler draws conclusions."""


class StudyError(RuntimeError):
    """The study cannot be made, found or gone on with."""


@dataclass(frozen=True)
class Plan:
    """All that trials of a study have in common.

    Attributes:
        kind: hyperparameters or schedule.
        attention: registered name, or ``file.py:Class``.
        objectives: see :class:`Objective`; so are ``limits``.
        length: tokens.
        sampler: ``tpe`` or ``random``.
        seed: of the sampler, and of what is measured.
        space: ranges, in JSON.
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
    def goal(self) -> Objective:
        return Objective(self.objectives, self.limits, self.known)

    @property
    def name(self) -> str:
        """Of a study that was given none: the same for the same plan."""
        attention = self.attention.rpartition(":")[2]
        parts = [self.kind, attention, "+".join(self.objectives), f"N{self.length}", self.dtype]
        parts += [f"{name}<={bound:g}" for name, bound in sorted(self.limits.items())]
        parts += [self.device] if self.device != "cpu" else []
        parts += [f"{self.sampler}{self.seed}"] if (self.sampler, self.seed) != ("tpe", 0) else []
        return "-".join(parts)

    @property
    def choices(self) -> float:
        """How many there are; infinite with a range of numbers."""
        ranges = json.loads(self.space).values()
        return math.prod(
            len(some["values"]) if some["kind"] == "Categorical" else math.inf for some in ranges
        )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Plan:
        lists = {name: tuple(values[name]) for name in ("objectives", "known")}
        return cls(**{**values, **lists})


@dataclass
class Progress:
    """Trials by what became of them.

    Attributes:
        finished: complete, pruned, or failed by themselves: what a budget counts.
        running: including those whose worker has died and is not missed yet.
        repeating: of these, measurements of a choice that was measured before.
        died: with their worker, or interrupted; they are tried again.
        repeats: complete measurements of a choice that was measured before.
        choices: different ones that finished.
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
        return self.complete + self.pruned + self.failed


def begin(plan: Plan, name: str, storage: RDBStorage, first: Iterable[Mapping[str, Any]]) -> Study:
    """The study of a plan: new, with choices to begin with, or as far as it is.

    Raises:
        StudyError: a study of another plan has the name.
    """
    import optuna

    directions = [optuna.study.StudyDirection.MINIMIZE] * len(plan.objectives)
    with exclusive(storage.url):  # or one of two that begin finds the other's without a plan
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions, load_if_exists=True
        )
        _check_directions(study, len(plan.objectives))
        if ATTRIBUTE not in study.user_attrs and not study.get_trials(deepcopy=False):
            study.set_user_attr(ATTRIBUTE, asdict(plan))
            with experimental():
                study.set_metric_names(list(plan.objectives))
        known, asked = asdict(plan_of(study)), asdict(plan)
        for what, value in known.items():
            if asked[what] != value:
                words = f"{what} = {_short(value)}, not {_short(asked[what])}"
                if what == "space":
                    words = f"another space: {differing(value, asked[what])}"
                raise StudyError(
                    f"study {name!r} has {words}: give another --study, or the same options"
                )
        for choice in first:
            enqueue(study, choice, first=True)
    return study


def resume(name: str, storage: RDBStorage) -> Study:
    """A study that exists.

    Raises:
        StudyError: there is none of that name, or not of ours; lists those there are.
    """
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        found = sorted(optuna.get_all_study_names(storage))
        raise StudyError(f"no study {name!r}; there are: {', '.join(found) or 'none'}") from None
    _check_directions(study, len(plan_of(study).objectives))
    return study


def _check_directions(study: Study, objectives: int) -> None:
    """Raise unless a study, which somebody may have made by hand, minimizes what is measured.

    Raises:
        StudyError: it maximizes something, or has another number of objectives.
    """
    found = [direction.name.lower() for direction in study.directions]
    if found != ["minimize"] * objectives:
        raise StudyError(
            f"study {study.study_name!r} is to {', '.join(found)}: must be to "
            f"{', '.join(['minimize'] * objectives)}; give another --study, or delete this one"
        )


def plan_of(study: Study) -> Plan:
    """What a study was made for."""
    values = study.user_attrs.get(ATTRIBUTE)
    if values is None:
        raise StudyError(f"study {study.study_name!r} is not one of danon's")
    return Plan.read(values)


def sampler(plan: Plan, study: Study, worker: str) -> BaseSampler:
    """What chooses.

    Its seed goes by how far the study is: gone on with, it does not draw again what it has. And by
    the worker: two that begin at once do not draw the same.
    """
    import optuna

    seed = zlib.crc32(f"{plan.seed} {len(study.get_trials(deepcopy=False))} {worker}".encode())
    if plan.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)


def distributions(space: str) -> dict[str, BaseDistribution]:
    """Optuna's of our ranges."""
    from optuna import distributions as d

    found: dict[str, BaseDistribution] = {}
    for name, values in json.loads(space).items():
        if values["kind"] == "Categorical":
            found[name] = d.CategoricalDistribution(values["values"])
        else:
            found[name] = d.FloatDistribution(values["low"], values["high"], log=values["log"])
    return found


def enqueue(
    study: Study,
    choice: Mapping[str, Any],
    *,
    again: int | None = None,
    turn: int = 0,
    first: bool = False,
) -> None:
    """Let a choice be the next that is measured.

    Args:
        again: number of the trial that measured it before.
        turn: of repeats; those of a turn have the same questions, and a process if they can.
        first: unless it was asked for before; whatever comes out, it is measured to the end.
    """
    attributes: dict[str, Any] = {} if again is None else {"again": again, "turn": turn}
    attributes |= {"first": True} if first else {}
    study.enqueue_trial(dict(choice), user_attrs=attributes, skip_if_exists=first)


def progress(study: Study) -> Progress:
    """How far a study is."""
    from optuna.trial import TrialState

    found, different = Progress(), set()
    for trial in study.get_trials(deepcopy=False):
        if SURPLUS in trial.user_attrs:
            continue
        if trial.state == TrialState.RUNNING:
            found.running += 1
            found.repeating += "again" in trial.user_attrs
        elif trial.state == TrialState.WAITING:
            found.waiting += 1
        elif trial.state == TrialState.FAIL and "error" not in trial.user_attrs:
            found.died += 1
        else:
            different.add(json.dumps(trial.params, sort_keys=True))
            if "again" in trial.user_attrs:
                found.repeats += trial.state == TrialState.COMPLETE
            elif trial.state == TrialState.COMPLETE:
                found.complete += 1
            elif trial.state == TrialState.PRUNED:
                found.pruned += 1
            else:
                found.failed += 1
    found.choices = len(different)
    return found


def figures_of(trial: FrozenTrial) -> dict[str, float]:
    """What was measured of a trial; empty before."""
    return {name: x for step in trial.user_attrs.get("history", ()) for name, x in step.items()}


def differing(old: str, new: str) -> str:
    """What two spaces do not have in common, in words."""
    before, after = json.loads(old), json.loads(new)
    names = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    return "; ".join(
        f"{n} was {_short(before.get(n, 'none'))}, is {_short(after.get(n, 'none'))}" for n in names
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
