"""Whoever runs trials of a study, one of any number."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from danon.tuning.evaluator import Evaluator, TrialError
from danon.tuning.goal import FIGURES, Goal
from danon.tuning.storage import experimental
from danon.tuning.study import (
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

__all__ = ["Ledger", "work"]

POLL_S = 2.0
"""Between looks at the last trials of others."""
IN_VAIN = 5
"""Trials that fail before any has figures: the others would, too."""


class Ledger(Protocol):
    """Hears of trials."""

    def begun(self, trial: Trial) -> None: ...

    def ended(self, trial: FrozenTrial) -> None: ...


def work(
    study: Study, evaluator: Evaluator, trials: int, ledger: Ledger, *, machine: str = "",
    queued: bool = False,
) -> None:  # fmt: skip
    """Run trials until a study has so many that finished, or has tried every choice there is.

    Several workers that begin their last trials at once may exceed the number, each by one. A trial
    whose worker died goes into the queue again, by whoever misses it first.

    Args:
        machine: that measures, for the record.
        queued: run what is in the queue, whatever has finished, and nothing else.

    Raises:
        StudyError: nothing can be measured.
        KeyboardInterrupt: the trial at work went back into the queue.
    """
    import optuna

    plan = plan_of(study)
    study.sampler = sampler(plan, study)
    run = _Objective(study, plan.goal, evaluator, ledger, plan.seed, plan.space, machine)
    while True:
        with experimental():
            optuna.storages.fail_stale_trials(study)
        now = progress(study)
        wanted = now.waiting if queued or now.choices >= plan.choices else trials - now.finished
        if wanted <= 0 and (not queued or not now.running):
            return
        if wanted <= 0 or (not queued and now.running >= wanted):
            time.sleep(POLL_S)  # the others are at the last ones, or have died
            continue
        if now.failed >= IN_VAIN and not (now.complete or now.pruned):
            raise StudyError(f"the first {now.failed} trials failed, the last one so: {run.error}")
        try:
            study.optimize(
                run, n_trials=1, catch=(TrialError,),
                callbacks=[lambda _, trial: ledger.ended(trial)],
            )  # fmt: skip
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            if not study.trials[run.number].state.is_finished():
                raise
            # This process stood still for so long that others have given its trial up.
        except KeyboardInterrupt:
            if run.choice:
                enqueue(study, run.choice, again=run.again)
            raise


class _Objective:
    """What Optuna calls with a trial.

    Attributes:
        number: of the trial at work, or the last one.
        choice: of the trial at work; empty between trials.
        again: number of the trial that it repeats, or None.
        error: of the last one that failed.
    """

    def __init__(
        self, study: Study, goal: Goal, evaluator: Evaluator, ledger: Ledger, seed: int, space: str,
        machine: str,
    ) -> None:  # fmt: skip
        self._study, self._goal, self._evaluator, self._ledger = study, goal, evaluator, ledger
        self._seed, self._ranges, self._machine = seed, distributions(space), machine
        self.number = -1
        self.choice: Mapping[str, Any] = {}
        self.again: int | None = None
        self.error = ""

    def __call__(self, trial: Trial) -> list[float]:
        self.number, self.again = trial.number, trial.user_attrs.get("again")
        self.choice = {name: _suggest(trial, name, some) for name, some in self._ranges.items()}
        trial.set_user_attr("machine", self._machine)
        self._ledger.begun(trial)
        try:
            values = self._measured(trial)
        except (TrialError, ValueError) as error:
            self.error = str(error)
            trial.set_user_attr("error", self.error)
            raise TrialError(self.error) from error
        self.choice = {}
        return values

    def _measured(self, trial: Trial) -> list[float]:
        """Raises: ValueError: a figure that is none; and what the evaluator and Optuna raise."""
        import optuna

        goal, history = self._goal, list[dict[str, float]]()
        figures: dict[str, float] = {}
        repeat = self.again is not None
        seed = self._seed + (trial.number if repeat else 0)
        for step, found in enumerate(self._evaluator.steps(self.choice, seed, fresh=repeat)):
            figures |= found
            history.append(found)
            trial.set_user_attr("figures", figures)
            trial.set_user_attr("history", history)
            if goal.single:
                trial.report(goal.bound(figures), step)
            more = any(FIGURES[name] not in figures for name in goal.known)
            if goal.single and more and not repeat and _hopeless(self._study, goal, figures):
                self.choice = {}
                raise optuna.TrialPruned
        values = goal.values(figures)
        for name, excess in goal.excess(figures).items():
            trial.set_constraint(name, excess)
        return values


def _hopeless(study: Study, goal: Goal, figures: Mapping[str, float]) -> bool:
    """Whether a trial is worse than another even if all that is not known yet were perfect."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    within = [t for t in done if all(x <= 0 for x in goal.excess(figures_of(t)).values())]
    if not within:
        return False
    if any(excess > 0 for excess in goal.excess(figures).values()):
        return True
    lucky = {**figures, "time_ratio": figures.get("time_ratio_low", 0.0)}
    return bool(goal.bound(lucky) > min(trial.values[0] for trial in within))


def _suggest(trial: Trial, name: str, some: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(some, CategoricalDistribution):
        return trial.suggest_categorical(name, some.choices)
    if isinstance(some, IntDistribution):
        return trial.suggest_int(name, some.low, some.high, log=some.log)
    return trial.suggest_float(name, some.low, some.high, log=some.log)
