"""Whoever runs trials of a study, one of any number."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from danon.tuning import storage
from danon.tuning.evaluator import Evaluator, TrialError
from danon.tuning.objective import CLOSE, FIGURES, Objective
from danon.tuning.study import (
    SURPLUS,
    StudyError,
    distributions,
    enqueue,
    figures_of,
    plan_of,
    progress,
    sampler,
)

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    from danon.runs.run_info import RunInfo

__all__ = ["TrialListener", "origin", "run_trials"]

POLL_S = 2.0
"""Between looks at the last trials of others."""
MAX_FAILED_TRIALS = 5
"""Trials that fail before any has figures: the others would, too."""


class TrialListener(Protocol):
    """Hears of trials."""

    def begun(self, trial: Trial) -> None: ...

    def ended(self, trial: FrozenTrial) -> None: ...


def origin(info: RunInfo) -> dict[str, Any]:
    """Of measurements of this process, for the record."""
    return {
        "commit": info.commit,
        "dirty": info.dirty,
        "when": info.started[:10],
        "machine": info.fingerprint,
    }


class _SurplusError(Exception):
    """The trial is one more than wanted: several workers began the last one."""


def run_trials(
    study: Study,
    evaluator: Evaluator,
    trials: int,
    listener: TrialListener,
    *,
    origin: Mapping[str, Any] | None = None,
    worker: str = "",
    queued: bool = False,
) -> None:
    """Run trials until a study has so many that finished, or has tried every choice there is.

    A trial whose worker died goes into the queue again, by whoever misses it first.

    Args:
        origin: commit and machine that measure, for the record.
        worker: tells this one from others that began at the same time.
        queued: run the repeats that are in the queue, whatever has finished, and nothing else.

    Raises:
        StudyError: nothing can be measured.
        KeyboardInterrupt: the trial at work went back into the queue.
    """
    import optuna

    plan = plan_of(study)
    study.sampler = sampler(plan, study, worker)
    run = _Objective(study, evaluator, listener, trials, dict(origin or {}), queued=queued)
    while True:
        _miss(study)
        now = progress(study)
        only_queue = queued or now.choices >= plan.choices
        wanted = now.waiting if only_queue else trials - now.finished
        others = now.repeating if queued else now.running
        if wanted <= 0 and not (queued and others):
            return
        if wanted <= 0 or (not only_queue and others >= wanted):
            time.sleep(POLL_S)  # they are at the last ones, or have died
            continue
        if run.failures >= MAX_FAILED_TRIALS and not (now.complete or now.pruned):
            raise StudyError(f"{run.failures} trials failed, none is complete: {run.error}")
        try:
            study.optimize(
                run,
                n_trials=1,
                catch=(TrialError, _SurplusError),
                callbacks=[lambda _, t: None if SURPLUS in t.user_attrs else listener.ended(t)],
            )
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            late = isinstance(error, optuna.exceptions.UpdateFinishedTrialError)
            if not late and not str(error).startswith("Cannot tell a"):
                raise
            run.choice = {}  # this process stood still for so long that others have given it up
        except UnboundLocalError as error:  # Optuna's, when the storage fails as a trial ends
            raise error.__context__ or error from None
        except KeyboardInterrupt:
            if run.choice:
                enqueue(study, run.choice, again=run.again, turn=run.turn)
            raise


def _miss(study: Study) -> None:
    """Give up trials whose workers died, also those that died before their first heartbeat."""
    import optuna
    from optuna.trial import TrialState

    with storage.experimental():
        optuna.storages.fail_stale_trials(study)
        # what that does with them; there is no public way to it
        tell = cast("Any", study._storage).get_heartbeat_stale_trial_callback()
        old = dt.datetime.now() - dt.timedelta(seconds=storage.GRACE_S)  # noqa: DTZ005  as Optuna's
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "origin" in trial.user_attrs or not trial.datetime_start:
                continue
            if trial.datetime_start < old:
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                tell(study, trial)


class _Objective:
    """What Optuna calls with a trial.

    Attributes:
        choice: of the trial at work; empty between trials.
        again: number of the trial that it repeats, or None; ``turn`` of repeats it belongs to.
        error: of the last one that failed here; so is ``failures``, how many did.
    """

    def __init__(
        self,
        study: Study,
        evaluator: Evaluator,
        listener: TrialListener,
        trials: int,
        origin: dict[str, Any],
        *,
        queued: bool,
    ) -> None:
        plan = plan_of(study)
        self._study, self._evaluator, self._listener = study, evaluator, listener
        self._goal, self._seed, self._ranges = plan.goal, plan.seed, distributions(plan.space)
        self._trials, self._origin, self._queued = trials, origin, queued
        self.choice: Mapping[str, Any] = {}
        self.again: int | None = None
        self.turn, self._turn = 0, -1  # of this trial, and of the last one measured here
        self.error, self.failures = "", 0

    def __call__(self, trial: Trial) -> list[float]:
        self.again = trial.user_attrs.get("again")
        self.turn = trial.user_attrs.get("turn", trial.number)
        if self._surplus(trial):
            trial.set_user_attr(SURPLUS, True)
            raise _SurplusError
        self.choice = {name: _suggest(trial, name, some) for name, some in self._ranges.items()}
        trial.set_user_attr("origin", self._origin)
        self._listener.begun(trial)
        try:
            values = self._measured(trial)
        except (TrialError, ValueError) as error:
            self.error, self.failures = str(error), self.failures + 1
            trial.set_user_attr("error", self.error)
            self.choice = {}
            raise TrialError(self.error) from error
        self.choice = {}
        return values

    def _surplus(self, trial: Trial) -> bool:
        """Whether the trials before this one suffice, if none of them dies."""
        if self.again is not None:
            return False
        before = [
            t
            for t in self._study.get_trials(deepcopy=False)
            if t.number < trial.number and not {"again", SURPLUS} & t.user_attrs.keys()
        ]
        counted = [t for t in before if t.state.name != "FAIL" or "error" in t.user_attrs]
        return self._queued or len(counted) >= self._trials

    def _measured(self, trial: Trial) -> list[float]:
        """Raises: ValueError: a figure that is none; and what the evaluator and Optuna raise."""
        import optuna

        goal, history = self._goal, list[dict[str, float]]()
        figures: dict[str, float] = {}
        repeat = self.again is not None
        whole = not goal.single or repeat or "first" in trial.user_attrs
        seed = self._seed + (1 + self.turn if repeat else 0)
        fresh = repeat and self.turn != self._turn
        self._turn = self.turn if repeat else self._turn
        for step, found in enumerate(self._evaluator.steps(self.choice, seed, fresh=fresh)):
            figures |= found
            history.append(found)
            trial.set_user_attr("history", history)
            if goal.single:
                trial.report(goal.bound(figures), step)
            more = any(FIGURES[name] not in figures for name in goal.known)
            if more and not whole and _hopeless(self._study, goal, figures):
                self.choice = {}
                self._bound(trial, figures)
                raise optuna.TrialPruned
        values = goal.values(figures)
        self._bound(trial, figures)
        return values

    def _bound(self, trial: Trial, figures: Mapping[str, float]) -> None:
        """Tell the sampler by how much bounds are exceeded, as far as that is known."""
        for name, excess in self._goal.own_excess(figures).items():
            trial.set_constraint(name, excess)


def _hopeless(study: Study, goal: Objective, figures: Mapping[str, float]) -> bool:
    """Whether a trial is worse than another even if all that is not known yet were perfect."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = [t for t in done if "again" not in t.user_attrs]
    within = [t for t in first if all(x <= 0 for x in goal.own_excess(figures_of(t)).values())]
    if not within:
        return False
    if any(excess > 0 for excess in goal.own_excess(figures).values()):
        return True
    lucky = {**figures, "time_ratio": figures.get("time_ratio_low", 0.0)}
    return bool(goal.bound(lucky) > (1 + CLOSE) * min(trial.values[0] for trial in within))


def _suggest(trial: Trial, name: str, some: Any) -> Any:
    from optuna.distributions import CategoricalDistribution

    if isinstance(some, CategoricalDistribution):
        return trial.suggest_categorical(name, some.choices)
    return trial.suggest_float(name, some.low, some.high, log=some.log)
