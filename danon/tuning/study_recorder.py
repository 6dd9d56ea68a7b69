"""Record studies in MLflow: a run for the study, a nested run for each trial."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from danon.runs.run_info import RunInfo
from danon.tracking import run_owners, store
from danon.tuning.study import ERROR, HISTORY, ORIGIN, REPEAT_OF, SURPLUS, plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["Recorder"]

EXPERIMENT = "tune"
RUN = "mlflow_run_id"
"""Attribute of studies and trials: the id of their MLflow run."""
PATIENCE = {"retries": 1, "timeout_s": 20}
MAX_TAG = 1000
"""Characters of a tag."""
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
"""MLflow's status by Optuna's state; the tag ``danon.state`` has the latter."""


class Recorder:
    """A listener that records the trials of one worker; a store that fails stops no study.

    Args:
        study: the study.
        info: facts about this invocation.
        joined: another command began the study and has made its run.
    """

    def __init__(self, study: Study, info: RunInfo, *, joined: bool = False) -> None:
        self._study, self._info = study, info
        self._uri = store.tracking_uri()
        self._client: MlflowClient | None = None
        self._experiment = self._parent = self._trouble = ""
        self._identity: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        with self._trying():
            tags = run_owners.owner_tags(self._uri, info.run_id)
            self._identity = {**tags, "danon.study": study.study_name}
            self._client = store.connect(self._uri)
            run_owners.reap_stale()
            self._experiment = store.experiment_id(self._client, self._uri, EXPERIMENT)
            self._parent = str(
                study.user_attrs[RUN]
                if joined and RUN in study.user_attrs
                else self._study_run(self._client)
            )

    def on_begin(self, trial: Trial) -> None:
        """Create the run of a trial, and store its id with the trial."""
        if self._client is not None:
            with self._trying():
                trial.set_user_attr(RUN, self._create_run(self._client, trial.number, trial.params))

    def on_end(self, trial: FrozenTrial) -> None:
        """Complete the run of a trial."""
        if self._client is not None:
            with self._trying():
                run = trial.user_attrs.get(RUN)  # a trial of a cluster's machine has none
                run = run or self._create_run(self._client, trial.number, trial.params)
                self._complete(self._client, trial, run)

    def finish(self, status: str, files: Sequence[Path], tags: Mapping[str, str]) -> str:
        """Record trials that have no run yet, and the study's own files and tags.

        Args:
            status: MLflow's status of the study's run.
            files: files to store with the run.
            tags: tags of the run.

        Returns:
            One line for the user.
        """
        if self._client is not None:
            with self._trying():
                new = self._record_missing(self._client)
                for file in files:
                    self._client.log_artifact(self._parent, str(file))
                self._log(self._client, self._parent, {}, tags=tags)
                self._client.set_terminated(self._parent, status)
                where = store.redact_password(self._uri)
                words = "; ".join(self._refused.values())
                refused = f"; MLflow refuses {words}" if words else ""
                return f"recorded in {where}{f', {new} trials later' if new else ''}{refused}"
        return f"not recorded, the same command records it later: {self._trouble}"

    def _study_run(self, client: MlflowClient) -> str:
        with store.exclusive(self._uri):  # without it, two workers make a run each
            run_id = str(self._study.user_attrs.get(RUN, ""))
            same = f"tags.`danon.study` = '{_quoted(self._study.study_name)}'"
            runs = store.runs_where(client, [self._experiment], same)
            if any(run.info.run_id == run_id for run in runs):
                client.update_run(run_id, status="RUNNING")
                for name, value in self._identity.items():
                    client.set_tag(run_id, name, value)
                return run_id
            plan = plan_of(self._study)
            tags = {
                **self._identity,
                "danon.commit": self._info.commit,
                "danon.dirty": str(self._info.dirty).lower(),
                "danon.command": self._info.command[:MAX_TAG],
                "danon.fingerprint": json.dumps(self._info.fingerprint, sort_keys=True),
                "danon.versions": json.dumps(self._info.versions, sort_keys=True),
                "danon.space": plan.space[:MAX_TAG],
                "mlflow.source.git.commit": self._info.commit,
            }
            run = client.create_run(self._experiment, tags=tags, run_name=self._study.study_name)
            names = ("kind", "attention", "length", "dtype", "device", "sampler", "seed")
            params = {name: getattr(plan, name) for name in names}
            self._log(client, run.info.run_id, params | {"objectives": ",".join(plan.objectives)})
            self._study.set_user_attr(RUN, run.info.run_id)
            return str(run.info.run_id)

    def _create_run(self, client: MlflowClient, number: int, choice: dict[str, Any]) -> str:
        tags = {**self._identity, "mlflow.parentRunId": self._parent, "danon.trial": str(number)}
        run = client.create_run(self._experiment, tags=tags, run_name=f"trial {number}")
        self._log(client, run.info.run_id, choice)
        return str(run.info.run_id)

    def _log(
        self,
        client: MlflowClient,
        run_id: str,
        params: Mapping[str, Any],
        metrics: Sequence[Metric] = (),
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        from mlflow.entities import Param, RunTag

        self._refused |= store.log_accepted(
            client,
            run_id,
            metrics,
            [Param(name, str(value)) for name, value in params.items()],
            [RunTag(name, value) for name, value in tags.items()],
        )

    def _complete(self, client: MlflowClient, trial: FrozenTrial, run_id: str) -> None:
        from mlflow.entities import Metric

        end = trial.datetime_complete or trial.datetime_start
        when = int(end.timestamp() * 1000) if end else 0
        metrics = [
            Metric(name, float(value), when, step)
            for step, figures in enumerate(trial.user_attrs.get(HISTORY, ()))
            for name, value in figures.items()
        ]
        if trial.values and trial.state.name == "COMPLETE":  # a pruned trial has a bound instead
            last = len(trial.user_attrs.get(HISTORY, ()))
            metrics += [
                Metric(f"objective.{name}", value, when, last)
                for name, value in zip(plan_of(self._study).objectives, trial.values, strict=False)
            ]
        error = trial.user_attrs.get(ERROR, "")
        died = trial.state.name == "FAIL" and not error
        tags = {"danon.state": "died" if died else trial.state.name.lower()}
        tags |= {"danon.error": error[:MAX_TAG]} if error else {}
        if place := trial.user_attrs.get(ORIGIN, {}).get("place"):
            tags["danon.place"] = json.dumps(place, sort_keys=True)
        if REPEAT_OF in trial.user_attrs:
            tags["danon.again"] = str(trial.user_attrs[REPEAT_OF])
        self._log(client, run_id, {}, metrics, tags)
        client.set_terminated(run_id, "KILLED" if died else STATUS[trial.state.name], when)

    def _record_missing(self, client: MlflowClient) -> int:
        """Record trials that other workers, or a store out of reach, left out."""
        children = f"tags.`mlflow.parentRunId` = '{self._parent}'"
        runs = {
            run.data.tags["danon.trial"]: run
            for run in store.runs_where(client, [self._experiment], children)
        }
        new = 0
        for trial in self._study.get_trials(deepcopy=False):
            if not trial.state.is_finished() or SURPLUS in trial.user_attrs:
                continue
            run = runs.get(str(trial.number))
            if run is not None and "danon.state" in run.data.tags:
                continue
            run_id = (
                self._create_run(client, trial.number, trial.params)
                if run is None
                else run.info.run_id
            )
            self._complete(client, trial, run_id)
            new += 1
        return new

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Give up recording, not the study, when the store fails."""
        try:
            with store.bounded_retries(**PATIENCE):
                yield
        except store.StoreError as error:
            self._client, self._trouble = None, str(error)
        except store.failures() as error:
            self._client = None
            self._trouble = f"{store.redact_password(self._uri)}: {store.root_cause(error)}"


def _quoted(name: str) -> str:
    return name.replace("'", "''")
