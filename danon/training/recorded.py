"""A training run in MLflow: settings, metrics by step, the machine's own, and how it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from danon.experiment import store
from danon.experiment.process import Owner

if TYPE_CHECKING:
    from danon.training.trainer import Listener

__all__ = ["recorded"]

PATIENCE = {"retries": 2, "timeout_s": 20}


@contextlib.contextmanager
def recorded(
    name: str, settings: Mapping[str, Any], *, experiment: str = "training"
) -> Iterator[Listener]:
    """A run of the experiment ``danon/<experiment>``, open inside the ``with``.

    Its status is what happened: FINISHED, FAILED on an error, KILLED on an interruption; a process
    that died leaves a run that the next bench marks KILLED.

    Args:
        name: of the run.
        settings: its parameters.

    Yields:
        A listener for a :class:`~danon.training.Trainer`.

    Raises:
        StoreError: the store cannot be used.
    """
    from mlflow.entities import Metric, Param
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    uri = store.tracking_uri()
    client = store.connect(uri)
    owner = Owner.current()
    tags = {"danon.run_id": name, "danon.host": owner.host, "danon.pid": str(owner.pid),
            "danon.process_start": repr(owner.started)}  # fmt: skip
    with store.patience(**PATIENCE):
        run = client.create_run(store.experiment_id(client, uri, experiment), run_name=name,
                                tags=tags)  # fmt: skip
        run_id = run.info.run_id
        client.log_batch(run_id, params=[Param(k, str(v)) for k, v in settings.items()])

    def listen(step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        with store.patience(**PATIENCE):
            client.log_batch(run_id, [Metric(k, v, now, step) for k, v in metrics.items()])

    monitor: Any = SystemMetricsMonitor(run_id, tracking_uri=uri)  # type: ignore[no-untyped-call]
    monitor.start()
    status = "FAILED"
    try:
        yield listen
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        monitor.finish()
        with store.patience(**PATIENCE):
            client.set_terminated(run_id, status)
