"""The MLflow runs of one bench: a parent for each suite, below it a child for each attention."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from danon.report import configuration
from danon.tracking import model_registry, run_owners, store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlflow import MlflowClient

    from danon.runs.case import Case, CaseResult, Status
    from danon.runs.journal import RunStatus
    from danon.runs.run_info import RunInfo

__all__ = ["ARTIFACTS", "RunTree", "metric_name"]

ARTIFACTS = ("benchmark*.json", "samples.parquet", "results.json", "report.html")
SETTINGS = "danon.settings"
REASON_LENGTH = 1000  # characters; MLflow refuses tags above 8000

# A child run whose cases differ has the first of these statuses that occurs.
STATUS_ORDER: tuple[Status, ...] = ("failed", "measured", "over budget", "unavailable")


def metric_name(case: Case, name: str) -> str:
    """Return the name of a metric in MLflow: ``forward.float32.time_s``.

    MLflow allows no ``+`` in a name.

    Args:
        case: case of the figure.
        name: name of the metric in its suite.
    """
    parts = (case.phase.replace("+", "_"), case.dtype, case.task, name)
    return ".".join(filter(None, parts))


@dataclass
class _Child:
    """The run of one attention at one shape with one configuration.

    Attributes:
        run_id: id of the MLflow run.
        tags: stored tags, those of recorded cases included.
        semantics: stored description; empty until a case has one.
    """

    run_id: str
    tags: dict[str, str] = field(default_factory=dict)
    semantics: str = ""

    @property
    def settings(self) -> str:
        """Digest of the configuration; empty until a case with a configuration is recorded."""
        return self.tags.get(SETTINGS, "")

    def takes(self, result: CaseResult) -> bool:
        """Return True if a case has this configuration, or none."""
        digest = configuration.digest(result)
        if digest and self.settings:
            return digest == self.settings
        return not result.semantics or self.semantics in ("", _semantics(result))


@dataclass
class _Parent:
    run_id: str
    experiment_id: str
    children: dict[str, list[_Child]] = field(default_factory=dict)


class RunTree:
    """The MLflow runs of one invocation: those of an interrupted recording, else new ones.

    Every method may raise one of :func:`danon.tracking.store.failures`.

    Args:
        client: client of the store.
        uri: address of the store.
        info: description of the run.

    Attributes:
        refused: name -> value that MLflow refused, and its reason.
    """

    def __init__(self, client: MlflowClient, uri: str, info: RunInfo) -> None:
        self.refused: dict[str, str] = {}
        self._client = client
        self._uri = uri
        self._info = info
        self._parents: dict[str, _Parent] = {}
        self._identity = run_owners.owner_tags(uri, info.run_id)
        started = dt.datetime.fromisoformat(info.started)
        # One timestamp for all metrics of an invocation: MLflow drops an identical metric, so
        # writing a case again after a kill between its metrics and its tag changes nothing.
        self._timestamp = int(started.timestamp() * 1000)

    def add(self, result: CaseResult) -> bool:
        """Record a case, and return False if the same result was recorded before.

        Args:
            result: outcome of the case.
        """
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
        """Upload the files of the run, and end every MLflow run.

        Args:
            status: final status.
            run_dir: folder of the run.
        """
        for parent in self._parents.values():
            for file in (path for name in ARTIFACTS for path in sorted(run_dir.glob(name))):
                self._client.log_artifact(parent.run_id, str(file))
            for child in itertools.chain(*parent.children.values()):
                failed = child.tags.get("danon.status") == "failed"
                self._client.set_terminated(child.run_id, "FAILED" if failed else status)
            self._client.set_terminated(parent.run_id, status)

    def register(self, run_dir: Path, results: Sequence[CaseResult]) -> str:
        """Register the trained models of the run.

        Args:
            run_dir: folder of the run.
            results: outcomes of its cases.

        Returns:
            Words on new versions or a failure, for the end of a line; empty without any.
        """

        def run_of(result: CaseResult) -> str:
            return self._child(result).run_id

        try:
            new = model_registry.register(self._client, run_dir, self._info, results, run_of)
        except store.failures() as error:  # a store may well have runs and no registry
            reason = store.root_cause(error)
            return (
                f"; its models are not registered, `danon record {run_dir}` tries again: {reason}"
            )
        return f"; {new} trained models are registered" if new else ""

    def refusals(self) -> str:
        """Return what MLflow refused, for the end of a line; empty if nothing."""
        return f"; MLflow refuses {'; '.join(self.refused.values())}" if self.refused else ""

    def _parent(self, suite: str) -> _Parent:
        if suite not in self._parents:
            self._parents[suite] = self._find(suite) or self._make(suite)
        return self._parents[suite]

    def _find(self, suite: str) -> _Parent | None:
        """Return the runs of an interrupted recording of this invocation, or None."""
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
                child = _Child(run.info.run_id, dict(run.data.tags), semantics)
                parent.children.setdefault(key, []).append(child)
        owner_tags = [RunTag(*item) for item in self._identity.items()]
        for run in runs:
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._client.log_batch(run.info.run_id, tags=owner_tags)
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
        children = parent.children.setdefault(key, [])
        if not result.config:  # such a case may fit several: it stays where it was recorded before
            children = sorted(children, key=lambda child: _case_tag(case) not in child.tags)
        child = next((child for child in children if child.takes(result)), None)
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
    """Return the description of an attention, cut to a length that MLflow stores."""
    return result.semantics[:REASON_LENGTH]


def _case_tag(case: Case) -> str:
    return f"danon.case.{metric_name(case, f'N{case.length}')}"


def _case_value(result: CaseResult) -> str:
    """Return the outcome in words, and a digest that changes with the measurement."""
    digest = hashlib.sha256(result.to_json().encode()).hexdigest()[:12]
    outcome = f"{result.status}: {result.reason}" if result.reason else result.status
    return f"{outcome[:REASON_LENGTH]} [{digest}]"


def _status_tags(before: dict[str, str], result: CaseResult) -> dict[str, str]:
    """Return the child's status and reason if this case changes them."""
    status = before.get("danon.status")
    ranks: list[str] = list(STATUS_ORDER)
    if status is not None and ranks.index(status) <= ranks.index(result.status):
        return {}
    return {"danon.status": result.status, "danon.reason": result.reason[:REASON_LENGTH]}
