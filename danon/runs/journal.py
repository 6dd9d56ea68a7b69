"""One invocation of a bench on disk: its circumstances, and a journal of every case."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from danon.runs.case import SCHEMA, STRICT, CaseResult
from danon.runs.files import replace_file
from danon.runs.jsonl import append_line, drop_torn_line, read_lines
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
    """The process that runs, or ran, an invocation: for people; its lock decides."""

    host: str
    pid: int

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "ignore"}


@dataclass(frozen=True)
class _RunFile:
    """The content of ``run.json``."""

    schema: int
    info: RunInfo
    status: RunStatus
    owner: _StoredOwner

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT


class Journal:
    """The folder of one invocation: ``run.json`` and ``cases.jsonl``, one line a case.

    A line counts once its newline is on disk, so a kill costs at most the case being written. The
    process that runs the invocation holds a lock in the folder meanwhile.

    Args:
        run_dir: an existing folder.
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
        """Make ``root/<run_id>`` with status RUNNING.

        Args:
            root: folder of all runs.
            info: of this run.
        """
        run_dir = Path(root) / info.run_id
        run_dir.mkdir(parents=True)
        owner = Owner.current(run_dir / LOCK)
        _write_run(run_dir / "run.json", info, "RUNNING", owner)
        return cls(run_dir)

    def append(self, result: CaseResult) -> None:
        """Add a case; it is on disk when this returns.

        Args:
            result: of the case.
        """
        if not self._repaired:
            self._report_torn(drop_torn_line(self._cases))
            self._repaired = True
        append_line(self._cases, result.to_json())

    def results(self) -> list[CaseResult]:
        """Read every case, in order of first measurement; of a repeated case the last line.

        Raises:
            SchemaError: a line is not a case, naming the file and the line.
        """
        lines, torn = read_lines(self._cases)
        self._report_torn(torn)
        by_case: dict[object, CaseResult] = {}
        for number, line in enumerate(lines, start=1):
            result = parse_case(line, f"{self._cases}, line {number}")
            by_case[result.case] = result
        return list(by_case.values())

    def info(self) -> RunInfo:
        """Read the circumstances of the run.

        Raises:
            SchemaError: ``run.json`` is none of this danon; so do the other readers of it.
        """
        return self._read().info

    def owner(self) -> Owner:
        """Read which process runs, or ran, this invocation."""
        stored = self._read().owner
        return Owner(stored.host, stored.pid, self._lock)

    @property
    def status(self) -> RunStatus:
        """The status; KILLED for a run whose process ended without storing one.

        A run of another host is believed: not every file system shares locks between machines.
        """
        stored = self._read()
        if stored.status != "RUNNING" or stored.owner.host != socket.gethostname():
            return stored.status
        has_lock = self._lock.exists()  # a copied folder need not have it
        if has_lock and is_held(self._lock):
            return "RUNNING"
        # The process may have stored how the run ended after the first reading.
        now = self._read().status
        return "KILLED" if now == "RUNNING" else now

    def set_status(self, status: RunStatus) -> None:
        """Store the status; RUNNING makes the calling process the owner (a resumed run).

        Args:
            status: the new one.

        Raises:
            ValueError: no such status.
            OSError: another process runs it and the status is RUNNING; or it cannot be written.
        """
        if status not in get_args(RunStatus):
            raise ValueError(f"status {status!r}: must be one of {', '.join(get_args(RunStatus))}")
        owner = Owner.current(self._lock) if status == "RUNNING" else self.owner()
        _write_run(self._run, self.info(), status, owner)
        if status != "RUNNING":
            end(self._lock)

    def _read(self) -> _RunFile:
        content = parse_versioned(_RunFile, self._run.read_bytes(), self._run)
        check_date(content.info.started, self._run)
        return content

    def _report_torn(self, line: bytes) -> None:
        if line:
            _log.warning(
                "%s: the last line is incomplete (%d bytes, the run was interrupted while writing "
                "it); that case counts as not measured",
                self._cases,
                len(line),
            )


def _write_run(path: Path, info: RunInfo, status: RunStatus, owner: Owner) -> None:
    content = dataclasses.asdict(
        _RunFile(SCHEMA, info, status, _StoredOwner(owner.host, owner.pid))
    )
    replace_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


@dataclass(frozen=True)
class RecordedRun:
    """A run as it was read, all of it.

    Attributes:
        run_dir: its folder.
        info: its circumstances.
        status: its status at the time of reading.
        results: of all cases.
    """

    run_dir: Path
    info: RunInfo
    status: RunStatus
    results: list[CaseResult]

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read a folder.

        Args:
            run_dir: the folder.

        Raises:
            SchemaError: a file in it is not readable; the message names it and the reason.
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
    """Read the runs in a folder that can be read, the last first.

    Args:
        folder: of all runs.
        passed_over: is told which run cannot be read, and why.
    """
    for file in sorted(folder.glob("*/run.json"), reverse=True):
        try:
            yield RecordedRun.read(file.parent)
        except (SchemaError, FileNotFoundError) as error:
            passed_over(str(error))


def readable_runs(
    folders: Iterable[Path], passed_over: Callable[[str], object]
) -> list[RecordedRun]:
    """Read the runs in several folders, those of the first folder first.

    Args:
        folders: of runs; they need not exist.
        passed_over: as in :func:`recorded_runs`.

    Raises:
        SchemaError: there are runs, and not one can be read.
    """
    unreadable = list[str]()

    def on_unreadable(why: str) -> None:
        unreadable.append(why)
        passed_over(why)

    runs = [run for folder in folders for run in recorded_runs(folder, on_unreadable)]
    if unreadable and not runs:
        raise SchemaError(f"no recorded run can be read: {unreadable[0]}")
    return runs
