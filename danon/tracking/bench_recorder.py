"""Recording a run in MLflow, while it happens or later from its journal."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from danon.report import configuration
from danon.runs.journal import Journal, RecordedRun, RunStatus
from danon.runs.locks import hold_lock
from danon.runs.run_info import RunInfo
from danon.tracking import model_registry, store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mlflow import MlflowClient

    from danon.runs.case import Case, CaseResult, Status

__all__ = ["ARTIFACTS", "Recorder", "metric_name", "upload"]

ARTIFACTS = ("benchmark*.json", "samples.parquet", "results.json", "report.html")
SETTINGS = "danon.settings"
REASON_LENGTH = 1000  # characters; MLflow refuses tags above 8000
PATIENCE = {"retries": 1, "timeout_s": 20}  # a bench must not wait minutes for a dead server

# What a child run says about itself when its cases differ: the first that occurs.
STATUS_ORDER: tuple[Status, ...] = ("failed", "measured", "over budget", "unavailable")

_log = logging.getLogger(__name__)


def metric_name(case: Case, name: str) -> str:
    """``forward.float32.time_s``, ``training.float32.code.bits_per_byte``.

    MLflow allows no ``+`` in a name.
    """
    kind = (case.phase.replace("+", "_"), case.dtype, case.task, name)
    return ".".join(filter(None, kind))


@dataclass
class _Child:
    """The run of one attention at one shape with one configuration.

    Attributes:
        tags: as stored, the tags of the recorded cases among them.
        semantics: as stored; empty as long as no case has told it.
    """

    run_id: str
    tags: dict[str, str] = field(default_factory=dict)
    semantics: str = ""

    @property
    def settings(self) -> str:
        """Digest of the configuration; empty as long as only cases without one are recorded."""
        return self.tags.get(SETTINGS, "")

    def takes(self, result: CaseResult) -> bool:
        """Return whether a case belongs here: its metrics are of this configuration, or of none."""
        digest = configuration.digest(result)
        if digest and self.settings:
            return digest == self.settings
        return not result.semantics or self.semantics in ("", _semantics(result))


@dataclass
class _Parent:
    run_id: str
    experiment_id: str
    children: dict[str, list[_Child]] = field(default_factory=dict)


class _Tree:
    """The MLflow runs of one invocation, found or made; every method may raise store.failures().

    Attributes:
        refused: by name, what MLflow does not take and why.
    """

    def __init__(self, client: MlflowClient, uri: str, info: RunInfo) -> None:
        self.refused: dict[str, str] = {}
        self._client = client
        self._uri = uri
        self._info = info
        self._parents: dict[str, _Parent] = {}
        self._identity = store.owner_tags(uri, info.run_id)
        started = dt.datetime.fromisoformat(info.started)
        # One timestamp for all metrics of an invocation: MLflow drops an identical metric, so
        # writing a case again after a kill between its metrics and its tag changes nothing.
        self._timestamp = int(started.timestamp() * 1000)

    def add(self, result: CaseResult) -> bool:
        """Record a case; False if this very result was recorded before."""
        from mlflow.entities import Metric, Param, RunTag

        case = result.case
        child = self._child(result)
        done, digest = _case_tag(case), _case_value(result)
        if child.tags.get(done) == digest:
            return False
        metrics = [
            Metric(metric_name(case, name), value, self._timestamp, case.length)
            for name, value in sorted(result.metrics.items())
        ]
        tags = {done: digest, **_status_tags(child.tags, result)}
        if result.place:
            tags["danon.place"] = json.dumps(result.place, sort_keys=True)
        if result.notes:
            tags["danon.notes"] = json.dumps(result.notes, sort_keys=True)[:REASON_LENGTH]
        params = []
        if result.semantics and not child.semantics:
            params.append(Param("semantics", _semantics(result)))
        if result.config and not child.settings:
            tags[SETTINGS] = configuration.digest(result)
            settings = sorted(configuration.settings(result).items())
            params += [Param(f"config.{name}", str(value)) for name, value in settings]
        self.refused |= store.log_accepted(
            self._client, child.run_id, metrics, params, [RunTag(*item) for item in tags.items()]
        )
        child.tags.update(tags)
        child.semantics = child.semantics or _semantics(result)
        return True

    def close(self, status: RunStatus, run_dir: Path) -> None:
        """Upload the files of the run and end every run of the tree."""
        for parent in self._parents.values():
            for file in (place for name in ARTIFACTS for place in sorted(run_dir.glob(name))):
                self._client.log_artifact(parent.run_id, str(file))
            for child in itertools.chain(*parent.children.values()):
                failed = child.tags.get("danon.status") == "failed"
                self._client.set_terminated(child.run_id, "FAILED" if failed else status)
            self._client.set_terminated(parent.run_id, status)

    def register(self, run_dir: Path, results: Sequence[CaseResult]) -> str:
        """Register the trained models of the run; what is to be said about it, or nothing."""

        def run_of(result: CaseResult) -> str:
            return self._child(result).run_id

        try:
            new = model_registry.register(self._client, run_dir, self._info, results, run_of)
        except store.failures() as error:  # a store may well have runs and no registry
            why = store.root_cause(error)
            return f"; its models are not registered, `danon record {run_dir}` tries again: {why}"
        return f"; {new} trained models are registered" if new else ""

    def _parent(self, suite: str) -> _Parent:
        if suite not in self._parents:
            self._parents[suite] = self._find(suite) or self._make(suite)
        return self._parents[suite]

    def _find(self, suite: str) -> _Parent | None:
        """The runs that an interrupted recording of the same invocation left."""
        from mlflow.entities import RunTag

        experiment = store.experiment_id(self._client, self._uri, suite)
        runs = store.runs_where(
            self._client, [experiment], f"tags.`danon.run_id` = '{self._info.run_id}'"
        )
        roots = [run for run in runs if "danon.child" not in run.data.tags]
        if not roots:
            return None
        parent = _Parent(roots[0].info.run_id, experiment)
        for run in runs:
            if key := run.data.tags.get("danon.child"):
                semantics = run.data.params.get("semantics", "")
                found = _Child(run.info.run_id, dict(run.data.tags), semantics)
                parent.children.setdefault(key, []).append(found)
        mine = [RunTag(*item) for item in self._identity.items()]
        for run in runs:
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._client.log_batch(run.info.run_id, tags=mine)
        return parent

    def _make(self, suite: str) -> _Parent:
        info = self._info
        tags = {
            **self._identity,
            "danon.suite": suite,
            "danon.commit": info.commit,
            "danon.dirty": str(info.dirty).lower(),
            "danon.profile": info.profile,
            "danon.seed": str(info.seed),
            "danon.command": info.command[:REASON_LENGTH],
            "danon.fingerprint": json.dumps(info.fingerprint, sort_keys=True),
            "danon.versions": json.dumps(info.versions, sort_keys=True),
            "mlflow.source.git.commit": info.commit,
        }
        experiment = store.experiment_id(self._client, self._uri, suite)
        run = self._client.create_run(
            experiment, start_time=self._timestamp, tags=tags, run_name=info.run_id
        )
        return _Parent(run.info.run_id, experiment)

    def _child(self, result: CaseResult) -> _Child:
        from mlflow.entities import Param

        case = result.case
        parent = self._parent(case.suite)
        shape = {
            "device": case.device,
            "batch": case.batch,
            "heads": case.heads,
            "head_dim": case.head_dim,
            "causal": case.causal,
        }
        key = json.dumps({"attention": case.attention, **shape})
        known = parent.children.setdefault(key, [])
        if not result.config:  # such a case may fit several: it stays where it was recorded before
            known = sorted(known, key=lambda child: _case_tag(case) not in child.tags)
        child = next((child for child in known if child.takes(result)), None)
        if child is None:
            tags = {
                **self._identity,
                "mlflow.parentRunId": parent.run_id,
                "danon.child": key,
                "danon.attention": case.attention,
            }
            run = self._client.create_run(
                parent.experiment_id, start_time=self._timestamp, tags=tags, run_name=case.attention
            )
            params = [Param("attention", case.attention)]
            params += [Param(name, str(value)) for name, value in shape.items()]
            self.refused |= store.log_accepted(self._client, run.info.run_id, params=params)
            child = _Child(run.info.run_id, tags)
            parent.children[key].append(child)
        return child


def _semantics(result: CaseResult) -> str:
    """As much of it as MLflow stores."""
    return result.semantics[:REASON_LENGTH]


def _case_tag(case: Case) -> str:
    return f"danon.case.{metric_name(case, f'N{case.length}')}"


def _case_value(result: CaseResult) -> str:
    """The outcome for a reader, and a digest that tells it from a later measurement."""
    digest = hashlib.sha256(result.to_json().encode()).hexdigest()[:12]
    outcome = f"{result.status}: {result.reason}" if result.reason else result.status
    return f"{outcome[:REASON_LENGTH]} [{digest}]"


def _status_tags(before: dict[str, str], result: CaseResult) -> dict[str, str]:
    """The child's status and reason, where this case changes them."""
    known = before.get("danon.status")
    ranks: list[str] = list(STATUS_ORDER)
    if known is not None and ranks.index(known) <= ranks.index(result.status):
        return {}
    return {"danon.status": result.status, "danon.reason": result.reason[:REASON_LENGTH]}


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """One process at a time records a run: two would each make its MLflow runs."""
    with hold_lock(
        run_dir / ".recording.lock",
        store.StoreError(f"{run_dir} is being recorded by another process"),
        unwritable=lambda error: store.StoreError(f"{run_dir} cannot be written: {error}"),
    ):
        yield


class Recorder:
    """Records cases in MLflow as they come. The journal is the truth; this follows it.

    A store that cannot be reached stops the recording, never the bench: ``danon record`` uploads
    the rest from the journal.
    """

    def __init__(self, info: RunInfo, journal: Journal) -> None:
        self._info = info
        self._journal = journal
        self._uri = store.tracking_uri()
        self._tree: _Tree | None = None
        self._recorded = 0
        self._open = contextlib.ExitStack()

    def start(self) -> str:
        """Connect, mark runs that died KILLED, and catch up with what a journal already holds.

        Returns:
            One line for the user: where the run is recorded, or why it is not.
        """
        try:
            self._open.enter_context(_alone(self._journal.run_dir))
            self._tree = _Tree(store.connect(self._uri), self._uri, self._info)
        except store.StoreError as error:
            self._open.close()
            return f"Not recording in MLflow: {error}. {self._later()}"
        self._reap()
        for result in self._journal.results():
            self.log(result)
        return (
            f"Recording in MLflow: {store.redact_password(self._uri)}"
            if self._recording()
            else self._not_recorded()
        )

    def log(self, result: CaseResult) -> None:
        """Record a case; without a store this does nothing."""
        if self._tree is None:
            return
        try:
            with store.bounded_retries(**PATIENCE):
                self._recorded += self._tree.add(result)
        except store.failures() as error:
            self._stop(error)

    def finish(self, status: RunStatus) -> str:
        """Set the status of the journal and of the MLflow runs, and upload the files of the run.

        Returns:
            One line for the user: what was recorded, or how to do it later.
        """
        self._journal.set_status(status)
        if self._tree is None:
            return self._not_recorded()
        run_dir = self._journal.run_dir
        try:
            with store.bounded_retries(**PATIENCE):
                self._tree.close(status, run_dir)
                models = self._tree.register(run_dir, self._journal.results())
        except store.failures() as error:
            self._stop(error)
            return f"Recorded in part in MLflow. {self._later()}"
        self._open.close()
        place = store.redact_password(self._uri)
        refused = _refusals(self._tree)
        return f"Recorded {self._recorded} cases in MLflow: {place}{models}{refused}"

    def _reap(self) -> None:
        try:
            store.reap_stale()
        except store.StoreError as error:
            self._stop(error)

    def _recording(self) -> bool:
        return self._tree is not None

    def _not_recorded(self) -> str:
        return f"Not recorded in MLflow. {self._later()}"

    def _stop(self, error: Exception) -> None:
        self._tree = None
        self._open.close()
        reason = store.root_cause(error)
        _log.warning("MLflow recording stopped: %s. %s", reason, self._later())

    def _later(self) -> str:
        return (
            f"Results are on disk; `danon record {self._journal.run_dir}` uploads them when "
            "MLflow can be reached."
        )


def upload(run_dir: Path) -> str:
    """Record a run from its journal; what is recorded already stays as it is.

    Returns:
        One line for the user: how many cases were new.

    Raises:
        FileNotFoundError: ``run_dir`` holds no run.
        SchemaError: it holds one that cannot be read.
        StoreError: the store cannot be used, or the run is still going on.
    """
    run = RecordedRun.read(run_dir)
    if run.status == "RUNNING":
        owner = Journal(run_dir).owner()
        raise store.StoreError(
            f"{run_dir} is still running (process {owner.pid} on {owner.host}): "
            "upload it when it has ended"
        )
    uri = store.tracking_uri()
    with _alone(run.run_dir):
        client = store.connect(uri)
        tree = _Tree(client, uri, run.info)
        try:
            with store.bounded_retries(**PATIENCE):
                new = sum(tree.add(result) for result in run.results)
                tree.close(run.status, run.run_dir)
                models = tree.register(run.run_dir, run.results)
        except store.failures() as error:
            raise store.StoreError(
                f"{store.redact_password(uri)}: {store.root_cause(error)}"
            ) from error
    place = f"{run.info.run_id} is recorded in {store.redact_password(uri)}"
    return f"{new} of {len(run.results)} cases were new; {place}{models}{_refusals(tree)}"


def _refusals(tree: _Tree) -> str:
    return f"; MLflow refuses {'; '.join(tree.refused.values())}" if tree.refused else ""
