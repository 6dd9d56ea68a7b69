"""Run the trials of a study here, or (:mod:`danon.tuning.ray_executor`) on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from danon.tuning.evaluator import SubprocessEvaluator
from danon.tuning.study_run import StudyRun
from danon.tuning.subject import Description, Subject
from danon.tuning.trial_loop import run_trials

__all__ = ["Executor", "LocalExecutor"]


class Executor(Protocol):
    """A way to run the trials of one subject."""

    def describe(self) -> Description:
        """Return the space, the default choice and what else the measuring process knows."""
        ...

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the settings that each choice stands for."""
        ...

    def run(self, run: StudyRun, *, queued: bool = False) -> None:
        """Run trials; see :func:`danon.tuning.trial_loop.run_trials`."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


class LocalExecutor:
    """An executor that runs one trial after the other, on this machine.

    Args:
        subject: what the trials measure.
        log: file that gets what the measuring process prints.
    """

    def __init__(self, subject: Subject, log: Path) -> None:
        self._evaluator = SubprocessEvaluator(subject, log)

    def describe(self) -> Description:
        """Return the space, the default choice and what else the measuring process knows."""
        return self._evaluator.describe()

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the settings that each choice stands for."""
        return [self._evaluator.settings(choice) for choice in choices]

    def run(self, run: StudyRun, *, queued: bool = False) -> None:
        """Run trials; see :func:`danon.tuning.trial_loop.run_trials`."""
        run_trials(run, self._evaluator, queued=queued)

    def close(self) -> None:
        """End the measuring process."""
        self._evaluator.close()
