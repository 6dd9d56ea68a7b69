"""One invocation of a bench on disk: what it was run with, and a journal of every case."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import errno
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from danon.experiment.process import Owner, end, is_held
from danon.experiment.schema import (
    SchemaError,
    check_date,
    check_tasks,
    parse_case,
    parse_versioned,
)
from danon.measure.case import SCHEMA, STRICT, CaseResult

__all__ = [
    "UNKNOWN",
    "UNWRITABLE",
    "Journal",
    "RecordedRun",
    "RunInfo",
    "RunStatus",
    "commit_of",
    "readable_runs",
    "recorded_runs",
    "replace_file",
    "why_unknown",
]

UNKNOWN = "unknown"
"""Instead of a commit, where there is none."""


RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

# Packages whose version can move a figure.
PACKAGES = (
    "danon", "torch", "triton", "numpy", "transformers", "xformers", "flash-attn",
    "flash-linear-attention", "local-attention", "linformer", "performer-pytorch",
    "native-sparse-attention-pytorch", "pytest-benchmark", "mlflow",
)  # fmt: skip

UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE, errno.EBUSY,
}  # fmt: skip
"""What is wrong with a disk or a folder; other errors of the system are defects."""

LOCK = ".owner.lock"
"""File in a run's folder that the process which runs it holds locked."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """Where the figures of one invocation come from.

    Attributes:
        run_id: sorts by start time; unique without coordination.
        started: ISO-8601, UTC.
        commit: of the checkout of danon that was measured, or, with an installed danon, of the
            repository the command ran in; "unknown" outside one.
        dirty: there were changes that no commit holds.
        fingerprint: the machine. Absolute times compare only where it is equal.
        versions: installed package -> version.
        command: as it was typed.
        basis: what decides the figures besides, by name; digests where it is code.
    """

    run_id: str
    started: str
    commit: str
    dirty: bool
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    profile: str
    seed: int
    command: str
    basis: dict[str, str] = dataclasses.field(default_factory=dict)

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    @classmethod
    def capture(
        cls,
        profile: str,
        seed: int,
        command: str,
        fingerprint: dict[str, Any],
        basis: Mapping[str, str] | None = None,
    ) -> Self:
        """Describe the invocation that starts now."""
        now = dt.datetime.now(dt.UTC)
        commit, dirty = commit_of()
        return cls(
            run_id=f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
            started=now.isoformat(timespec="seconds"),
            commit=commit,
            dirty=dirty,
            fingerprint=fingerprint,
            versions=_versions(),
            profile=profile,
            seed=seed,
            command=command,
            basis=dict(basis or {}),
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # absence is what the row "unavailable" is for
    return found


def _git(place: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where there is no git, no repository or no such thing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout).strip()  # paths, in the system's own encoding


def commit_of() -> tuple[str, bool]:
    """(commit, dirty) of the checkout of danon that holds this very file.

    Of an installed danon it is that of the repository one stands in, which has the attention that
    is measured; which danon it is the versions say. What commands write, results/ and .mlflow/,
    makes nothing dirty: each result records the settings it is of.
    """
    here = Path(__file__).resolve()
    name = "/".join(here.parts[-3:])
    checkout, own = (
        _git(place, "rev-parse", "--show-toplevel") for place in (here.parents[2], Path.cwd())
    )
    if checkout is None or _git(Path(checkout), "ls-files", "--error-unmatch", name) is None:
        checkout = own  # where danon is installed somebody else's repository may be around it
    commit = checkout and _git(Path(checkout), "rev-parse", "HEAD")
    if not checkout or not commit:
        return UNKNOWN, False
    code = ("--", ".", ":(exclude)results", ":(exclude).mlflow")
    return commit, bool(_git(Path(checkout), "status", "--porcelain", *code))


def why_unknown() -> str:
    """Return why :func:`commit_of` knows no commit, in words for a user."""
    here = Path(__file__).resolve()
    root = here.parents[2]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError:
        return "git is not installed"
    if "dubious ownership" in done.stderr:
        return (
            f"git does not trust {root}, which belongs to another user: "
            f"git config --global --add safe.directory {root}"
        )
    if "not a git repository" in done.stderr:
        return (
            f"danon is installed in {here.parents[1]}, which is in no git repository, and nor is "
            "this folder"
        )
    return f"the git repository around {root} has no commit that holds danon"


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that a reader, or a kill, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file, which those of a full disk do not."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@dataclass(frozen=True)
class _StoredOwner:
    """The process that runs, or ran, an invocation: for people, its lock decides."""

    host: str
    pid: int

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "ignore"}


@dataclass(frozen=True)
class _RunFile:
    """What ``run.json`` holds."""

    schema: int
    info: RunInfo
    status: RunStatus
    owner: _StoredOwner

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT


class Journal:
    """The folder of one invocation: ``run.json`` and ``cases.jsonl``, one line a case.

    A line counts once its newline is on disk, so a kill costs at most the case being written. The
    process that runs it holds a lock in the folder meanwhile.
    """

    def __init__(self, run_dir: Path) -> None:
        """Open an existing folder.

        Raises:
            FileNotFoundError: the folder holds no ``run.json``.
        """
        self.run_dir = Path(run_dir)
        self._run = self.run_dir / "run.json"
        self._cases = self.run_dir / "cases.jsonl"
        self._lock = self.run_dir / LOCK
        if not self._run.is_file():
            raise FileNotFoundError(f"{self.run_dir} is no recorded run: it has no run.json")
        self._repaired = False

    @classmethod
    def create(cls, root: Path, info: RunInfo) -> Self:
        """Make ``root/<run_id>`` with status RUNNING."""
        run_dir = Path(root) / info.run_id
        run_dir.mkdir(parents=True)
        owner = Owner.current(run_dir / LOCK)
        _write_run(run_dir / "run.json", info, "RUNNING", owner)
        return cls(run_dir)

    def append(self, result: CaseResult) -> None:
        """Add a case; it is on disk when this returns."""
        if not self._repaired:
            self._drop_torn_line()
        with _named(self._cases), self._cases.open("ab") as file:
            file.write(result.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def results(self) -> list[CaseResult]:
        """Every case, in order of first measurement; of a case measured again the last line.

        Raises:
            SchemaError: a line is not a case, naming the file and the line.
        """
        whole, torn = self._lines()
        if torn:
            _log.warning("%s", self._torn_message(torn))
        found: dict[object, CaseResult] = {}
        for number, line in enumerate(whole, start=1):
            result = parse_case(line, f"{self._cases}, line {number}")
            found[result.case] = result
        return list(found.values())

    def info(self) -> RunInfo:
        """What the run was made with.

        Raises:
            SchemaError: ``run.json`` is none of this danon; so do the other readers of it.
        """
        return self._read().info

    def owner(self) -> Owner:
        """The process that runs, or ran, this invocation."""
        stored = self._read().owner
        return Owner(stored.host, stored.pid, self._lock)

    @property
    def status(self) -> RunStatus:
        """A run whose process ended without saying so was killed.

        A run of another host is believed: not every file system tells machines of each other's
        locks.
        """
        stored = self._read()
        if stored.status != "RUNNING" or stored.owner.host != socket.gethostname():
            return stored.status
        there = self._lock.exists()  # a copied folder need not have it
        if there and is_held(self._lock):
            return "RUNNING"
        # The process may have said how the run ended after the first reading.
        now = self._read().status
        return "KILLED" if now == "RUNNING" else now

    def set_status(self, status: RunStatus) -> None:
        """Store the status; RUNNING makes the calling process the owner (a resumed run).

        Raises:
            ValueError: no such status.
            OSError: the run is to go on, and another process runs it; or it cannot be written.
        """
        if status not in get_args(RunStatus):
            raise ValueError(f"status {status!r}: must be one of {', '.join(get_args(RunStatus))}")
        owner = Owner.current(self._lock) if status == "RUNNING" else self.owner()
        _write_run(self._run, self.info(), status, owner)
        if status != "RUNNING":
            end(self._lock)

    def _read(self) -> _RunFile:
        found = parse_versioned(_RunFile, self._run.read_bytes(), self._run)
        check_date(found.info.started, self._run)
        return found

    def _lines(self) -> tuple[list[bytes], bytes]:
        """(complete lines, torn rest)."""
        if not self._cases.exists():
            return [], b""
        *whole, rest = self._cases.read_bytes().split(b"\n")
        return whole, rest

    def _torn_message(self, torn: bytes) -> str:
        return (
            f"{self._cases}: the last line is incomplete ({len(torn)} bytes, the run was "
            "interrupted while writing it); that case counts as not measured"
        )

    def _drop_torn_line(self) -> None:
        _, torn = self._lines()
        if torn:
            _log.warning("%s", self._torn_message(torn))
            os.truncate(self._cases, self._cases.stat().st_size - len(torn))
        self._repaired = True


def _write_run(path: Path, info: RunInfo, status: RunStatus, owner: Owner) -> None:
    content = dataclasses.asdict(
        _RunFile(SCHEMA, info, status, _StoredOwner(owner.host, owner.pid))
    )
    replace_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


@dataclass(frozen=True)
class RecordedRun:
    """A run as it was read, all of it."""

    run_dir: Path
    info: RunInfo
    status: RunStatus
    results: list[CaseResult]

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read a folder.

        Raises:
            SchemaError: a file there is not readable; says which, and why.
            FileNotFoundError: the folder holds no ``run.json``.
        """
        journal = Journal(run_dir)
        try:
            run = cls(journal.run_dir, journal.info(), journal.status, journal.results())
        except OSError as error:
            raise SchemaError(f"{error.filename or run_dir}: {error.strerror or error}") from error
        check_tasks(run.results, journal.run_dir)
        return run


def recorded_runs(folder: Path, passed_over: Callable[[str], object]) -> Iterator[RecordedRun]:
    """The runs in a folder that can be read, the last first.

    Args:
        passed_over: hears which run cannot be read, and why.
    """
    for place in sorted(folder.glob("*/run.json"), reverse=True):
        try:
            yield RecordedRun.read(place.parent)
        except (SchemaError, FileNotFoundError) as error:
            passed_over(str(error))


def readable_runs(
    folders: Iterable[Path], passed_over: Callable[[str], object]
) -> list[RecordedRun]:
    """The runs in some folders, those of the first folder first; nothing where there are none.

    Args:
        passed_over: as in :func:`recorded_runs`.

    Raises:
        SchemaError: runs are recorded there, and not one can be read.
    """
    unreadable = list[str]()

    def hear(why: str) -> None:
        unreadable.append(why)
        passed_over(why)

    found = [run for folder in folders for run in recorded_runs(folder, hear)]
    if unreadable and not found:
        raise SchemaError(f"no recorded run can be read: {unreadable[0]}")
    return found
