"""Measure trials in a process of their own, which may die without ending the study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from danon.measure.machine_lock import device_lock
from danon.processes.interpreter import python_environment
from danon.processes.request_server import EndedError, RefusedError, WorkerProcess
from danon.tuning.study import StudyError, differing
from danon.tuning.subject import Description, Subject

__all__ = ["Evaluator", "SubprocessEvaluator", "TrialError"]


class TrialError(RuntimeError):
    """A choice without figures; the message says why."""


class Evaluator(Protocol):
    """A way to measure choices of one subject."""

    def steps(
        self, choice: Mapping[str, Any], seed: int, *, fresh: bool
    ) -> Iterator[dict[str, float]]:
        """Yield figures of a choice, more with each step, until the caller has seen enough.

        Args:
            choice: a value for each range of the space.
            seed: seed of what is random in a measurement.
            fresh: measure in a new process: processes differ by a percent or more.

        Raises:
            TrialError: the choice cannot be measured, or the process that measured it died.
            StudyError: the space has changed since the study began.
        """
        ...


class SubprocessEvaluator:
    """A measuring process on this machine, started again when it has died.

    A process takes a second to start, so it starts while something else is done. The first one
    starts at once; the one for the next repeats starts when the times of this one are known.

    Args:
        subject: what it measures.
        log: file that gets what it prints.
    """

    def __init__(self, subject: Subject, log: Path) -> None:
        self._subject, self._log = subject, log
        self._server: WorkerProcess | None = None
        self._spare: WorkerProcess | None = None
        self._used = self._interrupted = False
        self._space = ""
        self._start_spare()

    def describe(self) -> Description:
        """Return the space, the default choice and what else the process knows.

        Raises:
            TrialError: there is nothing to tune, or it cannot run here; says why.
        """
        return Description.read(self._request("describe"))

    def settings(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a choice stands for."""
        settings: dict[str, Any] = self._request("settings", choice=dict(choice))
        return settings

    def steps(
        self, choice: Mapping[str, Any], seed: int, *, fresh: bool
    ) -> Iterator[dict[str, float]]:
        """Yield figures of a choice, with the machine reserved; see :meth:`Evaluator.steps`."""
        with device_lock(self._subject.device):
            if fresh and self._used:
                self._end()
            self._used = True
            self._request("begin", choice=dict(choice), seed=seed)
            while (figures := self._request("advance")) is not None:
                yield figures
                if fresh and "time_ratio" in figures:
                    self._start_spare()

    def close(self) -> None:
        """End the process, and the one that would follow it."""
        self._end()
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def interrupt(self) -> None:
        """End the measurement with KeyboardInterrupt; called from another thread."""
        self._interrupted = True
        if (server := self._server) is not None:
            server.kill()

    def _request(self, do: str, **arguments: Any) -> Any:
        if self._interrupted:
            raise KeyboardInterrupt
        try:
            if self._server is None:
                self._server = self._open()
            return self._server.request(do, **arguments)
        except RefusedError as error:
            raise TrialError(str(error)) from error
        except EndedError as error:
            self._end()
            if self._interrupted:
                raise KeyboardInterrupt from error
            raise TrialError(f"the process that measured died: {error}") from error
        except KeyboardInterrupt:  # the next request would get this one's answer
            self._end()
            raise

    def _end(self) -> None:
        server, self._server, self._used = self._server, None, False
        if server is not None:
            server.close()

    def _start_spare(self) -> WorkerProcess:
        """Return the process that comes next, started if it is not."""
        if self._spare is None:
            self._spare = WorkerProcess(
                ("-m", "danon.tuning.trial_server"),
                cwd=Path.cwd(),
                log=self._log,
                environment=python_environment(),
            )
        return self._spare

    def _open(self) -> WorkerProcess:
        """Return a process that is ready to measure the subject."""
        server, self._spare = self._start_spare(), None
        try:
            server.request("open", **asdict(self._subject))
            space = server.request("describe")["space"]
            self._space = self._space or space
            if space != self._space:
                raise StudyError(
                    f"what there is to choose of {self._subject.attention} has changed since this "
                    f"study began: {differing(self._space, space)}"
                )
        except BaseException:
            server.close()
            raise
        return server
