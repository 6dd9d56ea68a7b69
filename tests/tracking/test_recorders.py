"""Studies and comparisons with figures that MLflow refuses; studies at any path."""

from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from sqlalchemy import make_url

from danon.gate.gate_recorder import record
from danon.gate.result import GateResult, Row
from danon.measure.timing import Estimate
from danon.runs.case import Case
from danon.runs.run_info import RunInfo
from danon.tracking import store
from danon.tuning import storage
from danon.tuning.study import PLAN as PLAN_ATTRIBUTE
from danon.tuning.study import Plan
from danon.tuning.study_recorder import Recorder

PLAN = Plan(
    kind="hyperparameters",
    attention="mine",
    objectives=("balanced",),
    limits={},
    length=64,
    dtype="float32",
    device="cpu",
    sampler="tpe",
    seed=0,
    space="{}",
    known=("speed",),
)


def runs_of(uri: str, experiment: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    where = store.experiment_id(client, uri, experiment)
    return {run.info.run_name: run for run in client.search_runs([where])}


def test_study_with_figures_that_mlflow_refuses(sqlite: str) -> None:
    study = optuna.create_study(study_name="s")
    study.set_user_attr(PLAN_ATTRIBUTE, dataclasses.asdict(PLAN))
    recorder = Recorder(study, RunInfo.capture("", 0, "danon tune", {}))
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
    recorder.on_begin(trial)
    trial.set_user_attr("history", [{"time+": 1.0, "time_ratio": 2.0}, {"time_ratio": 1.5}])
    study.tell(trial, 1.0)
    recorder.on_end(study.trials[0])
    said = recorder.finish("FINISHED", (), {"danon.note": "x", "danon+note": "y"})
    assert said.startswith(f"recorded in {sqlite}; MLflow refuses time+ = 1.0 (")
    assert "danon+note = 'y' (" in said
    runs = runs_of(sqlite, "tune")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["s"].data.tags["danon.note"] == "x"
    assert runs["trial 0"].data.metrics == {"time_ratio": 1.5, "objective.balanced": 1.0}
    assert runs["trial 0"].data.tags["danon.refused.time_"].startswith("time+ = 1.0 (")


def test_comparison_with_figures_that_mlflow_refuses(
    sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [Case("speed", name, 64, "float32", "forward", "cpu") for name in ("odd+", "mine")]
    rows = tuple(Row(case, "slower", Estimate(1.1, 1.0, 1.2), 9, 0.1, 0.11) for case in cases)
    when = datetime(2026, 1, 1, tzinfo=UTC)
    found = GateResult("a" * 40, "b" * 40, "then", "now", rows, when, 1.0, {})
    assert record(found) == f"recorded in {sqlite}"
    (run,) = runs_of(sqlite, "gate").values()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["mine.forward.float32.ratio"] == 1.1
    assert not [name for name in run.data.metrics if name.startswith("odd")]
    assert "danon.refused.odd__forward_float32_ratio" in run.data.tags
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(s.startswith("MLflow refuses odd+.forward.float32.ratio = 1.1 (") for s in said)


@pytest.mark.parametrize("letters", ["50%20 of? it#1", "plain"])
def test_studies_at_paths_with_special_characters(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / letters / ".git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / letters)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    url, file = storage.default(), tmp_path / letters / ".mlflow" / "optuna.db"
    assert make_url(url).database == str(file)
    with storage.opened(url) as database:
        optuna.create_study(storage=database, study_name="s")
    assert file.is_file()
    assert {place.name for place in file.parent.iterdir()} == {"optuna.db", "optuna.db.lock"}
