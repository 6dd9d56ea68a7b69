"""Where the trials of a study are run: here, or (:mod:`danon.tuning.ray_executor`) on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from danon.tuning.evaluator import SubprocessEvaluator
from danon.tuning.study import Plan
from danon.tuning.trial_loop import TrialListener, run_trials

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["Executor", "LocalExecutor"]


class Executor(Protocol):
    """Runs trials of one plan."""

    def describe(self) -> dict[str, Any]:
        """As :meth:`SubprocessEvaluator.describe`."""
        ...

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What choices stand for."""
        ...

    def run(
        self,
        study: Study,
        trials: int,
        listener: TrialListener,
        origin: Mapping[str, Any],
        *,
        queued: bool = False,
    ) -> None:
        """As :func:`danon.tuning.trial_loop.run_trials`."""
        ...

    def close(self) -> None: ...


class LocalExecutor:
    """This process, one trial after the other.

    Args:
        log: gets what the measuring process prints.
    """

    def __init__(self, plan: Plan, log: Path) -> None:
        self._local = SubprocessEvaluator(plan, log)

    def describe(self) -> dict[str, Any]:
        return self._local.describe()

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._local.settings(choice) for choice in choices]

    def run(
        self,
        study: Study,
        trials: int,
        listener: TrialListener,
        origin: Mapping[str, Any],
        *,
        queued: bool = False,
    ) -> None:
        run_trials(study, self._local, trials, listener, origin=origin, queued=queued)

    def close(self) -> None:
        self._local.close()
