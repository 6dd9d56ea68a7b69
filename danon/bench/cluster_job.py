"""What a machine of a cluster does for a bench: the suites, for one attention."""

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
    """A job that runs the suites; it yields what they report, and then how they ended."""

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
            yield from self._told(suites, Path(scratch), place)
            files = {file.name: file.read_bytes() for file in suites.files if file.is_file()}
            yield {
                "event": "ended",
                "status": suites.status,
                "tail": suites.failure or suites.tail(),
                "files": files,
            }

    def _told(self, suites: Supervisor, scratch: Path, place: Place) -> Iterator[dict[str, Any]]:
        yield from suites.events()


class DescribeJob(_SuiteJob):
    """What there is to measure."""

    def _told(self, suites: Supervisor, scratch: Path, place: Place) -> Iterator[dict[str, Any]]:
        for event in suites.events():
            yield event
            if event["event"] == "plan":
                suites.stop()


class AttentionJob(_SuiteJob):
    """The cases of one attention; dense attention's are measured as far as they need them.

    Args:
        arguments: options of the suites.
        attention: registered name.
        info: of the run.
        known: its cases and dense attention's that are measured already. Of these the suites know
            those of machines like the one they run on: figures of a row are of one kind.
    """

    def __init__(
        self, arguments: Sequence[str], attention: str, info: RunInfo, known: Sequence[CaseResult]
    ) -> None:
        super().__init__((*arguments, f"--danon-one={attention}"))
        self.attention, self._info, self._known = attention, info, tuple(known)

    def _told(self, suites: Supervisor, scratch: Path, place: Place) -> Iterator[dict[str, Any]]:
        journal = Journal.create(scratch, self._info)
        machine: dict[str, Any] = {}
        sent: set[Path] = set()
        for event in suites.events():
            if event["event"] == "plan":
                machine = event["fingerprint"]
                for result in self._known:
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
    """Trained models that are new, as descriptions and files."""
    for saved, folder in SavedModel.all(run_dir):
        if folder not in sent:
            sent.add(folder)
            files = (file for file in sorted(folder.rglob("*")) if file.is_file())
            yield saved, {str(file.relative_to(folder)): file.read_bytes() for file in files}
