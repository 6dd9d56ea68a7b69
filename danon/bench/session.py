"""The command's side of a bench: journal, recorder and closing messages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danon.bench import attempts
from danon.bench.progress import Display
from danon.console.exit_status import DONE, NEGATIVE, NOT_WRITTEN, REFUSED, SIGNALLED
from danon.console.messages import pass_over, refuse
from danon.processes.code_digest import differences
from danon.report import html_report
from danon.report.summary import summarize
from danon.report.terminal_summary import print_summary, summary_table
from danon.runs import failures
from danon.runs.case import CaseResult
from danon.runs.commit import UNKNOWN, why_unknown
from danon.runs.export import write_results
from danon.runs.journal import Journal, RecordedRun, RunStatus, recorded_runs
from danon.runs.run_info import RunInfo
from danon.runs.suite_info import SuiteInfo
from danon.tracking.bench_recorder import Recorder

__all__ = ["Options", "ResumeError", "Session"]

SEED = 0
MOST_LINES = 5
"""Lines on cases without an outcome at the end."""
NOTHING_TO_RESUME = "--resume: no run in {} was killed before its end; a new run begins"


class ResumeError(ValueError):
    """A killed run cannot be resumed; the message lists the differences."""


@dataclass(frozen=True)
class Options:
    """Options of ``danon bench``; the suites validate them before they measure anything.

    Attributes:
        profile: name of a profile.
        device: cpu or cuda.
        attentions: attentions to add: registered names, ``file.py:Class`` or ``module:Class``.
        only: registered names to measure, comma separated; empty: all.
        suites: names or ``file.py:Class``, comma separated; empty: all.
        results: folder of all runs.
        resume: True to resume the last killed run, which must have had the same options and code.
        command: as typed, for the record.
        engine: ``local`` or ``ray``.
        address: address of the Ray cluster; empty: start a local Ray.
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
        """Return these options as options of the suites."""
        return [
            f"--danon-profile={self.profile}",
            f"--danon-device={self.device}",
            f"--danon-only={self.only}",
            f"--danon-suites={self.suites}",
            *(f"--danon-attention={target}" for target in self.attentions),
        ]


class Session:
    """Writes the reports of the suites, wherever they run, into the folder of a run.

    Args:
        options: options of the command.
        console: for messages and tables.

    Attributes:
        refusal: reason if the suites refuse to measure; else empty.
        journal: journal of the run; None until there is a plan.
    """

    def __init__(self, options: Options, console: Console) -> None:
        self._options, self._console = options, console
        self.refusal = ""
        self.journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._fresh: set[str] = set()
        self._results: list[CaseResult] = []
        self._notes: dict[str, str] = {}
        self._planned: list[str] = []
        self._traces: dict[str, str] = {}

    @property
    def threads(self) -> int | None:
        """Number of threads that this run is timed with; None if its fingerprint has none."""
        assert self.journal is not None
        threads = self.journal.info().fingerprint.get("threads")
        return None if threads is None else int(threads)

    def handle(self, event: dict[str, Any], display: Display) -> None:
        """Handle a report of the suites other than a plan, which goes to :meth:`open`.

        Args:
            event: the report.
            display: the progress bar.
        """
        kind = event["event"]
        if kind == "refused":
            self.refusal = event["reason"]
        elif kind == "begin":
            display.begin(event["case"])
        elif kind in ("waiting", "going"):
            display.wait(waiting=kind == "waiting")
        elif kind == "note":
            # A process that replaces another repeats some notes.
            self._notes.setdefault(event.get("key", event["text"]), event["text"])
        elif kind == "done":
            display.done(event["case"], reused=event["case"] not in self._fresh)
        elif kind == "trace":
            self._traces[event["case"]] = event["text"]
        else:
            result = CaseResult.from_json(event["result"])
            self.keep(result)
            display.measured(result, self._table)
            if trace := event.get("trace") or self._traces.pop(result.case.id, ""):
                assert self.journal is not None
                failures.write(self.journal.run_dir, result.case, trace)

    def keep(self, result: CaseResult) -> None:
        """Store an outcome on disk, then record it in MLflow."""
        assert self.journal is not None and self._recorder is not None
        self.journal.append(result)
        self._recorder.log(result)
        self._fresh.add(result.case.id)
        self._results.append(result)

    def _table(self) -> Table:
        """Return the table so far."""
        assert self.journal is not None
        summary = summarize(self._results, self.journal.info())
        return summary_table(summary, self._console.width)

    def close(
        self,
        files: Iterable[Path],
        unfinished: str,
        signalled: int,
        *,
        status: RunStatus = "FAILED",
    ) -> int:
        """Write results and report, and print the tables.

        Args:
            files: files of the suites, moved into the run's folder.
            unfinished: reason if some case has no outcome; else empty.
            signalled: number of the signal that ended the bench, or 0.
            status: status of an unfinished run; KILLED allows ``--resume``.

        Returns:
            The exit status.
        """
        say = self._console.print
        if self.journal is None or self._recorder is None:
            return SIGNALLED + signalled
        run_dir, info, results = self.journal.run_dir, self.journal.info(), self.journal.results()
        for file in files:
            if file.is_file():
                shutil.move(file, run_dir / file.name)
        write_results(results, info, run_dir)
        for note in self._notes.values():
            say(f"[yellow]{escape(note)}", soft_wrap=True)
        if signalled:
            self.journal.set_status("KILLED")  # before anything that takes time
        print_summary(results, info, self._console)
        rows = {result.case.id for result in results}
        missing = [case for case in self._planned if case not in rows]
        if missing and not unfinished:
            unfinished = f"{len(missing)} of {len(self._planned)} planned cases have no outcome"
        html_report.write_report(results, info, run_dir / "report.html")
        recorded = self._recorder.finish(
            "KILLED" if signalled else status if unfinished else "FINISHED"
        )
        self._print_places(recorded)
        if signalled:
            stored = f"{len(results)} of {max(len(self._planned), len(results))} cases are stored"
            say(f"[yellow]Stopped: {stored} in {run_dir}; --resume continues", soft_wrap=True)
            return SIGNALLED + signalled
        for case in missing[:MOST_LINES]:
            say(f"[red]no outcome[/] {case}", soft_wrap=True)
        if unfinished:
            refuse(self._console, unfinished)
            return REFUSED
        failed = any(result.status == "failed" for result in results)
        return NEGATIVE if failed else DONE

    def _print_places(self, recorded: str) -> None:
        """Print where the report, the figures and the records are."""
        assert self.journal is not None
        run_dir = self.journal.run_dir
        places = {
            "Report": str(run_dir / "report.html"),
            "Figures": str(run_dir / "results.json"),
            "MLflow": recorded.rstrip("."),
        }
        if (run_dir / failures.FOLDER).is_dir():
            places["Failures"] = str(run_dir / failures.FOLDER)
        self._console.print()
        for name, place in places.items():
            text = f"{name:9} {escape(place)}"
            self._console.print(text, soft_wrap=True, highlight=False)
        self._console.print(f"{'':9} `nox -s ui` opens MLflow", highlight=False)

    def unwritten(self, error: OSError) -> int:
        """Report that results cannot be written, and return the exit status.

        Args:
            error: error of the write.
        """
        with contextlib.suppress(OSError):  # the disk of the log may be the one
            refuse(self._console, f"{error}; --results FOLDER writes to another folder")
            if self.journal is not None:
                self._console.print(
                    f"{len(self.journal.results())} cases are stored in {self.journal.run_dir}; "
                    "--resume continues once it can be written again",
                    soft_wrap=True,
                )
        return NOT_WRITTEN

    def open(
        self,
        fingerprint: dict[str, Any],
        basis: Mapping[str, str] | None = None,
        planned: Iterable[str] = (),
        most_threads: int = 0,
        suites: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Create the run's folder, or reopen that of a killed run, and start recording.

        Args:
            fingerprint: fingerprint of the machine that measures.
            basis: options and code that decide the figures, by name.
            planned: ids of the cases that must have an outcome at the end.
            most_threads: threads available to the process; the fingerprint has the chosen number.
            suites: descriptions of the suites, as plain data by name.

        Returns:
            The run's folder.

        Raises:
            ResumeError: no killed run was measured with the same options, code and machine.
        """
        options, say = self._options, self._console.print
        info = RunInfo.capture(
            options.profile,
            SEED,
            options.command,
            fingerprint,
            basis,
            {name: SuiteInfo.from_values(values) for name, values in (suites or {}).items()},
        )
        self._planned = list(planned)
        old = _killed(options, info, most_threads, self._console) if options.resume else None
        if old is not None:
            self.journal, info = old, old.info()
            self._results = old.results()
            old.set_status("RUNNING")
            say(f"Resuming {info.run_id}: {len(old.results())} cases are measured already")
        else:
            if options.resume:
                say(NOTHING_TO_RESUME.format(options.results), soft_wrap=True, highlight=False)
            self.journal = Journal.create(options.results, info)
            if (self.threads or 0) < most_threads:
                say(
                    "[yellow]Another program keeps this machine busy: all cases are timed with "
                    f"{self.threads} of {most_threads} threads, which disturbs them less "
                    f"(OMP_NUM_THREADS={most_threads} uses all)",
                    soft_wrap=True,
                )
        if info.commit == UNKNOWN:
            say(f"[yellow]The commit is recorded as unknown:[/] {escape(why_unknown())}")
        if info.dirty:
            say("[dim]This checkout has uncommitted changes.[/]")
        self._recorder = Recorder(info, self.journal)
        say(escape(self._recorder.start()), soft_wrap=True, highlight=False)
        measured = {result.case for result in self.journal.results()}
        case = attempts.fatal(self.journal.run_dir)
        if case is not None and case not in measured:
            reason = f"the bench as a whole was killed at this case {attempts.MOST} times"
            self.keep(CaseResult(case, "failed", reason))
        return self.journal.run_dir


def _killed(options: Options, info: RunInfo, most_threads: int, console: Console) -> Journal | None:
    """Return the last killed run with the same options, code and machine; None without one.

    Runs that cannot be read are reported. A resumed run keeps its own number of threads.

    Raises:
        ResumeError: all killed runs differ; the message lists the differences of the last one.
    """
    refusal = ""
    for run in recorded_runs(options.results, partial(pass_over, console)):
        if run.status != "KILLED":
            continue
        different = _differences(options, run, info, most_threads)
        if not different:
            return Journal(run.run_dir)
        refusal = refusal or (
            f"--resume: {run.info.run_id} differs in: "
            f"{'; '.join(different)}. Without --resume a new run begins"
        )
    if refusal:
        raise ResumeError(refusal)
    return None


def _differences(options: Options, run: RecordedRun, info: RunInfo, most_threads: int) -> list[str]:
    """Return the differences between a run and now that affect figures.

    On a cluster only the device must be the same: each machine reuses results of machines like it.
    Without a cluster all results must be from this machine.
    """
    old = run.info
    changes = differences({"profile": old.profile}, {"profile": info.profile})
    changes += differences(old.basis, info.basis)
    changes += differences(old.versions, info.versions)
    machines = [r.place.get("machine", old.fingerprint) for r in run.results]
    machines.insert(0, old.fingerprint)
    if options.engine == "ray":
        machines, here = (
            [{"device": old.fingerprint.get("device")}],
            {"device": info.fingerprint["device"]},
        )
    else:
        here = {name: x for name, x in info.fingerprint.items() if name != "id"}
    for machine in machines:
        there = {name: x for name, x in machine.items() if name != "id"}
        threads = there.get("threads", "")
        possible = threads.isdecimal() and int(threads) <= most_threads
        changes += differences(there, here | {"threads": threads} if possible else here)
    return list(dict.fromkeys(changes))
