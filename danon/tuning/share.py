"""What a machine of a cluster does for a study."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.cluster.hand import Place
from danon.experiment.runs import RunInfo
from danon.experiment.store import StoreError, root_cause
from danon.tuning import storage
from danon.tuning.evaluator import Local, TrialError
from danon.tuning.study import Plan, StudyError, plan_of, resume
from danon.tuning.worker import origin, work

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

__all__ = ["Question", "Share"]


class _Measuring:
    """A job with a process that measures.

    It yields ``{"value": ...}``, or ``{"error": ...}`` in words for a user.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._local: Local | None = None
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        if self._local is not None:
            self._local.interrupt()

    def _answers(self, do: Callable[[Local], Any]) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="danon-tune-", ignore_cleanup_errors=True)
            log = Path(stack.enter_context(folder)) / "trials.log"
            local = stack.enter_context(contextlib.closing(Local(self._plan, log)))
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


class Question(_Measuring):
    """What there is to tune, or what choices of it stand for."""

    def __init__(self, plan: Plan, choices: Iterable[Mapping[str, Any]] | None = None) -> None:
        super().__init__(plan)
        self._choices = None if choices is None else [dict(choice) for choice in choices]

    def events(self, place: Place) -> Iterator[Any]:
        yield from self._answers(self._asked)

    def _asked(self, local: Local) -> Any:
        if self._choices is None:
            return local.describe()
        return [local.settings(choice) for choice in self._choices]


class Share(_Measuring):
    """Trials of a study, as many as it still wants; see :func:`danon.tuning.worker.work`."""

    def __init__(self, plan: Plan, name: str, url: str, trials: int, *, queued: bool) -> None:
        super().__init__(plan)
        self._name, self._url, self._trials, self._queued = name, url, trials, queued

    def events(self, place: Place) -> Iterator[Any]:
        yield from self._answers(lambda local: self._work(local, place))

    def _work(self, local: Local, place: Place) -> None:
        with storage.opened(self._url) as database:
            study = resume(self._name, database)
            about = local.describe()
            if about["space"] != plan_of(study).space:
                raise StudyError(f"it has another space of {self._plan.attention}")
            info = RunInfo.capture("", self._plan.seed, "", about["machine"])
            work(
                study, local, self._trials, _Silent(), origin={**origin(info), "place": place},
                worker=f"{place['node']} {os.getpid()}", queued=self._queued,
            )  # fmt: skip


class _Silent:
    """A ledger: whoever gave the job looks into the study."""

    def begun(self, trial: Trial) -> None:
        pass

    def ended(self, trial: FrozenTrial) -> None:
        pass
