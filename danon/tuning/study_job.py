"""What a machine of a cluster does for a study."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.cluster.node_actor import Place
from danon.runs.run_info import RunInfo
from danon.tracking.store import StoreError, root_cause
from danon.tuning import storage
from danon.tuning.evaluator import SubprocessEvaluator, TrialError
from danon.tuning.study import Plan, StudyError, plan_of, resume
from danon.tuning.trial_loop import origin, run_trials

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

__all__ = ["DescribeJob", "StudyWorkerJob"]


class _Measuring:
    """A job with a process that measures.

    It yields ``{"value": ...}``, or ``{"error": ...}`` in words for a user.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._local: SubprocessEvaluator | None = None
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        if self._local is not None:
            self._local.interrupt()

    def _answers(self, do: Callable[[SubprocessEvaluator], Any]) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="danon-tune-", ignore_cleanup_errors=True)
            log = Path(stack.enter_context(folder)) / "trials.log"
            local = stack.enter_context(contextlib.closing(SubprocessEvaluator(self._plan, log)))
            self._local = local
            if self._stopped:
                return
            try:
                yield {"value": do(local)}
            except KeyboardInterrupt:
                return  # the trial at work is in the queue again
            except (ValueError, StudyError, StoreError, TrialError) as error:
                yield {"error": str(error)}
            except storage.failures() as error:
                yield {"error": f"the storage failed: {root_cause(error)}"}


class DescribeJob(_Measuring):
    """What there is to tune, or what choices of it stand for."""

    def __init__(self, plan: Plan, choices: Iterable[Mapping[str, Any]] | None = None) -> None:
        super().__init__(plan)
        self._choices = None if choices is None else [dict(choice) for choice in choices]

    def events(self, place: Place) -> Iterator[Any]:
        yield from self._answers(self._asked)

    def _asked(self, local: SubprocessEvaluator) -> Any:
        if self._choices is None:
            return local.describe()
        return [local.settings(choice) for choice in self._choices]


class StudyWorkerJob(_Measuring):
    """Trials of a study, as many as it still wants: :func:`danon.tuning.trial_loop.run_trials`."""

    def __init__(self, plan: Plan, name: str, url: str, trials: int, *, queued: bool) -> None:
        super().__init__(plan)
        self._name, self._url, self._trials, self._queued = name, url, trials, queued

    def events(self, place: Place) -> Iterator[Any]:
        yield from self._answers(lambda local: self._work(local, place))

    def _work(self, local: SubprocessEvaluator, place: Place) -> None:
        with storage.opened(self._url) as database:
            study = resume(self._name, database)
            about = local.describe()
            if about["space"] != plan_of(study).space:
                raise StudyError(f"it has another space of {self._plan.attention}")
            info = RunInfo.capture("", self._plan.seed, "", about["machine"])
            run_trials(
                study,
                local,
                self._trials,
                _Silent(),
                origin={**origin(info), "place": place},
                worker=f"{place['node']} {os.getpid()}",
                queued=self._queued,
            )


class _Silent:
    """A listener that does nothing: whoever gave the job looks into the study."""

    def begun(self, trial: Trial) -> None:
        pass

    def ended(self, trial: FrozenTrial) -> None:
        pass
