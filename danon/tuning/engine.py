"""Where the trials of a study are run: here, or (``spread``) on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from danon.tuning.evaluator import Local
from danon.tuning.study import Plan
from danon.tuning.worker import Ledger, work

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["Engine", "Here"]


class Engine(Protocol):
    """Runs trials of one plan."""

    def describe(self) -> dict[str, Any]:
        """As :meth:`Local.describe`."""
        ...

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What choices stand for."""
        ...

    def run(
        self, study: Study, trials: int, ledger: Ledger, origin: Mapping[str, Any], *,
        queued: bool = False,
    ) -> None:  # fmt: skip
        """As :func:`danon.tuning.worker.work`."""
        ...

    def close(self) -> None: ...


class Here:
    """This process, one trial after the other.

    Args:
        log: gets what the measuring process prints.
    """

    def __init__(self, plan: Plan, log: Path) -> None:
        self._local = Local(plan, log)

    def describe(self) -> dict[str, Any]:
        return self._local.describe()

    def settings(self, choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._local.settings(choice) for choice in choices]

    def run(
        self, study: Study, trials: int, ledger: Ledger, origin: Mapping[str, Any], *,
        queued: bool = False,
    ) -> None:  # fmt: skip
        work(study, self._local, trials, ledger, origin=origin, queued=queued)

    def close(self) -> None:
        self._local.close()
