"""Run trials of a study on all machines of a cluster."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from danon.cluster.connection import Node, connected
from danon.cluster.pool import WorkerPool
from danon.tracking.store import redact_password
from danon.tuning import storage
from danon.tuning.study import ERROR, ORIGIN, StudyError
from danon.tuning.study_job import DescribeJob, StudyWorkerJob
from danon.tuning.study_run import StudyRun
from danon.tuning.subject import Description, Subject
from danon.tuning.trial_loop import POLL_S

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from danon.cluster.node_actor import Job

__all__ = ["RayExecutor"]


class RayExecutor:
    """An executor on Ray, with one worker on every machine.

    Args:
        subject: what the trials measure.
        url: address of the storage, which every machine must reach.
        address: address of the cluster; see :func:`danon.cluster.connection.connected`.
        say: called with words about machines that come and go.

    Raises:
        ClusterError: see :class:`WorkerPool`.
    """

    def __init__(
        self, subject: Subject, url: str, address: str, say: Callable[[str], object]
    ) -> None:
        self._subject, self._url = subject, url
        self._open = contextlib.ExitStack()
        try:
            self._open.enter_context(connected(address))
            file = subject.attention.rpartition(":")[0]
            files = [file] if file.endswith(".py") else []
            self._pool = self._open.enter_context(
                WorkerPool(subject.device, files, say, self._reaches)
            )
        except BaseException:
            self._open.close()
            raise
        for node in self._pool.nodes:
            say(f"{node} measures")

    def describe(self) -> Description:
        """Return the description that the first free machine gives."""
        description: Description = self._answer(DescribeJob(self._subject))
        return description

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the settings that each choice stands for."""
        settings: list[dict[str, Any]] = self._answer(DescribeJob(self._subject, choices))
        return settings

    def run(self, run: StudyRun, *, queued: bool = False) -> None:
        """Run trials on all machines, which record their own origin."""
        if queued:
            now = run.progress
            if not (now.waiting or now.repeating):
                return  # each machine would start a process to find that out
        dispatcher = _StudyDispatcher(run, lambda: StudyWorkerJob(run, queued=queued), self._pool)
        try:
            self._pool.run(dispatcher)
        finally:
            dispatcher.report_ended()

    def close(self) -> None:
        """Free the machines and disconnect."""
        self._open.close()

    def _answer(self, question: DescribeJob) -> Any:
        dispatcher = _DescribeDispatcher(question)
        self._pool.run(dispatcher)
        return dispatcher.value

    def _reaches(self, node: Node) -> str:
        """Return why a machine cannot reach the storage, as far as its address shows."""
        if self._url.startswith("sqlite") and node.host != socket.gethostname():
            return (
                f"cannot reach --storage {redact_password(self._url)}, a file of "
                f"{socket.gethostname()}: several machines need one like postgresql://..."
            )
        return ""


class _DescribeDispatcher:
    """A dispatcher that has a question answered by the first free machine."""

    def __init__(self, question: DescribeJob) -> None:
        self._question: DescribeJob | None = question
        self._same_question = question
        self._answered = self.done = False
        self.value = None

    def tick(self) -> None:
        pass

    def next_job(self, node: Node) -> Job | None:
        job, self._question = self._question, None
        return job

    def on_event(self, node: Node, event: dict[str, Any]) -> None:
        if "error" in event:
            raise StudyError(event["error"])
        self._answered, self.value = True, event["value"]

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        if self._answered:
            self.done = True
        else:  # lost, or stopped before it had answered
            self._question = self._same_question


class _StudyDispatcher:
    """A dispatcher that gives each machine a job, until one finds no trial left to run."""

    def __init__(
        self, run: StudyRun, make_job: Callable[[], StudyWorkerJob], pool: WorkerPool
    ) -> None:
        self._run, self._make_job, self._pool = run, make_job, pool
        self._errors: dict[str, str] = {}  # by node
        self._reported = {t.number for t in self._finished()}
        self._last_look = 0.0
        self._running_jobs = 0
        self._complete = False

    @property
    def done(self) -> bool:
        return self._complete and not self._running_jobs

    def tick(self) -> None:
        if time.monotonic() - self._last_look > POLL_S:
            self._last_look = time.monotonic()
            self.report_ended()

    def next_job(self, node: Node) -> Job | None:
        if self._complete:
            return None
        self._running_jobs += 1
        return self._make_job()

    def on_event(self, node: Node, event: dict[str, Any]) -> None:
        if "error" in event:
            self._errors[node.id] = event["error"]
        else:
            self._complete = True

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        self._running_jobs -= 1
        if lost:
            _requeue_trial_of(node, self._run)
        elif error := self._errors.pop(node.id, ""):
            if self._pool.nodes == [node]:
                raise StudyError(f"{node}: {error}")
            self._pool.refuse(node, error)

    def report_ended(self) -> None:
        """Tell the listeners of trials that our machines ended; other workers have their own."""
        for trial in self._finished():
            if trial.number not in self._reported:
                self._reported.add(trial.number)
                died = trial.state.name == "FAIL" and ERROR not in trial.user_attrs
                if _node_of(trial) in self._pool.seen_nodes and not died:
                    self._run.on_end(trial)

    def _finished(self) -> list[FrozenTrial]:
        return [t for t in self._run.all_trials() if t.state.is_finished()]


def _node_of(trial: FrozenTrial) -> str | None:
    """Return the id of the node that measures a trial; None outside of clusters."""
    node: str | None = trial.user_attrs.get(ORIGIN, {}).get("place", {}).get("node")
    return node


def _requeue_trial_of(node: Node, run: StudyRun) -> None:
    """Requeue the trial of a machine that died, without waiting for its heartbeat."""
    from optuna.trial import TrialState

    for trial in run.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _node_of(trial) == node.id:
            run.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            storage.retry(run.storage, run.study, trial)
