"""Where studies are kept: a database of Optuna's."""

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
"""A trial whose worker is silent for GRACE_S has died with it."""
RETRIES = 1
"""Of a trial that died."""
BUSY_S = 60
"""That a sqlite database may be locked by other workers."""


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Where features of Optuna are used that it says may change."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def load() -> type[RDBStorage]:
    """Optuna's storage; importing it takes a second.

    Raises:
        StoreError: optuna is not installed.
    """
    try:
        from optuna.storages import RDBStorage
    except ImportError as error:
        raise StoreError("optuna is not installed (pip install danon[tuning])") from error
    return RDBStorage


def default() -> str:
    """The sqlite file beside MLflow's, in the repository one stands in."""
    file = sqlite_file(tracking_uri()) or project_root() / ".mlflow" / "mlflow.db"
    return sqlite_uri(file.with_name("optuna.db"))


@contextlib.contextmanager
def opened(url: str) -> Iterator[RDBStorage]:
    """A storage that answers, its tables made if it was new; its connections end with the block.

    Raises:
        StoreError: optuna or a driver is missing, nobody answers, or it cannot be written.
    """
    found = _connected(url)
    try:
        yield found
    finally:
        found.remove_session()
        found.engine.dispose()


def _connected(url: str) -> RDBStorage:
    kind = load()
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    local = urlsplit(url).scheme.startswith("sqlite")
    try:
        if (file := sqlite_file(url)) is not None:
            _writable(file)
        with exclusive(url), experimental():  # two that make the tables break them
            return kind(
                url,
                engine_kwargs={"connect_args": {"timeout": BUSY_S}}
                if local
                else {"pool_pre_ping": True, "connect_args": _patience(url)},
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
    """What a storage that fails in the middle raises."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (StorageInternalError, SQLAlchemyError)


def retry(url: str, study: Study, died: FrozenTrial) -> None:
    """Put a trial that died into the queue again, once, whoever else has missed it, too."""
    import optuna

    with exclusive(url), experimental():  # sqlite locks no rows: several may have failed it
        before = (t.system_attrs.get("retry_history", [None])[-1] for t in study.trials)
        if died.number not in before:
            optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, died)


def _patience(url: str) -> dict[str, int]:
    """A server that does not answer is known within seconds."""
    return {"connect_timeout": 5} if urlsplit(url).scheme.startswith("postgresql") else {}


def _writable(file: Path) -> None:
    """Raises: OSError: the file or its folder cannot be written: Optuna would say so at a trial."""
    file.parent.mkdir(parents=True, exist_ok=True)
    target = file if file.exists() else file.parent
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{target} cannot be written")
