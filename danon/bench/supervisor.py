"""Supervision of the suites: a process that dies is replaced until all cases have an outcome."""

from __future__ import annotations

import re
import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from danon.bench import attempts
from danon.processes.suite_process import PATIENCE_S, SuiteProcess
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal

__all__ = ["Supervisor"]

START_LIMIT_S = 600.0
"""Seconds for pytest to import torch and the suites; many at once on a slow disk take minutes."""
PREPARE_LIMIT_S = 600.0
"""Seconds for the import of an attention, its contract check, the plan, or between two cases."""
EXIT_LIMIT_S = 20.0
"""Seconds for a process to exit after its last case."""
MAX_EXITS = 3
"""Deaths of processes after which an attention is not tried again."""
LINES = 100
"""Last lines of a dead process's log that are kept with its case."""


@dataclass(frozen=True)
class _Running:
    """A running case, and the longest silence allowed to it."""

    case: Case
    limit_s: float


class Supervisor:
    """Runs the suites in a child process; one that dies or hangs is replaced, its case fails.

    A context manager.

    Args:
        options: ``--danon-...`` options of the suites.
        scratch: folder for ``pytest.log`` and ``benchmark.json``.

    Attributes:
        failure: reason if some case has no outcome; else empty.
        status: exit status of the last process.
    """

    def __init__(self, options: Sequence[str], scratch: Path) -> None:
        self._options, self._scratch = tuple(options), scratch
        self._process: SuiteProcess | None = None
        self._listening: SuiteProcess | None = None
        self._journal: Journal | None = None
        self._threads: int | None = None
        self._planned: tuple[Case, ...] = ()
        self._rows: set[str] = set()
        self._done: set[str] = set()
        self._exits: Counter[str] = Counter()
        self._stopped = self._through = False
        self.failure = ""
        self.status = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.__exit__(kind, error, trace)
        if self._journal is not None:
            attempts.end(self._journal.run_dir)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the reports of the suites, as if a single process had measured everything.

        Answer a ``plan`` by :meth:`go`, and a ``result`` by :meth:`stored`.
        A case whose process died is a ``result``, too, with the end of its log as ``trace``.
        """
        while not self._over:
            kills = _memory_kills()
            with SuiteProcess(self._options, self._scratch) as process:
                self._process = self._listening = process
                if self._stopped:
                    process.stop()
                progress = _ProcessProgress()
                yield from self._forwarded(process, progress)
                status = process.wait()
            self._listening = None
            if self._through:
                return
            self.status = status
            yield from self._record_exit(process, progress, memory=_memory_kills() > kills)

    def go(self, journal: Journal, threads: int | None = None) -> None:
        """Let the suites measure the cases that are not in the journal of the run.

        Args:
            journal: journal of the run.
            threads: number of threads of all its processes; None: each process chooses.
        """
        self._journal, self._threads = journal, threads
        self._rows = {result.case.id for result in journal.results()}
        self._answer(run=str(journal.run_dir.resolve()), threads=threads)

    def stored(self) -> None:
        """Let the suites go on after a result."""
        self._answer()

    def stop(self) -> None:
        """End the suites; safe to call from a signal handler."""
        self._stopped = True
        if self._process is not None:
            self._process.stop()

    @property
    def _over(self) -> bool:
        """True if no further process is to be started."""
        return self._through or self._stopped or bool(self.failure)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the suites: pytest's log and pytest-benchmark's figures."""
        return () if self._process is None else (self._process.log, self._process.benchmark)

    def tail(self) -> str:
        """Return the end of the last process's output."""
        return "" if self._process is None else self._process.tail()

    def _answer(self, **values: Any) -> None:
        if self._listening is not None:  # nobody waits for it where a process has died
            self._listening.answer(**values)

    def _forwarded(
        self, process: SuiteProcess, progress: _ProcessProgress
    ) -> Iterator[dict[str, Any]]:
        """Forward what a process reports until it ends, and end it if it is silent for too long."""
        while not progress.over:
            try:
                event = process.event(progress.limit_s)
            except EOFError:
                break
            if event is None:
                progress.silent = True
                process.abort()
                break
            progress.hear(event)
            if event["event"] == "plan":
                self._planned = tuple(Case(**values) for values in event["described"])
                if self._journal is not None:  # of an earlier process
                    self.go(self._journal, self._threads)
                    continue
            elif event["event"] == "begin" and self._journal is not None:
                attempts.begin(self._journal.run_dir, progress.cases[-1].case)
            elif event["event"] == "result":
                self._rows.add(CaseResult.from_json(event["result"]).case.id)
            elif event["event"] == "finished":
                self.status, self._through = event["status"], SuiteProcess.finished(event["status"])
            elif event["event"] == "refused":
                self._through = True
            elif event["event"] == "done":
                if event["case"] in self._done:
                    continue
                self._done.add(event["case"])
            if event["event"] not in _OWN:
                yield event
        if not progress.silent and not self._stopped:
            progress.line_closed = _still_running(
                process, EXIT_LIMIT_S if progress.over else PATIENCE_S
            )
            if progress.line_closed:
                process.abort()

    def _record_exit(
        self, process: SuiteProcess, progress: _ProcessProgress, *, memory: bool
    ) -> Iterator[dict[str, Any]]:
        """Yield the outcome of the case at which a process died."""
        if progress.leaving or self._stopped:
            return
        how, log = progress.exit_reason(self.status, memory=memory), process.tail(LINES)
        if where := _last_line(log):
            how = f"{how} ({where})"
        if self._journal is None or progress.planning:
            self.failure = f"{progress.what}: {how}"
            return
        if progress.cases:
            died = progress.cases[-1].case
            attention = died.attention
            yield from self._row(died, how, f"{died.id}: {how}\n\n{log}\n")
        else:
            attention = progress.last.attention if progress.last else ""
            between = f"after {progress.last.id}" if progress.last else "before the first case"
            yield {
                "event": "note",
                "text": f"The process that measures was replaced {between}: {how}",
            }
        self._exits[attention] += 1
        if self._exits[attention] < MAX_EXITS:
            return
        left = [c for c in self._planned if c.id not in self._rows and c.attention == attention]
        if not left and not progress.cases:
            self.failure = how
        for case in left:
            again = (
                f"not tried: the process ended {MAX_EXITS} times with this attention, last: {how}"
            )
            yield from self._row(case, again, "")

    def _row(self, case: Case, reason: str, trace: str) -> Iterator[dict[str, Any]]:
        self._rows.add(case.id)
        self._done.add(case.id)
        result = CaseResult(case, "failed", reason)
        yield {"event": "result", "result": result.to_json(), "trace": trace}
        yield {"event": "done", "case": case.id}


_OWN = ("prepare", "leaving", "finished")
"""Reports that the supervisor does not pass on."""


class _ProcessProgress:
    """Progress of a process, from its reports.

    Attributes:
        what: its activity in words, until a case begins.
        cases: cases that have begun and have no result, the outermost first.
        last: the last case with a result.
        limit_s: longest silence allowed, in seconds; None: no limit.
        planning: True until there is a plan.
        leaving: True if it reported that it ends because it could not undo a change.
        over: True after its last report.
        silent: True if it was silent for too long.
        line_closed: True if it runs on although its connection is closed.
    """

    def __init__(self) -> None:
        self.what = "the suites are started"
        self.cases: list[_Running] = []
        self.last: Case | None = None
        self.limit_s: float | None = START_LIMIT_S
        self.planning = True
        self.leaving = self.over = self.silent = self.line_closed = False
        self._exit_status: int | None = None

    def hear(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "prepare":
            self.what = event["what"]
        elif kind == "plan":
            self.planning = False
        elif kind == "begin":
            self.cases.append(_Running(Case(**event["described"]), event["limit_s"]))
        elif kind == "result":
            self.last = CaseResult.from_json(event["result"]).case
            self.cases = [running for running in self.cases if running.case != self.last]
        elif kind == "leaving":
            self.leaving = True
        elif kind == "finished":
            self.over, self._exit_status = True, event["status"]
        self.limit_s = self.cases[-1].limit_s if self.cases else PREPARE_LIMIT_S
        if kind == "waiting":  # for another bench, which may take as long as it likes
            self.limit_s = None

    def exit_reason(self, status: int, *, memory: bool) -> str:
        """Return in words how the process ended.

        Args:
            status: exit status of the process.
            memory: True if the system has killed some process for memory meanwhile.
        """
        if self.silent:
            return f"no answer within {self.limit_s:.0f} s"
        if self.line_closed:
            return "the process closed its connection to the command"
        if self._exit_status is not None:
            return f"pytest ended with status {self._exit_status}"
        if status >= 0:
            return f"the process ended itself with status {status}"
        name = signal.Signals(-status).name
        if -status == signal.SIGKILL and memory:
            return f"the process was killed for memory ({name})"
        return f"the process died by {name}"


def _still_running(process: SuiteProcess, seconds: float) -> bool:
    """Return True if a process without further reports still runs after some seconds."""
    deadline = time.monotonic() + seconds
    while process.running and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.running


def _last_line(log: str) -> str:
    """Return file and line of the Python code that a process died in, or empty.

    Lines of installed packages are left out. Python's faulthandler writes the stack at the time of
    a fatal signal, the last call first.
    """
    _, _, stack = log.rpartition("(most recent call first):")
    calls = re.findall(r'^  File "([^"]+)", line (\d+) in', stack, flags=re.MULTILINE)
    packages = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    lines = (f"{Path(file).name}:{line}" for file, line in calls if not file.startswith(packages))
    return next(lines, "")


def _memory_kills() -> int:
    """Return how many processes the system has killed for memory, here or on the machine."""
    count = 0
    for file in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        if file.is_file():
            words = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
            count += sum(int(word[1]) for word in words if word[0] == "oom_kill")
    return count
