"""A study at work, with all that the parts of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from danon.runs.run_info import RunInfo
from danon.tuning.objective import Objective
from danon.tuning.study import Plan, Progress, plan_of, progress

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["StudyRun", "TrialListener", "origin"]


class TrialListener(Protocol):
    """An object that is told of trials."""

    def on_begin(self, trial: Trial) -> None:
        """Note that a trial has its choice and is about to be measured."""
        ...

    def on_end(self, trial: FrozenTrial) -> None:
        """Note that a trial is complete, pruned or failed."""
        ...


@dataclass(frozen=True)
class StudyRun:
    """One process's work on a study.

    Attributes:
        study: Optuna's study, which holds the plan.
        trials: number of finished trials that the study is to have.
        storage: address of the study's database.
        listeners: told of each trial that begins or ends here.
        origin: commit and machine that measure, for the record.
        worker: distinguishes this process from others that began at the same time.
        command: command line without a password, for the record.
    """

    study: Study
    trials: int
    storage: str = ""
    listeners: tuple[TrialListener, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    worker: str = ""
    command: str = ""

    @cached_property
    def plan(self) -> Plan:
        """Facts that all trials of the study have in common."""
        return plan_of(self.study)

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study.study_name

    @property
    def objective(self) -> Objective:
        """Figures to minimise, and limits to keep."""
        return self.plan.objective

    @property
    def progress(self) -> Progress:
        """Numbers of trials, read from the storage now."""
        return progress(self.study)

    def all_trials(self) -> list[FrozenTrial]:
        """Read all trials from the storage."""
        return self.study.get_trials(deepcopy=False)

    def on_begin(self, trial: Trial) -> None:
        """Tell the listeners of a trial that begins."""
        for listener in self.listeners:
            listener.on_begin(trial)

    def on_end(self, trial: FrozenTrial) -> None:
        """Tell the listeners of a trial that has ended."""
        for listener in self.listeners:
            listener.on_end(trial)


def origin(info: RunInfo) -> dict[str, Any]:
    """Return the origin of measurements of this process: commit, day and machine."""
    return {
        "commit": info.commit,
        "dirty": info.dirty,
        "when": info.started[:10],
        "machine": info.fingerprint,
    }
