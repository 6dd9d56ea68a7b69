"""A bench on all machines of a cluster: an attention is measured on one of them, as a whole."""

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
from danon.console.messages import say
from danon.processes.suite_process import SuiteProcess
from danon.report.tables import REFERENCE
from danon.runs.case import CaseResult
from danon.runs.saved_model import SavedModel

__all__ = ["run_on_cluster"]

RETRIES = 1
"""Of an attention whose machine died."""


def run_on_cluster(
    session: Session, options: Options, console: Console, stopped: Sequence[int]
) -> int:
    """Run the suites; returns the exit status, as :func:`danon.bench.command.bench`.

    Args:
        stopped: gets the number of a signal that ends it.

    Raises:
        ClusterError: there is no cluster, or none that can measure.
    """

    def tell(words: str) -> None:
        say(console, "Cluster", words)

    targets = (*options.attentions, *options.suites.split(","))
    own = [file for target in targets if (file := target.rpartition(":")[0]).endswith(".py")]
    with connected(options.address), WorkerPool(options.device, own, tell) as pool:
        for node in pool.nodes:
            tell(f"{node} measures")
        plan = _PlanDispatcher(options)
        pool.run(plan, lambda: stopped)
        if stopped:
            return 128 + stopped[0]
        if plan.refusal:
            raise ClusterError(plan.refusal)
        planned = [case for case, _ in plan.event["cases"]]
        event = plan.event
        session.open(event["fingerprint"], event["basis"], planned, suites=event["suites"])
        why = ""
        with Display(console) as display:
            work = _AttentionDispatcher(session, options, plan.event, display, tell)
            try:
                pool.run(work, lambda: stopped)
            except ClusterError as error:
                why = f"{error}: "
    left = work.left
    if not left and not stopped:
        return session.close((), "", 0)
    unfinished = f"{why}{', '.join(left)} not measured to the end; --resume goes on"
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
        self._asked = self.done = False
        self.event: dict[str, Any] = {}
        self.refusal = ""

    def tick(self) -> None:
        pass

    def next_job(self, node: Node) -> DescribeJob | None:
        if self._asked:
            return None
        self._asked = True
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
            self._asked = False
        else:
            self.done = True


class _AttentionDispatcher:
    """Dispatcher of a job for every attention: dense attention first, then the longest ones."""

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
        known = [r for r in self._journal.results() if r.case.attention in (attention, REFERENCE)]
        return AttentionJob(self._arguments, attention, self._info, known)

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
        """The suites have ended on a machine."""
        for name, content in event["files"].items():
            stem, dot, kind = name.partition(".")
            (self._journal.run_dir / f"{stem}-{attention}{dot}{kind}").write_bytes(content)
        self._ended[node.id] = SuiteProcess.finished(event["status"])
        if not self._ended[node.id] and event["status"] >= 0:
            self._tell(f"{node}: pytest ended with status {event['status']}: {event['tail']}")

    def _skip(self, attention: str) -> None:
        """Leave out what an earlier bench has measured to the end, all on one kind of machine."""
        known = {r.case.id: r for r in self._journal.results() if r.case.attention == attention}
        cases = self._cases[attention]
        mine = [known[case] for case in cases if case in known]
        machines = [r.place.get("machine", self._info.fingerprint) for r in mine]
        if len(mine) == len(cases) and all(machine == machines[0] for machine in machines):
            self.left.remove(attention)
            for case in cases:
                self._display.done(case, reused=True)


def _store(run_dir: Path, saved: SavedModel, files: dict[str, bytes]) -> None:
    """Put a trained model into the run's folder."""

    def fill(folder: Path) -> None:
        for name, content in files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    saved.write(run_dir, fill)
