"""A bench on the side of the command: journal, recorder, and what is said at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from danon.bench.progress import Display
from danon.bench.telling import pass_over
from danon.experiment import report, scoreboard
from danon.experiment.export import write_results
from danon.experiment.record import Recorder
from danon.experiment.runs import (
    UNKNOWN,
    Journal,
    RunInfo,
    RunStatus,
    recorded_runs,
    why_unknown,
)
from danon.measure.case import CaseResult

__all__ = ["REFUSED", "Options", "Session"]

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
        engine: ``local``, or ``ray`` with the ``address`` of a cluster; empty starts one here.
    """

    profile: str
    device: str
    attentions: tuple[str, ...]
    only: str
    suites: str
    results: Path
    resume: bool
    command: str
    engine: str = "local"
    address: str = ""

    def arguments(self) -> list[str]:
        """The same, as options of the suites."""
        return [
            f"--danon-profile={self.profile}",
            f"--danon-device={self.device}",
            f"--danon-only={self.only}",
            f"--danon-suites={self.suites}",
            *(f"--danon-attention={target}" for target in self.attentions),
        ]


class Session:
    """What the suites report, wherever they run, becomes the folder of a run.

    Attributes:
        refusal: why nothing is measured; empty if something is.
        journal: of the run, once there is a plan.
    """

    def __init__(self, options: Options, console: Console) -> None:
        self._options, self._console = options, console
        self.refusal = ""
        self.journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._fresh: set[str] = set()
        self._notes: list[str] = []

    def handle(self, event: dict[str, Any], display: Display) -> None:
        """One of refused, begin, note, done and result; a plan is for :meth:`open`."""
        kind = event["event"]
        if kind == "refused":
            self.refusal = event["reason"]
        elif kind == "begin":
            display.begin(event["case"])
        elif kind == "note":
            self._notes.append(event["text"])
        elif kind == "done":
            display.done(event["case"], reused=event["case"] not in self._fresh)
        else:
            self.keep(CaseResult.from_json(event["result"]))

    def keep(self, result: CaseResult) -> None:
        """Store an outcome; it is on disk when this returns."""
        assert self.journal is not None and self._recorder is not None
        self.journal.append(result)
        self._recorder.log(result)
        self._fresh.add(result.case.id)

    def close(
        self, files: Iterable[Path], unfinished: str, signalled: int, *,
        status: RunStatus = "FAILED",
    ) -> int:  # fmt: skip
        """Write what the run leaves behind; returns the exit status.

        Args:
            files: of the suites, to go into the run's folder.
            unfinished: why not all was measured; empty if it was.
            signalled: number of the signal that ended it, or 0.
            status: of an unfinished run; KILLED lets ``--resume`` go on.
        """
        say = self._console.print
        if self.journal is None or self._recorder is None:
            return 128 + signalled
        run_dir, info, results = self.journal.run_dir, self.journal.info(), self.journal.results()
        for file in files:
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
        recorded = self._recorder.finish(status if unfinished else "FINISHED")
        scoreboard.render(results, info, self._console)
        say(f"\nReport    {run_dir / 'report.html'}", soft_wrap=True, highlight=False)
        say(f"Figures   {run_dir / 'results.json'}", soft_wrap=True, highlight=False)
        say(f"MLflow    {escape(recorded)}", soft_wrap=True, highlight=False)
        say("          `nox -s ui` opens it", highlight=False)
        if unfinished:
            say(f"[bold red]danon bench:[/] {escape(unfinished)}", soft_wrap=True)
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

    def open(self, fingerprint: dict[str, Any]) -> Path:
        """Make the run's folder, or take that of a killed run; says where things are recorded."""
        options, say = self._options, self._console.print
        info = RunInfo.capture(options.profile, SEED, options.command, fingerprint)
        old = _killed(options, info, self._console) if options.resume else None
        if old is not None:
            self.journal, info = old, old.info()
            old.set_status("RUNNING")
            say(f"Going on with {info.run_id}: {len(old.results())} cases are measured already")
        else:
            if options.resume:
                say("Nothing to resume: no killed run of this commit, profile and machine")
            self.journal = Journal.create(options.results, info)
        if info.commit == UNKNOWN:
            say(f"[yellow]The commit is recorded as unknown:[/] {escape(why_unknown())}")
        if info.dirty:
            say("[dim]This checkout has changes that no commit holds.[/]")
        self._recorder = Recorder(info, self.journal)
        say(escape(self._recorder.start()), soft_wrap=True, highlight=False)
        return self.journal.run_dir


def _killed(options: Options, info: RunInfo, console: Console) -> Journal | None:
    """The last one to go on with; says which cannot be read.

    On a cluster each machine goes on with what its like has measured, if it was on that device;
    here all must be of this one.
    """
    for run in recorded_runs(options.results, partial(pass_over, console)):
        old = run.info
        if (old.commit, old.profile) != (info.commit, info.profile) or run.status != "KILLED":
            continue
        machines = (r.place.get("machine", old.fingerprint) for r in run.results)
        here = [old.fingerprint, *machines]
        if options.engine == "ray":
            fits = old.fingerprint.get("device") == info.fingerprint["device"]
        else:
            fits = all(machine == info.fingerprint for machine in here)
        if fits:
            return Journal(run.run_dir)
    return None
