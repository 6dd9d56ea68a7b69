"""One invocation of a bench on disk: what it was run with, and a journal of every case."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from danon.runs.case import SCHEMA, STRICT, CaseResult
from danon.runs.files import _named, replace_file
from danon.runs.owner import Owner, end, is_held
from danon.runs.run_info import RunInfo
from danon.runs.schema import SchemaError, check_date, check_tasks, parse_case, parse_versioned

__all__ = ["Journal", "RecordedRun", "RunStatus", "readable_runs", "recorded_runs"]

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
LOCK = ".owner.lock"
"""File in a run's folder that the process which runs it holds locked."""
_log = logging.getLogger(__name__)


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
