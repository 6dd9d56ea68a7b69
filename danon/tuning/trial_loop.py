"""Run trials of a study, as one of any number of workers."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from danon.tuning import storage
from danon.tuning.evaluator import Evaluator, TrialError
from danon.tuning.objective import FIGURES, SLACK, Objective
from danon.tuning.study import (
    ERROR,
    FIRST,
    HISTORY,
    ORIGIN,
    REPEAT_INDEX,
    REPEAT_OF,
    SURPLUS,
    StudyError,
    distributions,
    enqueue,
    figures_of,
    make_sampler,
)
from danon.tuning.study_run import StudyRun

if TYPE_CHECKING:
    from optuna import Study, Trial

__all__ = ["run_trials"]

POLL_S = 2.0
"""Seconds between looks at the last trials of other workers."""
MAX_FAILED_TRIALS = 5
"""Number of failed trials, without a complete one, after which a study ends."""


class _SurplusError(Exception):
    """A trial too many: several workers began the last one."""


def run_trials(run: StudyRun, evaluator: Evaluator, *, queued: bool = False) -> None:
    """Run trials until enough have finished, or every choice of the space was tried.

    A trial whose worker died goes into the queue again, put there by the first worker that sees
    it.

    Args:
        run: the study, and how many trials it is to have.
        evaluator: measures the choices.
        queued: run only the repeats in the queue, however many trials have finished.

    Raises:
        StudyError: nothing can be measured.
        KeyboardInterrupt: the trial at work went back into the queue.
    """
    import optuna

    study = run.study
    study.sampler = make_sampler(run.plan, study, run.worker)
    trial_function = _TrialFunction(run, evaluator, queued=queued)
    while True:
        _requeue_dead_trials(study)
        now = run.progress
        only_queue = queued or now.choices >= run.plan.choices
        missing = now.waiting if only_queue else run.trials - now.finished
        others = now.repeating if queued else now.running
        if missing <= 0 and not (queued and others):
            return
        if missing <= 0 or (not only_queue and others >= missing):
            time.sleep(POLL_S)  # others are at the last trials, or have died
            continue
        if trial_function.failures >= MAX_FAILED_TRIALS and not (now.complete or now.pruned):
            raise StudyError(
                f"{trial_function.failures} trials failed, none is complete: {trial_function.error}"
            )
        try:
            study.optimize(
                trial_function,
                n_trials=1,
                catch=(TrialError, _SurplusError),
                callbacks=[lambda _, t: None if SURPLUS in t.user_attrs else run.on_end(t)],
            )
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            late = isinstance(error, optuna.exceptions.UpdateFinishedTrialError)
            if not late and not str(error).startswith("Cannot tell a"):
                raise
            trial_function.choice = {}  # this process was silent so long that it counted as dead
        except UnboundLocalError as error:  # Optuna's, when the storage fails as a trial ends
            raise error.__context__ or error from None
        except KeyboardInterrupt:
            trial_function.requeue()
            raise


def _requeue_dead_trials(study: Study) -> None:
    """Fail and requeue trials whose workers died, even before their first heartbeat."""
    import optuna
    from optuna.trial import TrialState

    with storage.experimental():
        optuna.storages.fail_stale_trials(study)
        # Optuna has no public way to its callback.
        requeue = cast("Any", study._storage).get_heartbeat_stale_trial_callback()
        latest_start = dt.datetime.now() - dt.timedelta(seconds=storage.GRACE_S)  # noqa: DTZ005  as Optuna's
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if ORIGIN in trial.user_attrs or not trial.datetime_start:
                continue
            if trial.datetime_start < latest_start:
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                requeue(study, trial)


class _TrialFunction:
    """The function that Optuna calls with a trial.

    Attributes:
        choice: the choice that is measured now; empty between trials.
        error: message of the last trial that failed here.
        failures: number of trials that failed here.
    """

    def __init__(self, run: StudyRun, evaluator: Evaluator, *, queued: bool) -> None:
        self._run, self._evaluator, self._queued = run, evaluator, queued
        self._objective = run.objective
        self._ranges = distributions(run.plan.space)
        self.choice: Mapping[str, Any] = {}
        self._repeat_of: int | None = None
        self._repeat_index, self._last_index = 0, -1  # of this trial, and of the last one here
        self.error, self.failures = "", 0

    def __call__(self, trial: Trial) -> list[float]:
        """Measure a trial and return the values of the objectives."""
        self._repeat_of = trial.user_attrs.get(REPEAT_OF)
        self._repeat_index = trial.user_attrs.get(REPEAT_INDEX, trial.number)
        if self._is_surplus(trial):
            trial.set_user_attr(SURPLUS, True)
            raise _SurplusError
        self.choice = {name: _suggest(trial, name, range_) for name, range_ in self._ranges.items()}
        trial.set_user_attr(ORIGIN, dict(self._run.origin))
        self._run.on_begin(trial)
        try:
            values = self._measure(trial)
        except (TrialError, ValueError) as error:
            self.error, self.failures = str(error), self.failures + 1
            trial.set_user_attr(ERROR, self.error)
            self.choice = {}
            raise TrialError(self.error) from error
        self.choice = {}
        return values

    def requeue(self) -> None:
        """Put the interrupted trial, if there is one, back into the queue."""
        if self.choice:
            enqueue(
                self._run.study,
                self.choice,
                repeat_of=self._repeat_of,
                repeat_index=self._repeat_index,
            )

    def _is_surplus(self, trial: Trial) -> bool:
        """Return True if the trials before this one suffice, provided that none of them dies."""
        if self._repeat_of is not None:
            return False
        before = [
            t
            for t in self._run.all_trials()
            if t.number < trial.number and not {REPEAT_OF, SURPLUS} & t.user_attrs.keys()
        ]
        counted = [t for t in before if t.state.name != "FAIL" or ERROR in t.user_attrs]
        return self._queued or len(counted) >= self._run.trials

    def _measure(self, trial: Trial) -> list[float]:
        """Measure step by step, and prune a trial that cannot be the best.

        Raises:
            ValueError: a figure is not a finite number.
            TrialError: the choice cannot be measured.
        """
        import optuna

        objective, history = self._objective, list[dict[str, float]]()
        figures: dict[str, float] = {}
        repeat = self._repeat_of is not None
        complete = not objective.single or repeat or FIRST in trial.user_attrs
        seed = self._run.plan.seed + (1 + self._repeat_index if repeat else 0)
        fresh = repeat and self._repeat_index != self._last_index
        self._last_index = self._repeat_index if repeat else self._last_index
        for step, more in enumerate(self._evaluator.steps(self.choice, seed, fresh=fresh)):
            figures |= more
            history.append(more)
            trial.set_user_attr(HISTORY, history)
            if objective.single:
                trial.report(objective.lower_bound(figures), step)
            partial = any(FIGURES[name] not in figures for name in objective.available)
            if partial and not complete and _is_hopeless(self._run.study, objective, figures):
                self.choice = {}
                self._set_constraints(trial, figures)
                raise optuna.TrialPruned
        values = objective.values(figures)
        self._set_constraints(trial, figures)
        return values

    def _set_constraints(self, trial: Trial, figures: Mapping[str, float]) -> None:
        """Tell the sampler by how much constraints are violated, as far as that is known."""
        for name, violation in self._objective.sampler_violations(figures).items():
            trial.set_constraint(name, violation)


def _is_hopeless(study: Study, objective: Objective, figures: Mapping[str, float]) -> bool:
    """Return True if a trial is worse than another, even if its missing figures are perfect."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    within = [
        t
        for t in complete
        if REPEAT_OF not in t.user_attrs
        and all(x <= 0 for x in objective.sampler_violations(figures_of(t)).values())
    ]
    if not within:
        return False
    if any(violation > 0 for violation in objective.sampler_violations(figures).values()):
        return True
    optimistic = {**figures, "time_ratio": figures.get("time_ratio_low", 0.0)}
    least = min(trial.values[0] for trial in within)
    return bool(objective.lower_bound(optimistic) > (1 + SLACK) * least)


def _suggest(trial: Trial, name: str, distribution: Any) -> Any:
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
