"""The MLflow store: its address, its creation, its locks, and calls that survive refusals."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import sqlite3
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from danon.runs.folders import project_root
from danon.runs.locks import hold_lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run, RunTag

__all__ = [
    "StoreError",
    "artifact_location",
    "bounded_retries",
    "connect",
    "experiment_id",
    "failures",
    "lock_prefix",
    "log_accepted",
    "redact_password",
    "root_cause",
    "runs_where",
    "sqlite_file",
    "sqlite_uri",
    "tracking_uri",
]

PROBE_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 120  # creating the schema takes seconds, on a loaded machine tens of them
SHARED = Path("/var/tmp")
"""Folder that all users of a machine share and that survives a restart."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Error codes of MLflow for a refused name or value; a failing store has other codes."""
REFUSED = "danon.refused"
"""Prefix of the tags that list refused names and values."""
REFUSED_NAME, REFUSED_LENGTH = 200, 1000  # characters
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class StoreError(RuntimeError):
    """The store cannot be used; the message names the store and the reason."""


def tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI``, or the sqlite file of the current repository."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return sqlite_uri(project_root() / ".mlflow" / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """Return SQLAlchemy's address of a sqlite file, with special characters quoted.

    Args:
        file: absolute path.
    """
    special = {ord(letter): quote(letter) for letter in "%?#"}
    return f"sqlite:///{str(file).translate(special)}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for any other store, or one in memory.

    Args:
        uri: address of the store.

    Raises:
        StoreError: the address contains a path that must be quoted.
    """
    head, separator, written = uri.partition(":///")
    path, _, query = written.partition("?")
    path = unquote(path)
    if not separator or head.split("+")[0] != "sqlite" or path in ("", ":memory:"):
        return None
    if path.startswith("file:"):
        return None
    file, meant = Path(path).absolute(), Path(written).absolute()
    elsewhere = meant.parent != file.parent and not file.exists()
    if elsewhere and meant.parent.is_dir() and ("/" in query or not file.parent.is_dir()):
        raise StoreError(f"{uri} is {file}: {meant} must be written {sqlite_uri(meant)}")
    return file


def redact_password(uri: str) -> str:
    """Return a store's address without its password, for messages.

    Args:
        uri: address of the store.
    """
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def artifact_location(uri: str) -> str | None:
    """Return the folder of artifacts of a store without a server; None: the server decides.

    Args:
        uri: address of the store.
    """
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "artifacts").as_uri()


def lock_prefix(uri: str) -> Path:
    """Return the prefix of a store's lock files: beside its file, or in :data:`SHARED`.

    Args:
        uri: address of the store.
    """
    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file
    folder = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"danon-store-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Hold the store's lock: one process of this machine at a time runs the block.

    Args:
        uri: address of the store.

    Raises:
        StoreError: another process holds the lock for too long, or it cannot be written.
    """
    shown, path = redact_password(uri), Path(f"{lock_prefix(uri)}.lock")
    with hold_lock(
        path,
        StoreError(f"{shown}: locked by another process ({path})"),
        timeout_s=LOCK_TIMEOUT_S,
        for_everybody=True,
        unwritable=lambda error: StoreError(f"{shown}: {error}"),
    ):
        yield


@contextlib.contextmanager
def bounded_retries(*, retries: int, timeout_s: int) -> Iterator[None]:
    """Limit how long MLflow waits for a server inside the block; its default is minutes.

    MLflow reads these variables at every request. Its log is silenced: it would have a traceback
    for every retry, and two lines for every run that ends.

    Args:
        retries: repeated requests after a failure.
        timeout_s: seconds to wait for an answer.
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
    """Return the exceptions of a store that cannot be reached or used."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # UnicodeError: a path with letters that the locale does not have.
    return (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, UnicodeError)


def connect(uri: str) -> MlflowClient:
    """Return a client of a store that answers; a new store gets its schema.

    Args:
        uri: address of the store.

    Raises:
        StoreError: mlflow or a driver is missing, nothing answers, or the store refuses. It is
            raised within seconds.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it starts threads while we measure
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise StoreError("mlflow is not installed (pip install danon[bench])") from error
    except RuntimeError as error:  # for a user whom the system does not know, and no HOME
        raise StoreError(f"mlflow does not import ({error}): set HOME to a folder") from error
    try:
        with bounded_retries(retries=0, timeout_s=PROBE_TIMEOUT_S):
            if urlsplit(uri).scheme in ("http", "https"):
                client = MlflowClient(uri)
                client.search_experiments(max_results=1)
                return client
            with exclusive(uri):  # several processes that create one schema at once break it
                _probe(uri)
                return MlflowClient(uri)
    except ImportError as error:
        raise StoreError(f"{redact_password(uri)}: {error}") from error
    except failures() as error:
        raise StoreError(f"{redact_password(uri)}: {root_cause(error)}") from error


def _probe(uri: str) -> None:
    """Fail at once if a database is broken or does not answer; MLflow would retry for minutes."""
    file = sqlite_file(uri)
    if file is not None and file.exists():
        with contextlib.closing(sqlite3.connect(file, timeout=PROBE_TIMEOUT_S)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    parts = urlsplit(uri)
    port = DATABASE_PORTS.get(parts.scheme.split("+")[0])
    if port is not None and parts.hostname:
        address = (parts.hostname, parts.port or port)
        socket.create_connection(address, timeout=PROBE_TIMEOUT_S).close()


def root_cause(error: BaseException) -> str:
    """Return the innermost reason of an error, in one line.

    Example:
        A library's paragraphs around a refused connection give ``[Errno 111] Connection refused``.

    Args:
        error: error of a library.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | sqlite3.Error):
            error = inner
        inner = inner.__cause__ or inner.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]


def experiment_id(client: MlflowClient, uri: str, suite: str) -> str:
    """Return the id of the experiment ``danon/<suite>``, created or restored if it is missing.

    Args:
        client: client of the store.
        uri: address of the store.
        suite: name of the suite.

    Raises:
        MlflowException: the experiment cannot be created.
    """
    from mlflow.exceptions import MlflowException

    name = f"danon/{suite}"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        root = artifact_location(uri)
        location = None if root is None else f"{root}/{suite}"
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # another bench was faster
            if experiment is None:
                raise error
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def runs_where(client: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    """Return every run that meets an MLflow filter, from all pages.

    Args:
        client: client of the store.
        experiments: ids of experiments.
        condition: filter in MLflow's syntax.
    """
    runs: list[Run] = []
    token: Any = None
    while True:
        page = client.search_runs(experiments, condition, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def log_accepted(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Metric] = (),
    params: Sequence[Param] = (),
    tags: Sequence[RunTag] = (),
) -> dict[str, str]:
    """Log a batch; a refused name or value does not affect the rest.

    Args:
        client: client of the store.
        run_id: id of the MLflow run.
        metrics: metrics to log.
        params: parameters to log.
        tags: tags to log.

    Returns:
        Refused name -> name, value and MLflow's reason. The run has them in tags
        ``danon.refused.<name>``.

    Raises:
        MlflowException: the store fails.
    """
    from mlflow.entities import RunTag

    refused = _refused(client, run_id, {"metrics": metrics, "params": params, "tags": tags})
    if refused:
        texts = {re.sub(r"[^\w-]", "_", name)[:REFUSED_NAME]: x for name, x in refused.items()}
        notes = [RunTag(f"{REFUSED}.{name}", x[:REFUSED_LENGTH]) for name, x in texts.items()]
        client.log_batch(run_id, tags=notes)
    return refused


def _refused(client: MlflowClient, run_id: str, batch: dict[str, Any]) -> dict[str, str]:
    """Log a batch, or its items one by one, and return the refused ones."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, **batch)
    except MlflowException as error:
        if error.error_code not in REFUSALS:
            raise
        each = [(field, item) for field, items in batch.items() for item in items]
        if len(each) == 1:
            ((_, item),) = each
            return {item.key: f"{item.key} = {item.value!r} ({root_cause(error)})"}
        refused: dict[str, str] = {}
        for field, item in each:
            refused |= _refused(client, run_id, {field: [item]})
        return refused
    return {}
