"""Studies in MLflow: a run for the study, a nested one for every trial."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from danon.runs.run_info import RunInfo
from danon.tracking import store
from danon.tuning.study import SURPLUS, plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["Recorder"]

EXPERIMENT = "tune"
RUN = "mlflow_run_id"
"""Attribute of studies and trials: the id of their run."""
PATIENCE = {"retries": 1, "timeout_s": 20}
LONGEST = 1000
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
"""MLflow's of Optuna's; the tag ``danon.state`` says which it was."""


class Recorder:
    """Follows the trials of one worker. The study is the truth: a store that fails stops nothing.

    Args:
        info: of this invocation.
        joined: the study, and its run, are another one's.
    """

    def __init__(self, study: Study, info: RunInfo, *, joined: bool = False) -> None:
        self._study, self._info = study, info
        self._uri = store.tracking_uri()
        self._client: MlflowClient | None = None
        self._experiment = self._parent = self.trouble = ""
        self._identity: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        with self._trying():
            tags = store.owner_tags(self._uri, info.run_id)
            self._identity = {**tags, "danon.study": study.study_name}
            self._client = store.connect(self._uri)
            store.reap_stale()
            self._experiment = store.experiment_id(self._client, self._uri, EXPERIMENT)
            self._parent = str(
                study.user_attrs[RUN]
                if joined and RUN in study.user_attrs
                else self._study_run(self._client)
            )

    def begun(self, trial: Trial) -> None:
        """A run for a trial, linked from it."""
        if self._client is not None:
            with self._trying():
                trial.set_user_attr(RUN, self._made(self._client, trial.number, trial.params))

    def ended(self, trial: FrozenTrial) -> None:
        """Complete the run of a trial."""
        if self._client is not None:
            with self._trying():
                run = trial.user_attrs.get(RUN)  # of a cluster's machine has none
                run = run or self._made(self._client, trial.number, trial.params)
                self._complete(self._client, trial, run)

    def finish(self, status: str, files: Sequence[Path], tags: dict[str, str]) -> str:
        """Record what is not, and the study's own figures and files.

        Returns:
            One line for the user.
        """
        if self._client is not None:
            with self._trying():
                new = self._caught_up(self._client)
                for file in files:
                    self._client.log_artifact(self._parent, str(file))
                self._log(self._client, self._parent, {}, tags=tags)
                self._client.set_terminated(self._parent, status)
                where = store.redact_password(self._uri)
                words = "; ".join(self._refused.values())
                refused = f"; MLflow refuses {words}" if words else ""
                return f"recorded in {where}{f', {new} trials later' if new else ''}{refused}"
        return f"not recorded, the same command records it later: {self.trouble}"

    def _study_run(self, client: MlflowClient) -> str:
        with store.exclusive(self._uri):  # or two workers would make a run each
            known = self._study.user_attrs.get(RUN, "")
            same = f"tags.`danon.study` = '{_quoted(self._study.study_name)}'"
            runs = store.runs_where(client, [self._experiment], same)
            if any(run.info.run_id == known for run in runs):
                client.update_run(known, status="RUNNING")
                for name, value in self._identity.items():
                    client.set_tag(known, name, value)
                return str(known)
            plan = plan_of(self._study)
            tags = {
                **self._identity,
                "danon.commit": self._info.commit,
                "danon.dirty": str(self._info.dirty).lower(),
                "danon.command": self._info.command[:LONGEST],
                "danon.fingerprint": json.dumps(self._info.fingerprint, sort_keys=True),
                "danon.versions": json.dumps(self._info.versions, sort_keys=True),
                "danon.space": plan.space[:LONGEST],
                "mlflow.source.git.commit": self._info.commit,
            }
            run = client.create_run(self._experiment, tags=tags, run_name=self._study.study_name)
            names = ("kind", "attention", "length", "dtype", "device", "sampler", "seed")
            params = {name: getattr(plan, name) for name in names}
            self._log(client, run.info.run_id, params | {"objectives": ",".join(plan.objectives)})
            self._study.set_user_attr(RUN, run.info.run_id)
            return str(run.info.run_id)

    def _made(self, client: MlflowClient, number: int, choice: dict[str, Any]) -> str:
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
            for step, found in enumerate(trial.user_attrs.get("history", ()))
            for name, value in found.items()
        ]
        if trial.values and trial.state.name == "COMPLETE":  # else it is a bound
            last = len(trial.user_attrs.get("history", ()))
            metrics += [
                Metric(f"objective.{name}", value, when, last)
                for name, value in zip(plan_of(self._study).objectives, trial.values, strict=False)
            ]
        error = trial.user_attrs.get("error", "")
        died = trial.state.name == "FAIL" and not error
        tags = {"danon.state": "died" if died else trial.state.name.lower()}
        tags |= {"danon.error": error[:LONGEST]} if error else {}
        if place := trial.user_attrs.get("origin", {}).get("place"):
            tags["danon.place"] = json.dumps(place, sort_keys=True)
        if "again" in trial.user_attrs:
            tags["danon.again"] = str(trial.user_attrs["again"])
        self._log(client, run_id, {}, metrics, tags)
        client.set_terminated(run_id, "KILLED" if died else STATUS[trial.state.name], when)

    def _caught_up(self, client: MlflowClient) -> int:
        """Make and complete the runs that other workers, or a store out of reach, did not."""
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
                self._made(client, trial.number, trial.params) if run is None else run.info.run_id
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
            self._client, self.trouble = None, str(error)
        except store.failures() as error:
            self._client = None
            self.trouble = f"{store.redact_password(self._uri)}: {store.root_cause(error)}"


def _quoted(name: str) -> str:
    return name.replace("'", "''")
