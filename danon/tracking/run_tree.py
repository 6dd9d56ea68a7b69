"""The MLflow runs of one bench: a parent, and below it a child for each attention."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from typing import TYPE_CHECKING

from danon.report import configuration
from danon.runs.case import REFERENCE
from danon.tracking import bench_note, model_registry, run_owners, store, ui_pages
from danon.tracking.attention_settings import as_text, changed_settings, every_configuration
from danon.tracking.key_figures import key_figures

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlflow import MlflowClient

    from danon.runs.case import Case, CaseResult, Status
    from danon.runs.journal import RunStatus
    from danon.runs.run_info import RunInfo
    from danon.tracking.key_figures import KeyFigures

__all__ = ["ARTIFACTS", "RunTree", "metric_name"]

JOURNAL = ("run.json", "cases.jsonl")
ARTIFACTS = ("benchmark*.json", "samples.parquet", "results.json", "report.html")
SETTINGS_FILE = "settings.json"
"""Artifact of a child: every configuration of the attention, and the cases that had it."""
ATTENTION = "danon.attention"
"""Tag of a child with the name of its attention; the parent has none."""
SETTINGS = "danon.settings"
"""Tag of a child with the digest of the configuration that its parameters are from."""
RECORDED = "danon.recorded"
"""Prefix of tags with the digests of the outcomes that a run records."""
DIGEST_LENGTH = 12
DIGESTS_PER_TAG = 300  # MLflow refuses tags above 8000 characters
REASON_LENGTH = 1000  # characters
MOST_CHILDREN = 1000
CASES_PER_BATCH = 20  # MLflow takes up to 1000 metrics at once
TAGS_PER_BATCH = 90  # MLflow takes up to 100

# A child run whose cases differ has the first of these statuses that occurs.
STATUS_ORDER: tuple[Status, ...] = ("failed", "measured", "over budget", "unavailable")
WITHOUT_FIGURES = ("over budget", "unavailable")


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
class _Run:
    """One MLflow run of the bench.

    Attributes:
        run_id: id of the MLflow run.
        tags: stored tags.
    """

    run_id: str
    tags: dict[str, str] = field(default_factory=dict)

    def recorded(self) -> set[str]:
        """Return the digests of the outcomes that this run records."""
        tags = (text for name, text in self.tags.items() if name.startswith(RECORDED))
        return {digest for text in tags for digest in text.split()}

    def with_digests(self, digests: Sequence[str]) -> dict[str, str]:
        """Return the tags that add outcomes."""
        tags: dict[str, str] = {}
        for number, digest in enumerate(digests, start=len(self.recorded())):
            name = f"{RECORDED}.{number // DIGESTS_PER_TAG}"
            tags[name] = f"{tags.get(name, self.tags.get(name, ''))} {digest}".strip()
        return tags


class RunTree:
    """The MLflow runs of one invocation: those of an interrupted recording, else new ones.

    An attention without any figure has no run: a finished run would look like a success, and there
    is nothing to compare. The parent's description has its reason. Every method may raise one of
    :func:`danon.tracking.store.failures`.

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
        self._experiment = ""
        self._parent: _Run | None = None
        self._children: dict[str, _Run] = {}
        self._identity = run_owners.owner_tags(uri, info.run_id)
        started = dt.datetime.fromisoformat(info.started)
        # One timestamp for all metrics of an invocation: MLflow drops an identical metric, so
        # writing a case again after a kill between its metrics and its tag changes nothing.
        self._timestamp = int(started.timestamp() * 1000)

    def keep_copy(self, run_dir: Path) -> None:
        """Begin the parent run if needed, and upload the journal as it is now.

        The copy outlives the machine that measures.

        Args:
            run_dir: folder of the run.
        """
        for file in (run_dir / name for name in JOURNAL):
            if file.is_file():
                self._client.log_artifact(self._open().run_id, str(file))

    def record(self, status: RunStatus, run_dir: Path, results: Sequence[CaseResult]) -> int:
        """Record every case that is not yet recorded, upload files, and end every MLflow run.

        Args:
            status: final status.
            run_dir: folder of the run.
            results: outcomes of its cases.

        Returns:
            Number of new cases.
        """
        parent, found = self._open(), key_figures(results, self._info)
        by_attention: dict[str, list[CaseResult]] = {name: [] for name in found.ranked}
        for result in results:
            by_attention.setdefault(result.case.attention, []).append(result)
        new = 0
        for rank, (attention, own) in enumerate(by_attention.items()):
            if attention not in self._children and all(r.status in WITHOUT_FIGURES for r in own):
                new += self._add(parent, own)
                continue
            child = self._children.get(attention) or self._make_child(attention, rank)
            self._describe_child(child, found, own)
            new += self._add(child, own)
            failed = any(result.status == "failed" for result in own)
            self._client.set_terminated(child.run_id, "FAILED" if failed else status)
        self.keep_copy(run_dir)
        for file in (path for name in ARTIFACTS for path in sorted(run_dir.glob(name))):
            self._client.log_artifact(parent.run_id, str(file))
        self._describe(parent, found, results)
        self._client.set_terminated(parent.run_id, status)
        return new

    def register(self, run_dir: Path, results: Sequence[CaseResult]) -> str:
        """Register the trained models of the run.

        Args:
            run_dir: folder of the run.
            results: outcomes of its cases.

        Returns:
            Words on new versions or a failure, for the end of a line; empty without any.
        """

        def run_of(result: CaseResult) -> str:
            self._open()
            return self._children[result.case.attention].run_id

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

    def _open(self) -> _Run:
        """Return the parent run: that of an interrupted recording, else a new one."""
        if self._parent is None:
            self._experiment = store.experiment_id(self._client, self._uri, ui_pages.EXPERIMENT)
            self._parent = self._find() or self._make_parent()
        return self._parent

    def _find(self) -> _Run | None:
        """Return the parent run of an interrupted recording of this invocation, or None."""
        from mlflow.entities import RunTag

        same = f"tags.`danon.run_id` = '{self._info.run_id}'"
        runs = store.runs_where(self._client, [self._experiment], same)
        owner_tags = [RunTag(*item) for item in self._identity.items()]
        parent = None
        for run in runs:
            stored = _Run(run.info.run_id, dict(run.data.tags))
            if ATTENTION in stored.tags:
                self._children[stored.tags[ATTENTION]] = stored
            else:
                parent = stored
            self._client.update_run(stored.run_id, status="RUNNING")
            self._client.log_batch(stored.run_id, tags=owner_tags)
        if parent is None:
            self._children.clear()  # somebody deleted it: its children belong to nothing
        return parent

    def _make_parent(self) -> _Run:
        info = self._info
        tags = {
            **self._identity,
            **self._origin(),
            "danon.seed": str(info.seed),
            "danon.command": info.command[:REASON_LENGTH],
            "danon.fingerprint": json.dumps(info.fingerprint, sort_keys=True),
            "danon.versions": json.dumps(info.versions, sort_keys=True),
        }
        name = bench_note.run_name(info, 0)
        # MLflow's compare page draws what differs, runs of one commit too, in ten characters.
        started = dt.datetime.fromisoformat(info.started)
        params = {"commit": info.commit[:10], "started": f"{started:%m%d %H:%M}"}
        return self._create(name, self._timestamp, tags, params)

    def _make_child(self, attention: str, rank: int) -> _Run:
        # MLflow lists the latest start first.
        start = self._timestamp + max(0, MOST_CHILDREN - rank)
        tags = {
            **self._identity,
            **self._origin(),
            "mlflow.parentRunId": self._open().run_id,
            ATTENTION: attention,
        }
        child = self._create(attention, start, tags, {"attention": attention})
        self._children[attention] = child
        return child

    def _create(self, name: str, start: int, tags: dict[str, str], params: dict[str, str]) -> _Run:
        from mlflow.entities import Param

        run = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=name)
        stored = [Param(*item) for item in params.items()]
        self.refused |= store.log_accepted(self._client, run.info.run_id, params=stored)
        return _Run(run.info.run_id, tags)

    def _origin(self) -> dict[str, str]:
        """Return the tags that parent and children are filtered by."""
        info = self._info
        return {
            "danon.commit": info.commit,
            "danon.dirty": str(info.dirty).lower(),
            "danon.profile": info.profile,
            "danon.machine": str(info.fingerprint.get("id", "unknown")),
            "danon.device": str(info.fingerprint.get("device", "cpu")),
            "mlflow.source.git.commit": info.commit,
        }

    def _describe_child(
        self, child: _Run, found: KeyFigures, results: Sequence[CaseResult]
    ) -> None:
        """Add key figures, parameters, description and settings, before all other figures.

        MLflow's compare page draws the metric that was logged first.
        """
        from mlflow.entities import Metric, Param, RunTag

        attention = child.tags[ATTENTION]
        metrics = [
            Metric(name, value, self._timestamp, found.columns[name])
            for name, value in sorted(found.values.get(attention, {}).items())
        ]
        if {_digest(result) for result in results} <= child.recorded():
            metrics = []  # recorded before
        # Settings of trainings come second: they are sized for their task.
        ordered = sorted(results, key=lambda result: result.case.phase == "training")
        semantics = next((result.semantics for result in ordered if result.semantics), "")
        note = bench_note.attention_note(attention, semantics, found)
        tags = _outcome_tags(results) | ({bench_note.NOTE: note} if note else {})
        params = []
        first = next((result for result in ordered if result.config), None)
        if first is not None and SETTINGS not in child.tags:
            tags[SETTINGS] = configuration.digest(first)
            changed = sorted(changed_settings(first).items())
            params = [Param(f"config.{name}", as_text(value)) for name, value in changed]
        log, stored = partial(store.log_accepted, self._client), [*starmap(RunTag, tags.items())]
        self.refused |= log(child.run_id, metrics, params)
        for at in range(0, len(stored), TAGS_PER_BATCH):
            self.refused |= log(child.run_id, tags=stored[at : at + TAGS_PER_BATCH])
        child.tags.update(tags)
        if settings := every_configuration(results):
            text = json.dumps(settings, indent=1)
            self._client.log_text(child.run_id, text, SETTINGS_FILE)

    def _add(self, run: _Run, results: Sequence[CaseResult]) -> int:
        """Add the figures of the cases that a run does not yet record, and count these."""
        from mlflow.entities import Metric, RunTag

        recorded = run.recorded()
        by_digest = {_digest(result): result for result in results}
        new = [digest for digest in by_digest if digest not in recorded]
        for at in range(0, len(new), CASES_PER_BATCH):
            digests = new[at : at + CASES_PER_BATCH]
            metrics = [
                Metric(
                    f"{case.suite}.{metric_name(case, name)}", value, self._timestamp, case.length
                )
                for result in (by_digest[digest] for digest in digests)
                for case in (result.case,)
                for name, value in sorted(result.metrics.items())
            ]
            tags = run.with_digests(digests)
            stored = [RunTag(*item) for item in tags.items()]
            self.refused |= store.log_accepted(self._client, run.run_id, metrics, tags=stored)
            run.tags.update(tags)
        return len(new)

    def _describe(self, parent: _Run, found: KeyFigures, results: Sequence[CaseResult]) -> None:
        """Name the parent by its content, and describe it, its figures and the experiment."""
        from mlflow.entities import Metric, RunTag

        client, experiment = self._client, self._experiment
        runs = {attention: child.run_id for attention, child in self._children.items()}
        note = bench_note.bench_note(results, self._info, found, experiment, runs)
        metrics = [
            Metric(f"{found.speedup.partition(' ')[2]} {attention}", value, self._timestamp, length)
            for attention, values in found.values.items()
            if attention != REFERENCE  # always 1
            and (value := values.get(found.speedup)) is not None
            and (length := found.columns[found.speedup])
        ]
        tags = [RunTag(bench_note.NOTE, note)]
        self.refused |= store.log_accepted(client, parent.run_id, metrics, tags=tags)
        client.update_run(parent.run_id, name=bench_note.run_name(self._info, len(found.ranked)))
        client.set_experiment_tag(experiment, bench_note.NOTE, bench_note.experiment_note())
        if names := found.names:
            ascending = names[0] in found.lower_is_better
            views = ui_pages.shared_views(self._info.run_id, names, ascending=ascending)
            for name, view in views.items():
                client.set_experiment_tag(experiment, name, view)


def _digest(result: CaseResult) -> str:
    """Return a digest that changes with the outcome of a case."""
    return hashlib.sha256(result.to_json().encode()).hexdigest()[:DIGEST_LENGTH]


def _outcome_tags(results: Sequence[CaseResult]) -> dict[str, str]:
    """Return the tags of a child on the outcomes of its cases."""
    worst = min(results, key=lambda result: STATUS_ORDER.index(result.status))
    tags = {"danon.status": worst.status, "danon.reason": worst.reason[:REASON_LENGTH]}
    for result in results:
        case = result.case
        if result.status != "measured":
            name = f"danon.case.{case.suite}.{metric_name(case, f'N{case.length}')}"
            tags[name] = f"{result.status}: {result.reason}"[:REASON_LENGTH]
        if result.place:
            tags["danon.place"] = json.dumps(result.place, sort_keys=True)
        if result.notes:
            tags["danon.notes"] = json.dumps(result.notes, sort_keys=True)[:REASON_LENGTH]
    return tags
