"""Open the Optuna database that keeps the studies."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from danon.runs.folders import project_root
from danon.tracking.store import (
    StoreError,
    exclusive,
    redact_password,
    root_cause,
    sqlite_file,
    sqlite_uri,
    tracking_uri,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["default", "experimental", "failures", "load", "opened", "retry"]

HEARTBEAT_S, GRACE_S = 10, 60
"""Seconds between heartbeats, and of silence after which a trial's worker counts as dead."""
RETRIES = 1
"""Number of times that a trial whose worker died is tried again."""
BUSY_S = 60
"""Seconds that a sqlite database may be locked by other workers."""


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Silence the warnings of Optuna about its experimental features."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def load() -> type[RDBStorage]:
    """Return Optuna's storage class; importing it takes a second.

    Raises:
        StoreError: optuna is not installed.
    """
    try:
        from optuna.storages import RDBStorage
    except ImportError as error:
        raise StoreError("optuna is not installed (pip install danon[tuning])") from error
    return RDBStorage


def default() -> str:
    """Return the address of the sqlite file beside MLflow's, in the current repository."""
    file = sqlite_file(tracking_uri()) or project_root() / ".mlflow" / "mlflow.db"
    return sqlite_uri(file.with_name("optuna.db"))


@contextlib.contextmanager
def opened(url: str) -> Iterator[RDBStorage]:
    """Open a storage, and create its tables if it is new; leaving the block disconnects.

    Args:
        url: ``sqlite:///...`` or ``postgresql+psycopg://...``.

    Raises:
        StoreError: optuna or a driver is missing, the server is silent, or the file is read-only.
    """
    database = _connect(url)
    try:
        yield database
    finally:
        database.remove_session()
        database.engine.dispose()


def _connect(url: str) -> RDBStorage:
    storage_class = load()
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    local = urlsplit(url).scheme.startswith("sqlite")
    try:
        if (file := sqlite_file(url)) is not None:
            _check_writable(file)
        with (
            exclusive(url),
            experimental(),
        ):  # two processes that create the tables at once break them
            return storage_class(
                url,
                engine_kwargs={"connect_args": {"timeout": BUSY_S}}
                if local
                else {"pool_pre_ping": True, "connect_args": _connection_timeout(url)},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=partial(retry, url),
            )
    except ImportError as error:
        raise StoreError(
            f"--storage {redact_password(url)}: {error}; psycopg is in danon[tuning]"
        ) from error
    except (
        SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        sqlite3.Error,
        OSError,
        RuntimeError,
    ) as error:
        raise StoreError(f"--storage {redact_password(url)}: {root_cause(error)}") from error


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of a storage that fails during a study."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (StorageInternalError, SQLAlchemyError)


def retry(url: str, study: Study, died: FrozenTrial) -> None:
    """Put a trial whose worker died into the queue, once, however many workers call this.

    Args:
        url: address of the storage.
        study: the study.
        died: the trial, already failed.
    """
    import optuna

    with exclusive(url), experimental():  # sqlite locks no rows: several workers may have failed it
        before = (t.system_attrs.get("retry_history", [None])[-1] for t in study.trials)
        if died.number not in before:
            optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, died)


def _connection_timeout(url: str) -> dict[str, int]:
    """Return the arguments that let a silent server fail within seconds."""
    return {"connect_timeout": 5} if urlsplit(url).scheme.startswith("postgresql") else {}


def _check_writable(file: Path) -> None:
    """Refuse a read-only file or folder now; Optuna would fail only at the first trial.

    Raises:
        OSError: the file or its folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    target = file if file.exists() else file.parent
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{target} cannot be written")
