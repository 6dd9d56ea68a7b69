"""A bench on a cluster: each attention is measured on one machine, as a whole."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from danon.bench.cluster_job import AttentionJob, DescribeJob
from danon.bench.progress import Display
from danon.bench.session import Options, Session
from danon.cluster.connection import ClusterError, Node, connected
from danon.cluster.pool import WorkerPool
from danon.console.exit_status import SIGNALLED
from danon.console.messages import say
from danon.processes.suite_process import SuiteProcess
from danon.report.tables import REFERENCE
from danon.runs.case import CaseResult
from danon.runs.saved_model import SavedModel

__all__ = ["run_on_cluster"]

RETRIES = 1
"""Further attempts at an attention whose machine died."""


def run_on_cluster(
    session: Session, options: Options, console: Console, stopped: Sequence[int]
) -> int:
    """Run the suites on a cluster.

    Args:
        session: the folder, the journal and the recorder of the run.
        options: options of the command.
        console: for messages.
        stopped: list that holds the number of the signal that ends the bench, once there is one.

    Returns:
        The exit status, as :func:`danon.bench.command.bench`.

    Raises:
        ClusterError: there is no cluster, or no machine of it can measure.
    """

    def tell(words: str) -> None:
        say(console, "Cluster", words)

    targets = (*options.attentions, *options.suites.split(","))
    files = [file for target in targets if (file := target.rpartition(":")[0]).endswith(".py")]
    with connected(options.address), WorkerPool(options.device, files, tell) as pool:
        for node in pool.nodes:
            tell(f"{node} measures")
        plan = _PlanDispatcher(options)
        pool.run(plan, lambda: stopped)
        if stopped:
            return SIGNALLED + stopped[0]
        if plan.refusal:
            raise ClusterError(plan.refusal)
        planned = [case for case, _ in plan.event["cases"]]
        event = plan.event
        session.open(event["fingerprint"], event["basis"], planned, suites=event["suites"])
        failure = ""
        with Display(console) as display:
            work = _AttentionDispatcher(session, options, plan.event, display, tell)
            try:
                pool.run(work, lambda: stopped)
            except ClusterError as error:
                failure = f"{error}: "
    left = work.left
    if not left and not stopped:
        return session.close((), "", 0)
    unfinished = f"{failure}{', '.join(left)} not measured to the end; --resume continues"
    signalled = stopped[0] if stopped else 0
    return session.close((), unfinished, signalled, status="KILLED")


class _PlanDispatcher:
    """Dispatcher of the one job that returns the plan of a bench.

    Attributes:
        event: the plan.
        refusal: the reason if there is no plan.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._sent = self.done = False
        self.event: dict[str, Any] = {}
        self.refusal = ""

    def tick(self) -> None:
        pass

    def next_job(self, node: Node) -> DescribeJob | None:
        if self._sent:
            return None
        self._sent = True
        return DescribeJob(self._options.arguments())

    def on_event(self, node: Node, event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            self.event = event
        elif event["event"] == "refused":
            self.refusal = event["reason"]
        elif event["event"] == "ended" and not (self.event or self.refusal):
            self.refusal = f"{node}: the suites ended before they had a plan: {event['tail']}"

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        if lost:
            self._sent = False
        else:
            self.done = True


class _AttentionDispatcher:
    """Dispatcher of one job for each attention: dense attention first, then the slowest."""

    def __init__(
        self,
        session: Session,
        options: Options,
        plan: dict[str, Any],
        display: Display,
        tell: Callable[[str], object],
    ) -> None:
        assert session.journal is not None
        self._session, self._journal, self._display = session, session.journal, display
        self._arguments, self._tell = options.arguments(), tell
        self._info = self._journal.info()
        display.plan(plan["cases"])
        self._cases: dict[str, list[str]] = defaultdict(list)
        weights: Counter[str] = Counter()
        for (case, weight), attention in zip(plan["cases"], plan["attentions"], strict=True):
            self._cases[attention].append(case)
            weights[attention] += weight
        self._seen: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._busy: dict[str, str] = {}  # node -> attention
        self._ended: dict[str, bool] = {}  # node -> whether its job came to its end
        self.left = sorted(self._cases, key=lambda name: (name != REFERENCE, -weights[name]))
        for attention in list(self.left):
            self._skip(attention)
        self._waiting = list(self.left)

    @property
    def done(self) -> bool:
        return not (self._waiting or self._busy)

    def tick(self) -> None:
        pass

    def next_job(self, node: Node) -> AttentionJob | None:
        if not self._waiting:
            return None
        attention = self._waiting.pop(0)
        self._busy[node.id] = attention
        self._tries[attention] += 1
        names = (attention, REFERENCE)
        measured = [r for r in self._journal.results() if r.case.attention in names]
        return AttentionJob(self._arguments, attention, self._info, measured)

    def on_event(self, node: Node, event: dict[str, Any]) -> None:
        attention = self._busy[node.id]
        if event["event"] == "result":
            result = CaseResult.from_json(event["result"])
            if result.case.attention == attention:  # dense attention has its own row
                for saved, files in event["models"]:
                    _store(self._journal.run_dir, saved, files)
                placed = replace(result, place=event["place"])
                self._session.handle({**event, "result": placed.to_json()}, self._display)
        elif event["event"] == "done":
            if event["case"] not in self._seen:
                self._seen.add(event["case"])
                self._session.handle(event, self._display)
        elif event["event"] == "ended":
            self._close(node, attention, event)
        elif event["event"] == "refused":
            self._tell(f"{node}: {event['reason']}")
        else:
            self._session.handle(event, self._display)

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        attention = self._busy.pop(node.id)
        if self._ended.pop(node.id, False):
            self.left.remove(attention)
            return
        if self._tries[attention] <= RETRIES:
            self._waiting.insert(0, attention)

    def _close(self, node: Node, attention: str, event: dict[str, Any]) -> None:
        """Store the files of suites that have ended on a machine."""
        for name, content in event["files"].items():
            stem, dot, suffix = name.partition(".")
            (self._journal.run_dir / f"{stem}-{attention}{dot}{suffix}").write_bytes(content)
        self._ended[node.id] = SuiteProcess.finished(event["status"])
        if not self._ended[node.id] and event["status"] >= 0:
            self._tell(f"{node}: pytest ended with status {event['status']}: {event['tail']}")

    def _skip(self, attention: str) -> None:
        """Leave out an attention that is measured to the end, all on one kind of machine."""
        outcomes = {r.case.id: r for r in self._journal.results() if r.case.attention == attention}
        cases = self._cases[attention]
        finished = [outcomes[case] for case in cases if case in outcomes]
        machines = [r.place.get("machine", self._info.fingerprint) for r in finished]
        if len(finished) == len(cases) and all(machine == machines[0] for machine in machines):
            self.left.remove(attention)
            for case in cases:
                self._display.done(case, reused=True)


def _store(run_dir: Path, saved: SavedModel, files: dict[str, bytes]) -> None:
    """Write a trained model into the run's folder."""

    def fill(folder: Path) -> None:
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    saved.write(run_dir, fill)
