"""Owners of MLflow runs: the process a run belongs to, and runs whose process is gone."""

from __future__ import annotations

import glob
import secrets
import socket
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from danon.runs.owner import Owner, is_held, remove_unheld
from danon.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["owner_tags", "reap_stale"]


@cache
def _owner_lock(uri: str) -> Path:
    """Return the lock file that shows other processes that this one lives."""
    return Path(f"{_owner_prefix(uri)}{secrets.token_hex(6)}.lock")


def _owner_prefix(uri: str) -> Path:
    return Path(f"{store.lock_prefix(uri)}.owner-{quote(socket.gethostname(), safe='')}-")


def owner_tags(uri: str, run_id: str) -> dict[str, str]:
    """Return the tags of a run's invocation and process.

    Args:
        uri: address of the store.
        run_id: id of the invocation.

    Raises:
        StoreError: the lock file that this process holds from now on cannot be created.
    """
    try:
        owner = Owner.current(_owner_lock(uri))
    except OSError as error:
        raise store.StoreError(f"{store.redact_password(uri)}: {error}") from error
    return {
        "danon.run_id": run_id,
        "danon.host": owner.host,
        "danon.pid": str(owner.pid),
        "danon.lock": str(owner.lock),
    }


def reap_stale() -> int:
    """Mark runs as KILLED that have the status RUNNING but whose process on this host is gone.

    Returns:
        Number of marked invocations; the runs below them are marked, too.

    Raises:
        StoreError: see :func:`danon.tracking.store.connect`.
    """
    uri = store.tracking_uri()
    client = store.connect(uri)
    try:
        with store.bounded_retries(retries=1, timeout_s=store.PROBE_TIMEOUT_S):
            return _reap(client, uri)
    except store.failures() as error:
        raise store.StoreError(
            f"{store.redact_password(uri)}: {store.root_cause(error)}"
        ) from error


def _reap(client: MlflowClient, uri: str) -> int:
    here = socket.gethostname()
    experiments = [
        e.experiment_id for e in client.search_experiments() if e.name.startswith("danon/")
    ]
    if not experiments:
        return 0
    running = f"attributes.status = 'RUNNING' AND tags.`danon.host` = '{here}'"
    stale, held = set(), cache(is_held)
    for run in store.runs_where(client, experiments, running):
        lock = run.data.tags.get("danon.lock")
        if lock and not held(Path(lock)) and _still_marked_running(client, run.info.run_id, lock):
            client.set_terminated(run.info.run_id, "KILLED")
            stale.add(run.data.tags["danon.run_id"])
    # The lock file of every run with the status RUNNING is held now; the others are unused.
    prefix = _owner_prefix(uri)
    for file in prefix.parent.glob(f"{glob.escape(prefix.name)}*.lock"):
        remove_unheld(file)
    return len(stale)


def _still_marked_running(client: MlflowClient, run_id: str, lock: str) -> bool:
    """Return True if a run still has the status RUNNING under a lock that is free.

    A process that ended between the search and the check of its lock has set another status.
    """
    run = client.get_run(run_id)
    return run.info.status == "RUNNING" and run.data.tags.get("danon.lock") == lock
