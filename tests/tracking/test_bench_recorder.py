"""Benches in MLflow: every case is recorded once, also after failures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recorded_cases import LENGTHS, history, measured, runs_of, some_results

from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.tracking import store
from danon.tracking.bench_recorder import Recorder, upload

ROOT = Path(__file__).parents[2]


def test_running_bench_has_a_copy_of_its_journal(
    sqlite: str, journal: Journal, info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, results = Recorder(info, journal), some_results()
    recorder.start()

    def copied() -> int:
        (parent,), children = runs_of(sqlite, info)
        assert parent.info.status == "RUNNING" and not children
        files = store.connect(sqlite).download_artifacts(parent.info.run_id, "")
        assert Journal(Path(files)).info() == info
        return len(Journal(Path(files)).results())

    for result in results[:2]:
        journal.append(result)
        recorder.log(result)
    assert copied() == 0  # a minute has not passed
    monkeypatch.setattr("danon.tracking.bench_recorder.COPY_INTERVAL_S", 0)
    journal.append(results[2])
    recorder.log(results[2])
    assert copied() == 3
    assert recorder.finish("KILLED").startswith("Recorded 3 cases")


def test_upload_of_a_partial_recording(sqlite: str, journal: Journal, info: RunInfo) -> None:
    results = some_results()
    for result in results:
        journal.append(result)
    interrupted = Recorder(info, Journal.create(journal.run_dir / "elsewhere", info))
    interrupted.start()
    for result in results[:3]:
        interrupted.log(result)
    with pytest.raises(store.StoreError, match="still running"):
        upload(journal.run_dir)
    journal.set_status("KILLED")
    assert upload(journal.run_dir).startswith("6 of 6 cases were new")
    assert upload(journal.run_dir).startswith("0 of 6 cases were new")
    (parent,), children = runs_of(sqlite, info)
    assert {run.info.status for run in (parent, *children)} == {"KILLED"}
    assert len(children) == 2
    for attention in ("sdpa", "msra"):
        points = history(sqlite, info, attention, "speed.forward.float32.time_s")
        assert [step for step, _ in points] == list(LENGTHS)


def test_store_that_dies_while_recording(
    sqlite: str,
    journal: Journal,
    info: RunInfo,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    real, calls = MlflowClient.log_batch, []

    def dies(*args: Any, **options: Any) -> None:
        calls.append(args)
        (real if len(calls) < 6 else refuse)(*args, **options)

    recorder = Recorder(info, journal)
    recorder.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", dies)
        for result in some_results():
            journal.append(result)
            recorder.log(result)
        assert "danon record" in recorder.finish("FINISHED")
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert "MLflow recording stopped: connection refused" in warned[0]
    assert upload(journal.run_dir).startswith("4 of 6 cases were new")  # one child was complete
    assert runs_of(sqlite, info)[0][0].info.status == "FINISHED"


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "postgresql://127.0.0.1:9/danon", "sqlite:////dev/null/no/m.db"]
)
def test_unreachable_store(
    uri: str, journal: Journal, info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    recorder = Recorder(info, journal)
    before = dict(os.environ)
    begun = time.monotonic()
    line = recorder.start()
    assert time.monotonic() - begun < 5
    assert line.startswith(f"Not recording in MLflow: {uri}")
    assert f"danon record {journal.run_dir}" in line
    assert before.items() <= os.environ.items()
    result = some_results()[0]
    journal.append(result)
    recorder.log(result)
    recorder.finish("FINISHED")
    assert journal.results() == [result]
    with pytest.raises(store.StoreError, match=r"127\.0\.0\.1|/dev/null"):
        upload(journal.run_dir)


def test_checkout_at_a_path_with_special_characters(
    empty_store: Path, tmp_path: Path, info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "50%20 of? it#1"
    file = place / ".mlflow" / "mlflow.db"
    file.parent.mkdir(parents=True)
    (place / ".git").mkdir()
    file.write_bytes(empty_store.read_bytes())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(place)
    journal = Journal.create(place / "results", info)
    recorder = Recorder(info, journal)
    assert recorder.start().startswith("Recording in MLflow")
    recorder.log(some_results()[0])
    (journal.run_dir / "report.html").write_text("<p>report")
    recorder.finish("FINISHED")
    uri = store.tracking_uri()
    (parent,), _ = runs_of(uri, info)
    assert parent.info.status == "FINISHED"
    artifacts = store.connect(uri).list_artifacts(parent.info.run_id)
    assert "report.html" in [artifact.path for artifact in artifacts]
    assert [found.name for found in file.parent.rglob("report.html")] == ["report.html"]


def test_metrics_that_mlflow_refuses(sqlite: str, journal: Journal, info: RunInfo) -> None:
    odd = measured("sdpa", 1024, **{"rate+": 1.0, "a=b": 2.0})
    recorder = Recorder(info, journal)
    recorder.start()
    for result in (odd, measured("sdpa", 4096)):
        journal.append(result)
        recorder.log(result)
    said = recorder.finish("FINISHED")
    assert said.startswith("Recorded 2 cases")
    assert "speed.forward.float32.a=b = 2.0 (" in said
    assert "speed.forward.float32.rate+ = 1.0 (" in said
    points = [(n, n / 1e6) for n in LENGTHS]
    assert history(sqlite, info, "sdpa", "speed.forward.float32.time_s") == points
    _, (child,) = runs_of(sqlite, info)
    refused = {name for name in child.data.tags if name.startswith("danon.refused.")}
    assert refused == {f"danon.refused.speed_forward_float32_{name}" for name in ("rate_", "a_b")}
    assert upload(journal.run_dir).startswith("0 of 2 cases were new")


BENCH = """
import sys
from pathlib import Path
from danon.tracking.bench_recorder import Recorder
from danon.runs.journal import Journal, RunInfo
from danon.runs.case import Case, CaseResult

info = RunInfo.capture("quick", 0, "bench", {})
journal = Journal.create(Path(sys.argv[1]), info)
recorder = Recorder(info, journal)
line = recorder.start()
assert line.startswith("Recording"), line
for n in range(1, 31):
    case = Case("speed", f"attention {n % 2}", n, "float32", "forward")
    result = CaseResult(case, "measured", metrics={"time_s": n, "speedup": 2.0 * n})
    journal.append(result)
    recorder.log(result)
print(recorder.finish("FINISHED"))
"""


def test_simultaneous_benches_on_a_fresh_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'fresh' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", BENCH, str(tmp_path / "runs")]
    pipe = subprocess.PIPE
    benches = [
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)
        for _ in range(2)
    ]
    for bench in benches:
        out, err = bench.communicate(timeout=100)
        assert bench.returncode == 0, err
        assert out.startswith("Recorded 30 cases"), out + err
        assert "WARNING" not in err
    journals = [Journal(place) for place in (tmp_path / "runs").iterdir()]
    assert len(journals) == 2
    for journal in journals:
        (parent,), children = runs_of(uri, journal.info())
        assert parent.info.status == "FINISHED"
        assert len(children) == 2
        time_s = "speed.forward.float32.time_s"
        both = [history(uri, journal.info(), f"attention {odd}", time_s) for odd in (0, 1)]
        steps = [step for points in both for step, _ in points]
        assert sorted(steps) == list(range(1, 31))
    assert len(journals[0].results()) == 30
