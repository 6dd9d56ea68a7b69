"""Trials of a study on all machines of a cluster."""

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
from danon.tuning.study import Plan, StudyError, progress
from danon.tuning.study_job import DescribeJob, StudyWorkerJob
from danon.tuning.trial_loop import POLL_S, TrialListener

if TYPE_CHECKING:
    from optuna import Study

    from danon.cluster.node_actor import Job

__all__ = ["RayExecutor"]


class RayExecutor:
    """An executor on Ray: on every machine a worker, in turn with whatever else measures there.

    Args:
        address: see :func:`danon.cluster.connection.connected`.
        url: of the storage, which every machine must reach.
        say: hears of machines that come and go.

    Raises:
        ClusterError: see :class:`WorkerPool`.
    """

    def __init__(self, plan: Plan, url: str, address: str, say: Callable[[str], object]) -> None:
        self._plan, self._url = plan, url
        self._open = contextlib.ExitStack()
        try:
            self._open.enter_context(connected(address))
            file = plan.attention.rpartition(":")[0]
            files = [file] if file.endswith(".py") else []
            self._pool = self._open.enter_context(
                WorkerPool(plan.device, files, say, self._reaches)
            )
        except BaseException:
            self._open.close()
            raise
        for node in self._pool.nodes:
            say(f"{node} measures")

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = self._answer(DescribeJob(self._plan))
        return found

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._answer(DescribeJob(self._plan, choices))
        return found

    def run(
        self,
        study: Study,
        trials: int,
        listener: TrialListener,
        origin: Mapping[str, Any],
        *,
        queued: bool = False,
    ) -> None:
        """The machines say the origin of their trials themselves."""
        if queued:
            now = progress(study)
            if not (now.waiting or now.repeating):
                return  # each machine would start a process to find that out
        plan = self._plan
        shares = _StudyDispatcher(
            lambda: StudyWorkerJob(plan, study.study_name, self._url, trials, queued=queued),
            study,
            self._url,
            listener,
            self._pool,
        )
        try:
            self._pool.run(shares)
        finally:
            shares.tell()

    def close(self) -> None:
        self._open.close()

    def _answer(self, question: DescribeJob) -> Any:
        asked = _DescribeDispatcher(question)
        self._pool.run(asked)
        return asked.value

    def _reaches(self, node: Node) -> str:
        """Why a machine cannot reach the storage, as far as its address tells."""
        if self._url.startswith("sqlite") and node.host != socket.gethostname():
            return (
                f"cannot reach --storage {redact_password(self._url)}, a file of "
                f"{socket.gethostname()}: several machines need one like postgresql://..."
            )
        return ""


class _DescribeDispatcher:
    """Dispatcher of one question, which the first free machine answers."""

    def __init__(self, question: DescribeJob) -> None:
        self._question: DescribeJob | None = question
        self._again = question
        self._heard = self.done = False
        self.value = None

    def tick(self) -> None:
        pass

    def next_job(self, node: Node) -> Job | None:
        job, self._question = self._question, None
        return job

    def on_event(self, node: Node, event: dict[str, Any]) -> None:
        if "error" in event:
            raise StudyError(event["error"])
        self._heard, self.value = True, event["value"]

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        if self._heard:
            self.done = True
        else:  # lost, or stopped before it had answered
            self._question = self._again


class _StudyDispatcher:
    """Dispatcher of a phase of a study: every machine runs trials until one finds none left."""

    def __init__(
        self,
        share: Callable[[], StudyWorkerJob],
        study: Study,
        url: str,
        listener: TrialListener,
        pool: WorkerPool,
    ) -> None:
        self._share, self._study, self._url, self._listener = share, study, url, listener
        self._pool = pool
        self._errors: dict[str, str] = {}  # by node
        self._told = {t.number for t in self._finished()}
        self._looked = 0.0
        self._at_work = 0
        self._complete = False

    @property
    def done(self) -> bool:
        return self._complete and not self._at_work

    def tick(self) -> None:
        if time.monotonic() - self._looked > POLL_S:
            self._looked = time.monotonic()
            self.tell()

    def next_job(self, node: Node) -> Job | None:
        if self._complete:
            return None
        self._at_work += 1
        return self._share()

    def on_event(self, node: Node, event: dict[str, Any]) -> None:
        if "error" in event:
            self._errors[node.id] = event["error"]
        else:
            self._complete = True

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        self._at_work -= 1
        if lost:
            _miss(self._study, self._url, node)
        elif error := self._errors.pop(node.id, ""):
            if self._pool.nodes == [node]:
                raise StudyError(f"{node}: {error}")
            self._pool.refuse(node, error)

    def tell(self) -> None:
        """Pass on trials of our machines that have ended since; workers and others tell theirs."""
        for trial in self._finished():
            if trial.number not in self._told:
                self._told.add(trial.number)
                died = trial.state.name == "FAIL" and "error" not in trial.user_attrs
                place = trial.user_attrs.get("origin", {}).get("place", {})
                if place.get("node") in self._pool.seen_nodes and not died:
                    self._listener.ended(trial)

    def _finished(self) -> list[Any]:
        return [t for t in self._study.get_trials(deepcopy=False) if t.state.is_finished()]


def _miss(study: Study, url: str, node: Node) -> None:
    """Put the trial of a machine that died into the queue again, without waiting for heartbeats."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("origin", {}).get("place", {}).get("node") == node.id:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            storage.retry(url, study, trial)
