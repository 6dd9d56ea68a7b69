"""Who measures trials: a process of its own, that may die without taking the study with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from danon.measure.machine_lock import device_lock
from danon.processes.interpreter import python_environment
from danon.processes.request_server import EndedError, RefusedError, WorkerProcess
from danon.tuning.study import Plan, StudyError, differing

__all__ = ["Evaluator", "SubprocessEvaluator", "TrialError"]


class TrialError(RuntimeError):
    """The choice has no figures; says why."""


class Evaluator(Protocol):
    """Measures choices of one plan."""

    def steps(
        self, choice: Mapping[str, Any], seed: int, *, fresh: bool
    ) -> Iterator[dict[str, float]]:
        """Figures of a choice, more with each step; whoever has seen enough stops.

        Args:
            seed: of what is random in a measurement.
            fresh: in a process that has measured nothing: processes differ by a percent or more.

        Raises:
            TrialError: the choice cannot be measured, or what measured it died.
            StudyError: there are other choices now than when the study began.
        """
        ...


class SubprocessEvaluator:
    """A process on this machine, started again when it has died.

    It takes a second to start, which passes while there is something else to do: the first one is
    started at once, that of the next turn of repeats when the times of this one are known.

    Args:
        plan: what it measures; ``space`` and ``known`` of it are not needed.
        log: gets what it prints.
    """

    def __init__(self, plan: Plan, log: Path) -> None:
        self._plan, self._log = plan, log
        self._server: WorkerProcess | None = None
        self._spare: WorkerProcess | None = None
        self._used = self._interrupted = False
        self._space = ""
        self._coming()

    def describe(self) -> dict[str, Any]:
        """Of what is tuned.

        ``space`` (JSON), ``default``, ``starts`` (choices), ``known`` objectives, ``machine``.

        Raises:
            TrialError: there is nothing to tune, or it cannot run here; says why.
        """
        found: dict[str, Any] = self._ask("describe")
        return found

    def settings(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """What a choice stands for."""
        found: dict[str, Any] = self._ask("settings", choice=dict(choice))
        return found

    def steps(
        self, choice: Mapping[str, Any], seed: int, *, fresh: bool
    ) -> Iterator[dict[str, float]]:
        with device_lock(self._plan.device):
            if fresh and self._used:
                self._end()
            self._used = True
            self._ask("begin", choice=dict(choice), seed=seed)
            while (found := self._ask("advance")) is not None:
                yield found
                if fresh and "time_ratio" in found:
                    self._coming()

    def close(self) -> None:
        """End the process, and the one that was to follow it."""
        self._end()
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def interrupt(self) -> None:
        """From another thread: as if whoever measures had pressed Ctrl-C."""
        self._interrupted = True
        if (server := self._server) is not None:
            server.kill()

    def _ask(self, do: str, **arguments: Any) -> Any:
        if self._interrupted:
            raise KeyboardInterrupt
        try:
            if self._server is None:
                self._server = self._started()
            return self._server.request(do, **arguments)
        except RefusedError as error:
            raise TrialError(str(error)) from error
        except EndedError as error:
            self._end()
            if self._interrupted:
                raise KeyboardInterrupt from error
            raise TrialError(f"the process that measured died: {error}") from error
        except KeyboardInterrupt:  # its answer would be taken for that to the next request
            self._end()
            raise

    def _end(self) -> None:
        server, self._server, self._used = self._server, None, False
        if server is not None:
            server.close()

    def _coming(self) -> WorkerProcess:
        if self._spare is None:
            self._spare = WorkerProcess(
                ("-m", "danon.tuning.trial_server"),
                cwd=Path.cwd(),
                log=self._log,
                environment=python_environment(),
            )
        return self._spare

    def _started(self) -> WorkerProcess:
        server, self._spare = self._coming(), None
        try:
            plan = self._plan
            server.request(
                "open",
                kind=plan.kind,
                attention=plan.attention,
                length=plan.length,
                dtype=plan.dtype,
                device=plan.device,
            )
            space = server.request("describe")["space"]
            self._space = self._space or space
            if space != self._space:
                raise StudyError(
                    f"what there is to choose of {plan.attention} has changed since this study "
                    f"began: {differing(self._space, space)}"
                )
        except BaseException:
            server.close()
            raise
        return server
