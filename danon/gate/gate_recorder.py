"""The gate in MLflow: a comparison is a run, thresholds of an attention are a model version."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from danon.gate.result import GateResult
from danon.gate.result_report import files
from danon.gate.thresholds import Threshold, Thresholds
from danon.runs.case import Case
from danon.tracking import model_registry, run_owners, store
from danon.tracking.run_tree import metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from danon.runs.case import Phase

__all__ = ["BASELINE", "EXPERIMENT", "case_of", "metric_key", "record", "register", "try_record"]

EXPERIMENT = "gate"
BASELINE = "baseline"
PATIENCE = {"retries": 1, "timeout_s": 20}
OUTCOMES = ("clean", "regression", "undecided")

_log = logging.getLogger(__name__)


def record(result: GateResult) -> str:
    """Log a comparison; complete one that is recorded in part.

    Args:
        result: the comparison. One that is recorded already stays as it is.

    Returns:
        One line for the user: where it is.

    Raises:
        StoreError: The store cannot be used.
    """
    digest = hashlib.sha256(result.to_json().encode()).hexdigest()[:12]
    tags = {
        "danon.run_id": f"gate {result.head[:10]} {digest}",
        "danon.base": result.base,
        "danon.head": result.head,
        "danon.outcome": OUTCOMES[result.status],
        "danon.fingerprint": json.dumps(dict(result.fingerprint), sort_keys=True),
        "mlflow.source.git.commit": result.head,
    }
    metrics: dict[tuple[str, int], float] = {}
    for row in result.rows:
        if row.time_ratio is not None:
            ratio = row.time_ratio
            for name, value in (
                ("ratio", ratio.value),
                ("ratio_low", ratio.low),
                ("ratio_high", ratio.high),
                ("head_s", row.head_s),
            ):
                metrics[metric_key(row.case, name), row.case.length] = value
        if row.relative_time is not None:
            metrics[metric_key(row.case, "relative_time"), row.case.length] = row.relative_time
        for metric in row.facts:
            if metric.is_recall:
                metrics[metric_key(row.case, metric.name), row.case.length] = metric.head
    uri, start = store.tracking_uri(), int(result.when.timestamp() * 1000)
    with _patient() as client, store.exclusive(uri):  # or two would make a run each
        experiment = store.experiment_id(client, uri, EXPERIMENT)
        same = f"tags.`danon.run_id` = '{tags['danon.run_id']}'"
        earlier = next(iter(store.runs_where(client, [experiment], same)), None)
        if earlier is not None and earlier.info.status == "FINISHED":
            return f"recorded before in {store.redact_password(uri)}"
        name = f"gate {result.head[:10]}"
        with _run(client, name, tags, metrics, start=start, earlier=earlier) as run_id:
            for file, content in files(result).items():
                client.log_text(run_id, content.decode(), file)
    return f"recorded in {store.redact_password(uri)}"


def try_record(result: GateResult, folder: Path) -> str:
    """Log a comparison as :func:`record` does; a store that fails stops nothing.

    Args:
        result: the comparison.
        folder: has its files.

    Returns:
        One line for the user: where it is, or why it is not recorded and which command does it.
    """
    try:
        return record(result)
    except store.StoreError as error:
        return f"not recorded, `danon record {folder}` tries again: {error}"


def register(thresholds: Thresholds, reason: str) -> str:
    """Make thresholds a version of the model ``danon-<attention>``, with the alias ``baseline``.

    An attention whose thresholds the store has already keeps its version.

    Args:
        thresholds: of a repository.
        reason: for the tags of each new version.

    Returns:
        One line for the user.
    """
    by_attention: dict[str, dict[str, Threshold]] = {}
    for name, threshold in thresholds.cases.items():
        by_attention.setdefault(case_of(name).attention, {})[name] = threshold
    uri = store.tracking_uri()
    machine = json.dumps(thresholds.fingerprint, sort_keys=True)
    tags = {"danon.why": reason, "danon.commit": thresholds.commit, "danon.fingerprint": machine}
    try:
        with _patient() as client, store.exclusive(uri):  # or two gates would make a version each
            changed = {
                attention: cases
                for attention, cases in by_attention.items()
                if _baseline_digest(client, f"danon-{attention}") != _digest(cases)
            }
            if not changed:
                return f"thresholds are those of {store.redact_password(uri)}"
            metrics = {
                (metric_key(case_of(name), metric), case_of(name).length): value
                for cases in changed.values()
                for name, threshold in cases.items()
                for metric, value in _metrics(threshold).items()
            }
            name = f"thresholds {thresholds.commit[:10]}"
            with _run(client, name, tags, metrics) as run_id:
                for attention, cases in changed.items():
                    _make_version(client, run_id, attention, cases, tags)
    except store.StoreError as error:
        return f"thresholds are not registered, the next gate tries again: {error}"
    names = ", ".join(f"danon-{attention}" for attention in changed)
    return f"registered {names} ({BASELINE}) in {store.redact_password(uri)}"


def _baseline_digest(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, BASELINE)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return ""  # no such model, or nothing has the alias
        raise
    return str(version.tags.get("danon.thresholds", ""))


def _make_version(
    client: MlflowClient,
    run_id: str,
    attention: str,
    cases: Mapping[str, Threshold],
    tags: Mapping[str, str],
) -> None:
    name = f"danon-{attention}"
    model_registry.make(client, name)
    client.log_text(run_id, _text(cases), f"thresholds/{attention}/thresholds.json")
    accepted = {
        f"accepted.{case.replace('/', '.').replace('+', '_')}": f"{threshold.history[-1].why} "
        f"({threshold.history[-1].by}, {threshold.history[-1].when})"
        for case, threshold in cases.items()
        if threshold.history
    }
    version = client.create_model_version(
        name,
        f"runs:/{run_id}/thresholds/{attention}",
        run_id,
        {**tags, **accepted, "danon.thresholds": _digest(cases)},
        await_creation_for=0,
    )
    client.set_registered_model_alias(name, BASELINE, version.version)


@contextmanager
def _run(
    client: MlflowClient,
    name: str,
    tags: Mapping[str, str],
    metrics: Mapping[tuple[str, int], float],
    *,
    start: int | None = None,
    earlier: Run | None = None,
) -> Iterator[str]:
    """Open an MLflow run with tags and metrics; mark it FAILED if the block fails.

    Args:
        client: of the store.
        name: of the run.
        tags: of the run.
        metrics: by name and step.
        start: milliseconds since 1970; None for now.
        earlier: a run to complete instead of a new one.

    Yields:
        The id of the run.
    """
    identity = run_owners.owner_tags(store.tracking_uri(), f"{name} {os.getpid()}")
    from mlflow.entities import Metric

    experiment = store.experiment_id(client, store.tracking_uri(), EXPERIMENT)
    run = earlier or client.create_run(experiment, start, tags={**identity, **tags}, run_name=name)
    run_id: str = run.info.run_id
    status = "FAILED"
    try:
        at_ms = run.info.start_time  # the same each time: MLflow drops an identical metric
        entries = [Metric(n, value, at_ms, step) for (n, step), value in metrics.items()]
        for at in range(0, len(entries), 500):  # MLflow takes up to 1000 at once
            for refused in store.log_accepted(client, run_id, entries[at : at + 500]).values():
                _log.warning("MLflow refuses %s", refused)
        yield run_id
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)


@contextmanager
def _patient() -> Iterator[MlflowClient]:
    """Connect to the store; turn whatever it raises into a StoreError."""
    uri = store.tracking_uri()
    client = store.connect(uri)
    try:
        with store.bounded_retries(**PATIENCE):
            yield client
    except store.failures() as error:
        raise store.StoreError(
            f"{store.redact_password(uri)}: {store.root_cause(error)}"
        ) from error


def case_of(name: str) -> Case:
    """Return the case that a :attr:`Case.id` names.

    Raises:
        ValueError: It names none.
    """
    suite, *task, attention, length, dtype, phase, device = name.split("/")
    return Case(
        suite, attention, int(length[1:]), dtype, cast("Phase", phase), device, task="".join(task)
    )


def metric_key(case: Case, metric: str) -> str:
    """Return the name of a metric in MLflow: as in the suites, behind the attention's name."""
    return f"{case.attention}.{metric_name(case, metric)}"


def _metrics(threshold: Threshold) -> dict[str, float]:
    if (time := threshold.time) is None:
        return threshold.facts
    timed = {"relative_time": time.relative, "spread": time.spread, "drift": time.drift}
    return timed | threshold.facts


def _text(cases: Mapping[str, Threshold]) -> str:
    return json.dumps({name: t.model_dump() for name, t in cases.items()}, indent=1, sort_keys=True)


def _digest(cases: Mapping[str, Threshold]) -> str:
    return hashlib.sha256(_text(cases).encode()).hexdigest()[:12]
