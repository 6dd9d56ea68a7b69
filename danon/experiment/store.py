"""Where runs are recorded: which MLflow store, how it is made, and what is cleaned up in it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import sqlite3
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from danon.experiment.process import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "SUITES", "StoreError", "artifact_location", "connect", "experiment_id", "failures",
    "patience", "prepare", "reap_stale", "root_cause", "runs_where", "shown",
    "tracking_uri",
]  # fmt: skip

SUITES = (
    "speed", "memory", "scaling", "decode", "bounds", "recall", "language", "pretrained",
)  # fmt: skip
PROBE_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 120  # creating the schema takes seconds, on a loaded machine tens of them
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class StoreError(RuntimeError):
    """The store cannot be used now; the message says which and why."""


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or the sqlite file of the repository one stands in."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    here = Path.cwd()
    root = next((place for place in (here, *here.parents) if (place / ".git").exists()), here)
    return f"sqlite:///{root / '.mlflow' / 'mlflow.db'}"


def shown(uri: str) -> str:
    """A store's address without its password, for messages."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def _sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store, None for any other."""
    head, found, path = uri.partition(":///")
    if not found or head.split("+")[0] != "sqlite":
        return None
    return Path(path.partition("?")[0]).absolute()


def artifact_location(uri: str) -> str | None:
    """Where a store without a server keeps artifacts; None leaves it to the server."""
    file = _sqlite_file(uri)
    return None if file is None else (file.parent / "artifacts").as_uri()


def _lock(uri: str) -> FileLock:
    file = _sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{file}.lock", timeout=LOCK_TIMEOUT_S)
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return FileLock(f"{tempfile.gettempdir()}/danon-{digest}.lock", timeout=LOCK_TIMEOUT_S)


@contextlib.contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """While no other process of this machine is in one, for what two must not do at once.

    Raises:
        StoreError: another one does not come to an end.
    """
    try:
        with _lock(uri):
            yield
    except Timeout as error:
        raise StoreError(f"{shown(uri)}: locked by another process ({error})") from error


@contextlib.contextmanager
def patience(*, retries: int, timeout_s: int) -> Iterator[None]:
    """Bound how long MLflow waits for a server inside the block (its default is minutes).

    MLflow reads these variables at every request. It is also kept quiet: it would log a traceback
    for every retry, and two lines for every run that ends.
    """
    bounds = {
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
    }
    before = {name: os.environ.get(name) for name in bounds}
    database_log = logging.getLogger("mlflow.store.db.utils")
    level = database_log.level
    os.environ.update(bounds)
    database_log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
            yield
    finally:
        database_log.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def failures() -> tuple[type[Exception], ...]:
    """What a store that cannot be reached or used raises."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)


def connect(uri: str) -> MlflowClient:
    """A client of a store that answers, its schema made if it was new.

    Raises:
        StoreError: mlflow or a driver is missing, nobody answers, or the store refuses. Known
            within seconds.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it starts threads while we measure
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise StoreError("mlflow is not installed (pip install danon[bench])") from error
    try:
        with patience(retries=0, timeout_s=PROBE_TIMEOUT_S):
            if urlsplit(uri).scheme in ("http", "https"):
                client = MlflowClient(uri)
                client.search_experiments(max_results=1)
                return client
            with exclusive(uri):  # several processes that create one schema at once break it
                _knock(uri)
                return MlflowClient(uri)
    except ImportError as error:
        raise StoreError(f"{shown(uri)}: {error}") from error
    except failures() as error:
        raise StoreError(f"{shown(uri)}: {root_cause(error)}") from error


def _knock(uri: str) -> None:
    """Fail at once where a database is none or does not answer; MLflow would retry for minutes."""
    file = _sqlite_file(uri)
    if file is not None and file.exists():
        with contextlib.closing(sqlite3.connect(file, timeout=PROBE_TIMEOUT_S)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    parts = urlsplit(uri)
    port = DATABASE_PORTS.get(parts.scheme.split("+")[0])
    if port is not None and parts.hostname:
        address = (parts.hostname, parts.port or port)
        socket.create_connection(address, timeout=PROBE_TIMEOUT_S).close()


def root_cause(error: BaseException) -> str:
    """What failed in the end, in one line: libraries wrap "connection refused" in paragraphs."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | sqlite3.Error):
            error = inner
        inner = inner.__cause__ or inner.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]


def prepare() -> None:
    """Make the store that :func:`tracking_uri` names, with its experiments.

    Raises:
        StoreError: see :func:`connect`.
    """
    uri = tracking_uri()
    client = connect(uri)
    for suite in SUITES:
        experiment_id(client, uri, suite)


def experiment_id(client: MlflowClient, uri: str, suite: str) -> str:
    """Id of the experiment ``danon/<suite>``, made or restored where it is missing."""
    from mlflow.exceptions import MlflowException

    name = f"danon/{suite}"
    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifact_location(uri)
        location = None if root is None else f"{root}/{suite}"
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another bench was faster
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def runs_where(client: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    """Every run that meets an MLflow filter, over all pages."""
    found: list[Run] = []
    token: Any = None
    while True:
        page = client.search_runs(experiments, condition, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def reap_stale() -> int:
    """Mark runs KILLED that say RUNNING although their process on this host is gone.

    Returns:
        How many invocations were marked; the runs below them are marked with them.

    Raises:
        StoreError: see :func:`connect`.
    """
    uri = tracking_uri()
    client = connect(uri)
    try:
        with patience(retries=1, timeout_s=PROBE_TIMEOUT_S):
            return _reap(client, socket.gethostname())
    except failures() as error:
        raise StoreError(f"{shown(uri)}: {root_cause(error)}") from error


def _reap(client: MlflowClient, here: str) -> int:
    found = client.search_experiments()
    experiments = [e.experiment_id for e in found if e.name.startswith("danon/")]
    if not experiments:
        return 0
    running = f"attributes.status = 'RUNNING' AND tags.`danon.host` = '{here}'"
    stale = set()
    for run in runs_where(client, experiments, running):
        tags = run.data.tags
        owner = Owner(here, int(tags["danon.pid"]), float(tags["danon.process_start"]))
        if owner.gone():
            client.set_terminated(run.info.run_id, "KILLED")
            stale.add(tags["danon.run_id"])
    return len(stale)
