"""The jobs that a machine of a cluster runs for a study."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from danon.cluster.node_actor import Place
from danon.runs.run_info import RunInfo
from danon.tracking.store import StoreError, root_cause
from danon.tuning import storage
from danon.tuning.evaluator import SubprocessEvaluator, TrialError
from danon.tuning.study import StudyError, plan_of, resume
from danon.tuning.study_run import StudyRun, origin
from danon.tuning.subject import Subject
from danon.tuning.trial_loop import run_trials

__all__ = ["DescribeJob", "StudyWorkerJob"]


class _EvaluatorJob:
    """A job with a measuring process.

    It yields ``{"value": ...}``, or ``{"error": ...}`` in words for a user.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._evaluator: SubprocessEvaluator | None = None
        self._stopped = False

    def stop(self) -> None:
        """Interrupt the job; called from another thread."""
        self._stopped = True
        if self._evaluator is not None:
            self._evaluator.interrupt()

    def _answer(self, ask: Callable[[SubprocessEvaluator], Any]) -> Iterator[Any]:
        """Yield what a function returns for an evaluator, or why there is no answer."""
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="danon-tune-", ignore_cleanup_errors=True)
            log = Path(stack.enter_context(folder)) / "trials.log"
            evaluator = SubprocessEvaluator(self._subject, log)
            self._evaluator = stack.enter_context(contextlib.closing(evaluator))
            if self._stopped:
                return
            try:
                yield {"value": ask(evaluator)}
            except KeyboardInterrupt:
                return  # the trial at work is in the queue again
            except (ValueError, StudyError, StoreError, TrialError) as error:
                yield {"error": str(error)}
            except storage.failures() as error:
                yield {"error": f"the storage failed: {root_cause(error)}"}


class DescribeJob(_EvaluatorJob):
    """A job that describes a subject, or returns the settings that choices stand for.

    Args:
        subject: what the trials measure.
        choices: choices to return the settings of; None for the description.
    """

    def __init__(
        self, subject: Subject, choices: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__(subject)
        self._choices = None if choices is None else [dict(choice) for choice in choices]

    def events(self, place: Place) -> Iterator[Any]:
        """Yield the answer."""
        yield from self._answer(self._describe)

    def _describe(self, evaluator: SubprocessEvaluator) -> Any:
        if self._choices is None:
            return evaluator.describe()
        return [evaluator.settings(choice) for choice in self._choices]


class StudyWorkerJob(_EvaluatorJob):
    """A job that runs trials until the study has enough.

    Args:
        run: the study; the job opens its storage again on the machine.
        queued: see :func:`danon.tuning.trial_loop.run_trials`.
    """

    def __init__(self, run: StudyRun, *, queued: bool) -> None:
        super().__init__(run.plan.subject)
        self._name, self._storage, self._trials = run.name, run.storage, run.trials
        self._seed, self._queued = run.plan.seed, queued

    def events(self, place: Place) -> Iterator[Any]:
        """Yield None as the value, when the study has enough trials."""
        yield from self._answer(lambda evaluator: self._work(evaluator, place))

    def _work(self, evaluator: SubprocessEvaluator, place: Place) -> None:
        with storage.opened(self._storage) as database:
            study = resume(self._name, database)
            description = evaluator.describe()
            if description.space != plan_of(study).space:
                raise StudyError(f"it has another space of {self._subject.attention}")
            info = RunInfo.capture("", self._seed, "", dict(description.machine))
            run = StudyRun(  # without listeners: the command that gave the job has them
                study,
                self._trials,
                self._storage,
                origin={**origin(info), "place": place},
                worker=f"{place['node']} {os.getpid()}",
            )
            run_trials(run, evaluator, queued=self._queued)
