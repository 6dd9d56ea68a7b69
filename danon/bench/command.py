"""One bench: start the suites, store each outcome as it comes, show the scoreboard."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from danon.bench.child import Child
from danon.bench.progress import Display
from danon.experiment import report, scoreboard
from danon.experiment.export import write_results
from danon.experiment.record import Recorder
from danon.experiment.runs import UNWRITABLE, Journal, RunInfo
from danon.measure.case import CaseResult

__all__ = ["Options", "bench", "latest"]

REFUSED = 2
SEED = 0


@dataclass(frozen=True)
class Options:
    """What the user asked for; the suites validate it before they measure anything.

    Attributes:
        attentions: registered names, or ``file.py:Class`` / ``module:Class`` to measure as well.
        only: registered names to keep, comma separated; empty keeps all.
        suites: to run, comma separated; empty runs all.
        results: folder of all runs.
        resume: go on with the last killed run of the same commit, profile and machine.
        command: as typed, for the record.
    """

    profile: str
    device: str
    attentions: tuple[str, ...]
    only: str
    suites: str
    results: Path
    resume: bool
    command: str

    def arguments(self) -> list[str]:
        """The same, as options of the suites."""
        return [
            f"--danon-profile={self.profile}",
            f"--danon-device={self.device}",
            f"--danon-only={self.only}",
            f"--danon-suites={self.suites}",
            *(f"--danon-attention={target}" for target in self.attentions),
        ]


def bench(options: Options, console: Console) -> int:
    """Run the suites.

    Returns:
        Exit status: 0; 1 when a case failed; 2 when nothing could be measured; 74 when the results
        cannot be written; 128 + the signal that ended it.
    """
    session = _Session(options, console)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="danon-") as scratch,
            Child(options.arguments(), Path(scratch)) as child,
        ):
            return _measured(session, child, console)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return session.unwritten(error)


def _measured(session: _Session, child: Child, console: Console) -> int:
    with _stopping(child, console) as stopped, Display(console) as display:
        for event in child.events():
            session.handle(event, child, display)
        status = child.wait()
    signalled = stopped[0] if stopped else -status if status < 0 else 0
    if session.refusal:
        console.print(f"[bold red]danon bench:[/] {escape(session.refusal)}", soft_wrap=True)
        return REFUSED
    if session.journal is None and not signalled:
        console.print(child.tail(), markup=False)
        console.print("[bold red]danon bench:[/] the suites ended before they measured anything")
        return REFUSED
    return session.close(child, status, signalled)


class _Session:
    """The parent's side: journal, recorder, and what is said at the end."""

    def __init__(self, options: Options, console: Console) -> None:
        self._options, self._console = options, console
        self.refusal = ""
        self.journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._fresh: set[str] = set()
        self._notes: list[str] = []

    def handle(self, event: dict[str, Any], child: Child, display: Display) -> None:
        kind: Literal["refused", "plan", "begin", "note", "result", "done"] = event["event"]
        if kind == "refused":
            self.refusal = event["reason"]
        elif kind == "plan":
            run_dir = self._open(event["fingerprint"])
            display.plan(event["cases"])
            child.answer(run=os.fspath(run_dir.resolve()))
        elif kind == "begin":
            display.begin(event["case"])
        elif kind == "note":
            self._notes.append(event["text"])
        elif kind == "done":
            display.done(event["case"], reused=event["case"] not in self._fresh)
        else:
            result = CaseResult.from_json(event["result"])
            assert self.journal is not None and self._recorder is not None
            self.journal.append(result)
            self._recorder.log(result)
            self._fresh.add(result.case.id)
            child.answer()

    def close(self, child: Child, status: int, signalled: int) -> int:
        """Write what the run leaves behind; returns the exit status."""
        say = self._console.print
        if self.journal is None or self._recorder is None:
            return 128 + signalled
        run_dir, info, results = self.journal.run_dir, self.journal.info(), self.journal.results()
        for file in (child.log, child.benchmark):
            if file.is_file():
                shutil.move(file, run_dir / file.name)
        write_results(results, info, run_dir)
        for note in self._notes:
            say(f"[yellow]{escape(note)}", soft_wrap=True)
        if signalled:
            say(f"[yellow]{escape(self._recorder.finish('KILLED'))}", soft_wrap=True)
            say(
                f"Stopped: {len(results)} cases stay in {run_dir}; --resume goes on", soft_wrap=True
            )
            return 128 + signalled
        report.write_report(results, info, run_dir / "report.html")
        finished = Child.finished(status)
        recorded = self._recorder.finish("FINISHED" if finished else "FAILED")
        scoreboard.render(results, info, self._console)
        say(f"\nReport    {run_dir / 'report.html'}", soft_wrap=True, highlight=False)
        say(f"Figures   {run_dir / 'results.json'}", soft_wrap=True, highlight=False)
        say(f"MLflow    {escape(recorded)}", soft_wrap=True, highlight=False)
        say("          `nox -s ui` opens it", highlight=False)
        if not finished:
            say(
                f"[bold red]danon bench:[/] pytest ended with status {status}: {run_dir}/pytest.log"
            )
            return REFUSED
        failed = [r for r in results if r.status == "failed"]
        for result in failed:
            say(f"[red]failed[/] {result.case.id}: {escape(result.reason)}", soft_wrap=True)
        return 1 if failed else 0

    def unwritten(self, error: OSError) -> int:
        """Say that results cannot be written, and what stays; returns the exit status."""
        with contextlib.suppress(OSError):  # the disk of the log may be the one
            self._console.print(f"[bold red]danon bench:[/] {escape(str(error))}", soft_wrap=True)
            if self.journal is not None:
                self._console.print(
                    f"{len(self.journal.results())} cases stay in {self.journal.run_dir}; when it "
                    "can be written again, --resume goes on", soft_wrap=True,
                )  # fmt: skip
        return os.EX_IOERR

    def _open(self, fingerprint: dict[str, Any]) -> Path:
        """Make the run's folder, or take that of a killed run; says where things are recorded."""
        options, say = self._options, self._console.print
        info = RunInfo.capture(options.profile, SEED, options.command, fingerprint)
        old = _killed(options.results, info) if options.resume else None
        if old is not None:
            self.journal, info = old, old.info()
            old.set_status("RUNNING")
            say(f"Going on with {info.run_id}: {len(old.results())} cases are measured already")
        else:
            if options.resume:
                say("Nothing to resume: no killed run of this commit, profile and machine")
            self.journal = Journal.create(options.results, info)
        if info.dirty:
            say("[dim]This checkout has changes that no commit holds.[/]")
        self._recorder = Recorder(info, self.journal)
        say(escape(self._recorder.start()), soft_wrap=True, highlight=False)
        return self.journal.run_dir


def latest(results: Path) -> Iterator[Journal]:
    """Recorded runs, the last first."""
    for place in sorted(results.glob("*/run.json"), reverse=True):
        yield Journal(place.parent)


def _killed(results: Path, info: RunInfo) -> Journal | None:
    for journal in latest(results):
        old = journal.info()
        same = (old.commit, old.profile, old.fingerprint) == (
            info.commit, info.profile, info.fingerprint,
        )  # fmt: skip
        if same and journal.status == "KILLED":
            return journal
    return None


@contextlib.contextmanager
def _stopping(child: Child, console: Console) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the child; what it had measured is then written as usual."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        child.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C insists

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
