"""A training run in MLflow: settings, metrics by step, the machine's own, and how it ended."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.experiment.process import Owner
from danon.training import checkpoint

try:
    from danon.experiment import store
except ModuleNotFoundError as error:
    raise ImportError(
        f"recording needs the package {error.name}: pip install 'danon[bench]'"
    ) from error

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from danon.training.trainer import Listener

__all__ = ["recorded"]

PATIENCE = {"retries": 2, "timeout_s": 20}
RUN_FILE = "mlflow-run"
"""File with the id of the MLflow run that a directory's training is recorded in."""

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(
    name: str, settings: Mapping[str, Any], *, experiment: str = "training",
    directory: Path | None = None,
) -> Iterator[Listener]:  # fmt: skip
    """A run of the experiment ``danon/<experiment>``, open inside the ``with``.

    Its status is what happened: FINISHED, FAILED on an error, KILLED on an interruption; a process
    that died leaves a run that the next bench marks KILLED. A store that fails meanwhile ends the
    recording with a warning, never the training.

    Args:
        name: of the run.
        settings: its parameters.
        directory: keeps the run's id: entered again, the same run goes on, if the store has it.

    Yields:
        A listener for a :class:`~danon.training.Trainer`.

    Raises:
        StoreError: the store cannot be used, or refuses to go on with other settings.
        ValueError: another process records from this directory.
    """
    uri = store.tracking_uri()
    client = store.connect(uri)
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    def lost(what: str, error: Exception) -> None:
        _log.warning("%s in MLflow at %s: %s", what, store.shown(uri), store.root_cause(error))

    listening = True

    def listen(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal listening
        if not listening:
            return
        now = int(time.time() * 1000)
        try:
            client.log_batch(run_id, [Metric(k, v, now, step) for k, v in metrics.items()])
        except store.failures() as error:
            listening = False  # asking a dead store at every step would take longer than training
            lost(f"training goes on, but from step {step} on it is not recorded", error)

    with contextlib.ExitStack() as held:
        if directory is not None:
            held.enter_context(checkpoint.locked(directory, f".{RUN_FILE}.lock"))
        # All the while: the monitor's thread would ask a dead server for minutes, and we for it.
        held.enter_context(store.patience(**PATIENCE))
        kept = None if directory is None else directory / RUN_FILE
        try:
            where = store.experiment_id(client, uri, experiment)
            run_id, resumed = _open(client, where, name, settings, kept)
        except store.failures() as error:
            raise store.StoreError(f"{store.shown(uri)}: {store.root_cause(error)}") from error
        status = "FAILED"
        monitor: Any = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            run_id, tracking_uri=uri, resume_logging=resumed
        )
        monitor.start()
        try:
            yield listen
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            monitor.finish()
            try:
                client.set_terminated(run_id, status)
            except store.failures() as error:
                lost(f"the end of run {run_id} ({status}) is not recorded", error)


def _open(
    client: MlflowClient, experiment_id: str, name: str, settings: Mapping[str, Any],
    kept: Path | None,
) -> tuple[str, bool]:  # fmt: skip
    """Id of the run that the file ``kept`` names, or of a new one; whether it was there."""
    from mlflow.entities import Param, RunTag

    owner = Owner.current()
    tags = {"danon.run_id": name, "danon.host": owner.host, "danon.pid": str(owner.pid),
            "danon.process_start": repr(owner.started)}  # fmt: skip
    params = [Param(k, str(v)) for k, v in settings.items()]
    run_id = None if kept is None else _still_there(client, kept)
    if run_id is not None:
        # Changed settings are refused here, before the run that ended says RUNNING.
        client.log_batch(run_id, params=params, tags=[RunTag(*item) for item in tags.items()])
        client.update_run(run_id, status="RUNNING")
        return run_id, True
    run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    if kept is not None:
        kept.write_text(run_id, encoding="utf-8")
    client.log_batch(run_id, params=params)
    return run_id, False


def _still_there(client: MlflowClient, kept: Path) -> str | None:
    """The id in a file, if the store has that run."""
    from mlflow.exceptions import MlflowException

    if not kept.exists():
        return None
    run_id = kept.read_text(encoding="utf-8").strip()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None  # of another store, or the file was cut off
        raise
    return run_id if run.info.lifecycle_stage == "active" else None
