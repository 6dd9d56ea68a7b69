"""Jobs that a machine of a cluster runs for a bench: the suites, for one attention."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from danon.bench.supervisor import Supervisor
from danon.cluster.node_actor import Place
from danon.runs.case import CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.runs.saved_model import SavedModel

__all__ = ["AttentionJob", "DescribeJob"]


class _SuiteJob:
    """A job that runs the suites, and yields their reports and their end."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = tuple(arguments)
        self._suites: Supervisor | None = None
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        if self._suites is not None:
            self._suites.stop()

    def events(self, place: Place) -> Iterator[dict[str, Any]]:
        with (
            tempfile.TemporaryDirectory(prefix="danon-", ignore_cleanup_errors=True) as scratch,
            Supervisor(self._arguments, Path(scratch)) as suites,
        ):
            self._suites = suites
            if self._stopped:
                suites.stop()
            yield from self._reports(suites, Path(scratch), place)
            files = {file.name: file.read_bytes() for file in suites.files if file.is_file()}
            yield {
                "event": "ended",
                "status": suites.status,
                "tail": suites.failure or suites.tail(),
                "files": files,
            }

    def _reports(self, suites: Supervisor, scratch: Path, place: Place) -> Iterator[dict[str, Any]]:
        yield from suites.events()


class DescribeJob(_SuiteJob):
    """A job that returns the plan of the suites and measures nothing."""

    def _reports(self, suites: Supervisor, scratch: Path, place: Place) -> Iterator[dict[str, Any]]:
        for event in suites.events():
            yield event
            if event["event"] == "plan":
                suites.stop()


class AttentionJob(_SuiteJob):
    """A job for the cases of one attention, and the cases of dense attention that they need.

    Args:
        arguments: options of the suites.
        attention: registered name.
        info: description of the run.
        measured: results of this attention and of dense attention so far. The suites use those of
            machines with the same fingerprint, so that a row has figures of one kind of machine.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        attention: str,
        info: RunInfo,
        measured: Sequence[CaseResult],
    ) -> None:
        super().__init__((*arguments, f"--danon-one={attention}"))
        self.attention, self._info, self._measured = attention, info, tuple(measured)

    def _reports(self, suites: Supervisor, scratch: Path, place: Place) -> Iterator[dict[str, Any]]:
        journal = Journal.create(scratch, self._info)
        machine: dict[str, Any] = {}
        sent: set[Path] = set()
        for event in suites.events():
            if event["event"] == "plan":
                machine = event["fingerprint"]
                for result in self._measured:
                    if result.place.get("machine", self._info.fingerprint) == machine:
                        journal.append(result)
                suites.go(journal)
            elif event["event"] == "result":
                journal.append(CaseResult.from_json(event["result"]))  # for a process after this
                yield {
                    **event,
                    "place": {**place, "machine": machine},
                    "models": list(_models(journal.run_dir, sent)),
                }
                suites.stored()
            else:
                yield event


def _models(run_dir: Path, sent: set[Path]) -> Iterator[tuple[SavedModel, dict[str, bytes]]]:
    """Yield trained models that were not sent yet, as descriptions and files."""
    for saved, folder in SavedModel.all(run_dir):
        if folder not in sent:
            sent.add(folder)
            files = (file for file in sorted(folder.rglob("*")) if file.is_file())
            yield saved, {str(file.relative_to(folder)): file.read_bytes() for file in files}
