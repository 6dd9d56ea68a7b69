"""Recording of a bench in MLflow, while it runs or later from its journal."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

from danon.runs.journal import Journal, RecordedRun, RunStatus
from danon.runs.locks import hold_lock
from danon.runs.run_info import RunInfo
from danon.tracking import run_owners, store
from danon.tracking.run_tree import RunTree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from danon.runs.case import CaseResult

__all__ = ["Recorder", "upload"]

PATIENCE = {"retries": 1, "timeout_s": 20}  # a bench must not wait minutes for a dead server
COPY_INTERVAL_S = 60

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def _exclusive_recording(run_dir: Path) -> Iterator[None]:
    """Let one process at a time record a run: two would each create its MLflow runs."""
    with hold_lock(
        run_dir / ".recording.lock",
        store.StoreError(f"{run_dir} is being recorded by another process"),
        unwritable=lambda error: store.StoreError(f"{run_dir} cannot be written: {error}"),
    ):
        yield


class Recorder:
    """Records a bench in MLflow: its run from the start, its figures at the end.

    While the bench measures, its run has the status RUNNING and a copy of the journal, at most a
    minute old. Figures follow at the end: only then is the rank of each attention known, and work
    for MLflow would take cores from what is being timed. The journal on disk stays complete. A
    store that cannot be reached stops the recording, never the bench: ``danon record`` uploads the
    rest from the journal.

    Args:
        info: description of the run.
        journal: journal of the run.
    """

    def __init__(self, info: RunInfo, journal: Journal) -> None:
        self._info = info
        self._journal = journal
        self._uri = store.tracking_uri()
        self._tree: RunTree | None = None
        self._copied = 0.0
        self._open = contextlib.ExitStack()

    def start(self) -> str:
        """Connect, mark dead runs as KILLED, and begin the run or continue it.

        Returns:
            One line for the user: the store, or the reason for not recording.
        """
        try:
            self._open.enter_context(_exclusive_recording(self._journal.run_dir))
            self._tree = RunTree(store.connect(self._uri), self._uri, self._info)
            run_owners.reap_stale()
        except store.StoreError as error:
            self._tree = None
            self._open.close()
            return f"Not recording in MLflow: {error}. {self._later()}"
        self._copy()
        return (
            f"Recording in MLflow: {store.redact_password(self._uri)}"
            if self._recording()
            else self._not_recorded()
        )

    def log(self, result: CaseResult) -> None:
        """Notice that a case is in the journal; copy the journal if a minute has passed.

        Args:
            result: outcome of the case.
        """
        if time.monotonic() - self._copied > COPY_INTERVAL_S:
            self._copy()

    def finish(self, status: RunStatus) -> str:
        """Set the status of the journal and of the MLflow runs, and upload the files of the run.

        Args:
            status: final status of the run.

        Returns:
            One line for the user: the number of recorded cases, or how to record them later.
        """
        self._journal.set_status(status)
        if self._tree is None:
            return self._not_recorded()
        run_dir = self._journal.run_dir
        try:
            with store.bounded_retries(**PATIENCE):
                results = self._journal.results()
                new = self._tree.record(status, run_dir, results)
                models = self._tree.register(run_dir, results)
        except store.failures() as error:
            self._stop(error)
            return f"Recorded in part in MLflow. {self._later()}"
        self._open.close()
        address = store.redact_password(self._uri)
        refused = self._tree.refusals()
        return f"Recorded {new} cases in MLflow: {address}{models}{refused}"

    def _copy(self) -> None:
        """Upload the journal; without a store this does nothing."""
        if self._tree is None:
            return
        try:
            with store.bounded_retries(**PATIENCE):
                self._tree.keep_copy(self._journal.run_dir)
        except store.failures() as error:
            self._stop(error)
        self._copied = time.monotonic()

    def _recording(self) -> bool:
        return self._tree is not None

    def _not_recorded(self) -> str:
        return f"Not recorded in MLflow. {self._later()}"

    def _stop(self, error: Exception) -> None:
        self._tree = None
        self._open.close()
        reason = store.root_cause(error)
        _log.warning("MLflow recording stopped: %s. %s", reason, self._later())

    def _later(self) -> str:
        return (
            f"Results are on disk; `danon record {self._journal.run_dir}` uploads them when "
            "MLflow can be reached."
        )


def upload(run_dir: Path) -> str:
    """Record a run from its journal; cases that are recorded already stay unchanged.

    Args:
        run_dir: folder of the run.

    Returns:
        One line for the user: the number of new cases.

    Raises:
        FileNotFoundError: ``run_dir`` holds no run.
        SchemaError: the run in it cannot be read.
        StoreError: the store cannot be used, or the run has not ended.
    """
    run = RecordedRun.read(run_dir)
    if run.status == "RUNNING":
        owner = Journal(run_dir).owner()
        raise store.StoreError(
            f"{run_dir} is still running (process {owner.pid} on {owner.host}): "
            "upload it when it has ended"
        )
    uri = store.tracking_uri()
    with _exclusive_recording(run.run_dir):
        client = store.connect(uri)
        tree = RunTree(client, uri, run.info)
        try:
            with store.bounded_retries(**PATIENCE):
                new = tree.record(run.status, run.run_dir, run.results)
                models = tree.register(run.run_dir, run.results)
        except store.failures() as error:
            raise store.StoreError(
                f"{store.redact_password(uri)}: {store.root_cause(error)}"
            ) from error
    recorded = f"{run.info.run_id} is recorded in {store.redact_password(uri)}"
    return f"{new} of {len(run.results)} cases were new; {recorded}{models}{tree.refusals()}"
