"""A training run in MLflow: settings, metrics by step, metrics of the machine, status."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.tracking import run_owners, store
from danon.training import checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from danon.training.trainer import Listener

__all__ = ["record_training"]

PATIENCE = {"retries": 2, "timeout_s": 20}
RUN_FILE = "mlflow-run"
"""File with the id of the MLflow run that records the training of a directory."""
LOST_TAG = "danon.lost"
"""Tag of a run with the step from which on the store failed."""

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def record_training(
    name: str,
    settings: Mapping[str, Any],
    *,
    experiment: str = "training",
    directory: Path | None = None,
) -> Iterator[Listener]:
    """Record a training as a run of the experiment ``danon/<experiment>``.

    The run ends as FINISHED, FAILED on an error or KILLED on an interruption. If the process dies,
    the next bench marks the run KILLED. A metric that MLflow refuses is left out with a warning,
    and a store that fails ends the recording with one. Neither ends the training. The tags
    ``danon.refused.<name>`` and ``danon.lost`` of the run name them.

    Args:
        name: name of the run.
        settings: parameters of the run.
        experiment: last part of the experiment's name.
        directory: folder that keeps the run's id, so that a resumed training continues the run.

    Yields:
        A listener for a :class:`~danon.training.Trainer`.

    Raises:
        StoreError: the store cannot be used, or refuses to resume with other settings.
        ValueError: another process records from this directory.
    """
    uri = store.tracking_uri()
    client = store.connect(uri)
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    with contextlib.ExitStack() as held:
        if directory is not None:
            held.enter_context(checkpoint.locked(directory, f".{RUN_FILE}.lock"))
        # For the whole run: else the monitor's thread retries a dead server for minutes.
        held.enter_context(store.bounded_retries(**PATIENCE))
        run_file = None if directory is None else directory / RUN_FILE
        try:
            where = store.experiment_id(client, uri, experiment)
            run_id, resumed = _open(client, uri, where, name, settings, run_file)
        except store.failures() as error:
            raise store.StoreError(
                f"{store.redact_password(uri)}: {store.root_cause(error)}"
            ) from error
        status, listener = "FAILED", _Listener(client, uri, run_id)
        monitor: Any = None
        try:
            monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
                run_id, tracking_uri=uri, resume_logging=resumed
            )
            monitor.start()
            yield listener
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if monitor is not None:
                monitor.finish()
            listener.end(status)


class _Listener:
    """Listener that records metrics in a run, and warns once of each that is not recorded."""

    def __init__(self, client: MlflowClient, uri: str, run_id: str) -> None:
        self._client, self._uri, self._run_id = client, uri, run_id
        self._refused: set[str] = set()
        self._lost = ""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if self._lost:
            return  # retrying a dead store at every step would take longer than training
        now = int(time.time() * 1000)
        entries = [Metric(str(k), v, now, step) for k, v in metrics.items()]
        try:
            refused = store.log_accepted(self._client, self._run_id, entries)
        except store.failures() as error:
            self._lost = f"from step {step} on it is not recorded"
            self._say(f"training goes on, but {self._lost}", error)
            return
        for name in refused.keys() - self._refused:
            self._refused.add(name)
            message = "MLflow at %s refuses a metric of step %d, which is not recorded: %s"
            _log.warning(message, store.redact_password(self._uri), step, refused[name])

    def end(self, status: str) -> None:
        """Set the status of the run, and a tag if metrics are missing."""
        try:
            if self._lost:
                self._client.set_tag(self._run_id, LOST_TAG, self._lost)
            self._client.set_terminated(self._run_id, status)
        except store.failures() as error:
            self._say(f"the end of run {self._run_id} ({status}) is not recorded", error)

    def _say(self, what: str, error: Exception) -> None:
        uri = store.redact_password(self._uri)
        _log.warning("%s in MLflow at %s: %s", what, uri, store.root_cause(error))


def _open(
    client: MlflowClient,
    uri: str,
    experiment_id: str,
    name: str,
    settings: Mapping[str, Any],
    run_file: Path | None,
) -> tuple[str, bool]:
    """Return the id of the run that ``run_file`` names or of a new one; True if it existed."""
    from mlflow.entities import Param, RunTag

    tags = run_owners.owner_tags(uri, name)
    params = [Param(k, str(v)) for k, v in settings.items()]
    run_id = None if run_file is None else _still_there(client, run_file)
    if run_id is not None:
        # MLflow refuses changed settings here, before the status becomes RUNNING.
        client.log_batch(run_id, params=params, tags=[RunTag(*item) for item in tags.items()])
        client.update_run(run_id, status="RUNNING")
        return run_id, True
    run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    try:
        client.log_batch(run_id, params=params)
        if run_file is not None:
            run_file.write_text(run_id, encoding="utf-8")
    except BaseException:
        with contextlib.suppress(*store.failures()):
            client.set_terminated(run_id, "FAILED")
        raise
    return run_id, False


def _still_there(client: MlflowClient, run_file: Path) -> str | None:
    """Return the id in a file if the store has that run."""
    from mlflow.exceptions import MlflowException

    if not run_file.exists():
        return None
    run_id = run_file.read_text(encoding="utf-8").strip()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None  # of another store, or the file was cut off
        raise
    return run_id if run.info.lifecycle_stage == "active" else None
