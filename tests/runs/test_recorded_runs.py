"""Journal, MLflow recording and export: what was measured is kept, once, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from repositories import git
from sqlalchemy import create_engine, make_url

from danon.runs import commit, files
from danon.runs.case import Case, CaseResult
from danon.runs.export import write_results
from danon.runs.journal import LOCK, Journal
from danon.runs.owner import Owner, end, is_held, remove_unheld
from danon.runs.run_info import RunInfo
from danon.tracking import store
from danon.tracking.bench_recorder import Recorder, metric_name, upload

ROOT = Path(__file__).parents[2]
LENGTHS = (1024, 4096)


def measured(attention: str, length: int, phase: str = "forward", **metrics: float) -> CaseResult:
    return CaseResult(
        Case("speed", attention, length, "float32", phase),  # type: ignore[arg-type]
        "measured",
        semantics="exact",
        metrics={"time_s": length / 1e6, "speedup": 1.5, **metrics},
        samples={"candidate_s": [0.1, 0.2], "reference_s": [0.3, 0.25]},
        check={"kind": "definition", "error": 1e-6, "tolerance": 1e-5},
    )


def some_results() -> list[CaseResult]:
    missing = CaseResult(
        Case("speed", "xformers", 1024, "float32", "forward"), "unavailable", reason="needs CUDA"
    )
    return [
        *(measured(name, n) for name in ("sdpa", "msra") for n in LENGTHS),
        measured("msra", 1024, "forward+backward"),
        missing,
    ]


def two_texts() -> list[CaseResult]:
    """One attention trained on two texts at one length."""
    return [
        CaseResult(
            Case("language", "msra", 1024, "float32", "training", task=text),
            "measured",
            metrics={"bits_per_byte": bits},
            samples={"candidate_s": [seconds]},
            curves={"bits_by_tokens": [[1e6, bits]]},
        )
        for text, bits, seconds in (("code", 2.1, 40.0), ("prose", 2.6, 50.0))
    ]


@pytest.fixture
def info() -> RunInfo:
    return RunInfo.capture("quick", 7, "danon bench", {"cpu": "a processor", "cores": "2"})


@pytest.fixture
def journal(tmp_path: Path, info: RunInfo) -> Journal:
    return Journal.create(tmp_path / "runs", info)


def runs_of(uri: str, info: RunInfo, suite: str = "speed") -> tuple[list, list]:
    """(parent runs, child runs) of an invocation."""
    client = store.connect(uri)
    experiment = store.experiment_id(client, uri, suite)
    runs = store.runs_where(client, [experiment], f"tags.`danon.run_id` = '{info.run_id}'")
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


def history(uri: str, info: RunInfo, attention: str, metric: str) -> list[tuple[int, float]]:
    (child,) = [r for r in runs_of(uri, info)[1] if r.info.run_name == attention]
    points = store.connect(uri).get_metric_history(child.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


# --- the journal


def test_journal_returns_what_was_appended_and_the_last_line_of_a_case_wins(
    journal: Journal, info: RunInfo
) -> None:
    for result in some_results():
        journal.append(result)
    again = measured("sdpa", 1024, speedup=2.5)
    journal.append(again)
    reopened = Journal(journal.run_dir)
    assert reopened.results() == [again, *some_results()[1:]]
    assert reopened.info() == info


def test_a_torn_last_line_is_said_and_costs_that_case_only(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third, *_ = some_results()
    journal.append(first)
    with (journal.run_dir / "cases.jsonl").open("ab") as file:
        file.write(second.to_json().encode()[:40])
    resumed = Journal(journal.run_dir)
    assert resumed.results() == [first]
    assert "the last line is incomplete (40 bytes" in caplog.text
    resumed.append(third)
    assert resumed.results() == [first, third]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(journal: Journal) -> None:
    journal.append(some_results()[0])
    with (journal.run_dir / "cases.jsonl").open("ab") as file:
        file.write(b'{"case": {"suite": "speed"}}\n')
    with pytest.raises(ValueError, match=r"cases\.jsonl, line 2: case -> attention: Field"):
        journal.results()


BUSY = """
import sys
from pathlib import Path
from danon.runs.journal import Journal, RunInfo

journal = Journal.create(Path(sys.argv[1]), RunInfo.capture("quick", 0, "bench", {}))
print(journal.run_dir, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that runs a journal, and the journal's folder."""
    command = [sys.executable, "-c", BUSY, str(tmp_path / "runs")]
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=known) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_run_is_killed_when_its_process_has_ended_not_when_nobody_knows_its_number(
    busy: tuple[subprocess.Popen[str], Path],
) -> None:
    process, run_dir = busy
    path = run_dir / "run.json"
    content = json.loads(path.read_text())
    assert content["owner"]["pid"] == process.pid
    content["owner"]["pid"] = 2**22 + 1  # as another container numbers it: none here has that
    path.write_text(json.dumps(content))
    journal = Journal(run_dir)
    assert journal.status == "RUNNING"
    with pytest.raises(OSError, match="another process runs this") as caught:
        journal.set_status("RUNNING")
    assert caught.value.errno in files.UNWRITABLE and caught.value.filename == str(run_dir)
    process.kill()
    process.wait()
    assert journal.status == "KILLED"
    journal.set_status("RUNNING")
    assert journal.status == Journal(run_dir).status == "RUNNING"
    assert journal.owner().pid == os.getpid()
    journal.set_status("FINISHED")
    assert journal.status == "FINISHED"
    with pytest.raises(ValueError, match="'DONE': must be one of RUNNING, FINISHED"):
        journal.set_status("DONE")  # type: ignore[arg-type]


def test_a_run_of_another_host_is_believed(journal: Journal) -> None:
    path = journal.run_dir / "run.json"
    content = json.loads(path.read_text())
    content["owner"]["host"] = "elsewhere"
    path.write_text(json.dumps(content))
    (journal.run_dir / LOCK).unlink()  # which a file system may not show other machines
    assert journal.status == "RUNNING"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it has no run\.json"):
        Journal(tmp_path)


def test_why_a_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "repository" / "danon" / "runs" / "commit.py"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(commit, "__file__", str(place))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "repository/danon, which is in no git repository" in commit.why_unknown()
    root = tmp_path / "repository"
    git(root, "init")
    assert (
        commit.why_unknown() == f"the git repository around {root} has no commit that holds danon"
    )
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit.why_unknown().endswith(f"git config --global --add safe.directory {root}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit.why_unknown() == "git is not installed"


def test_run_info_reads_git_and_says_unknown_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "danon/runs/commit.py"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    here = RunInfo.capture("quick", 0, "danon bench", {})
    assert here.commit == (head if tracked else "unknown")
    assert here.versions["torch"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RunInfo.capture("quick", 0, "danon bench", {}).commit == "unknown"
    ids = [RunInfo.capture("quick", 0, "", {}).run_id for _ in range(50)]
    assert len(set(ids)) == len(ids)


def test_what_commands_write_makes_no_checkout_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "danon" / "runs" / "commit.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "code")
    monkeypatch.setattr(commit, "__file__", str(code))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").write_text("{}")
    assert commit.commit_of() == (git(tmp_path, "rev-parse", "HEAD"), False)
    code.write_text("1")
    assert commit.commit_of()[1]


# --- files


def test_results_json_is_stable_and_strict_and_samples_are_a_long_table(
    tmp_path: Path, info: RunInfo
) -> None:
    results = [*some_results(), measured("nan", 1024, error_vs_dense=float("nan"))]
    write_results(results, info, tmp_path)
    first = (tmp_path / "results.json").read_bytes()
    write_results(results[::-1], info, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == first
    loaded = json.loads(first, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert loaded["schema"] == 1 and loaded["run"]["run_id"] == info.run_id
    assert len(loaded["results"]) == len(results)
    table = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(table) == 6 * 4
    mine = [r for r in table if r["attention"] == "sdpa" and r["length"] == 4096]
    assert [(r["side"], r["index"], r["seconds"]) for r in mine] == [
        ("candidate", 0, 0.1),
        ("candidate", 1, 0.2),
        ("reference", 0, 0.3),
        ("reference", 1, 0.25),
    ]
    assert {r["run_id"] for r in table} == {info.run_id}


def test_samples_name_the_task_of_a_training(tmp_path: Path, info: RunInfo) -> None:
    write_results([measured("sdpa", 1024), *two_texts()], info, tmp_path)
    table = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    tasks = {(row["suite"], row["task"], row["seconds"]) for row in table if row["index"] == 0}
    assert tasks == {
        ("speed", "", 0.1),
        ("speed", "", 0.3),
        ("language", "code", 40.0),
        ("language", "prose", 50.0),
    }


def test_a_sample_series_without_a_unit_is_refused(tmp_path: Path, info: RunInfo) -> None:
    wrong = replace(measured("sdpa", 1024), samples={"candidate": [1.0]})
    with pytest.raises(ValueError, match="sample series 'candidate': must be seconds"):
        write_results([wrong], info, tmp_path)


# --- MLflow


def test_a_run_is_recorded_with_one_child_per_attention_and_step_n(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    recorder = Recorder(info, journal)
    assert recorder.start() == f"Recording in MLflow: {sqlite}"
    for result in some_results():
        journal.append(result)
        recorder.log(result)
    (journal.run_dir / "report.html").write_text("<p>report")
    recorder.finish("FINISHED")

    (parent,), children = runs_of(sqlite, info)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["danon.commit"] == info.commit
    assert json.loads(parent.data.tags["danon.fingerprint"]) == info.fingerprint
    artifacts = store.connect(sqlite).list_artifacts(parent.info.run_id)
    assert [artifact.path for artifact in artifacts] == ["report.html"]
    assert sorted(run.info.run_name for run in children) == ["msra", "sdpa", "xformers"]
    points = [(n, n / 1e6) for n in LENGTHS]
    assert history(sqlite, info, "msra", "forward.float32.time_s") == points
    assert history(sqlite, info, "msra", "forward_backward.float32.speedup") == [(1024, 1.5)]
    tags = {run.info.run_name: run.data.tags for run in children}
    assert tags["xformers"]["danon.status"] == "unavailable"
    assert tags["xformers"]["danon.reason"] == "needs CUDA"
    params = {run.info.run_name: run.data.params for run in children}
    assert params["msra"]["semantics"] == "exact"
    assert params["msra"]["head_dim"] == "64"


def test_two_texts_at_one_length_are_recorded_apart(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    recorder = Recorder(info, journal)
    recorder.start()
    for result in two_texts():
        journal.append(result)
        recorder.log(result)
    assert recorder.finish("FINISHED").startswith("Recorded 2 cases")
    _, (child,) = runs_of(sqlite, info, "language")
    assert child.data.metrics == {
        "training.float32.code.bits_per_byte": 2.1,
        "training.float32.prose.bits_per_byte": 2.6,
    }
    assert {tag for tag in child.data.tags if tag.startswith("danon.case.")} == {
        f"danon.case.training.float32.{text}.N1024" for text in ("code", "prose")
    }
    assert upload(journal.run_dir).startswith("0 of 2 cases were new")
    decode = Case("decode", "msra", 1024, "bfloat16", "decode")
    assert metric_name(decode, "time_s") == "decode.bfloat16.time_s"


def test_metrics_of_one_run_are_of_one_configuration(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    """Two tasks with an attention of two sizes, one that failed, and one over budget."""
    shape = {"hidden_size": 64, "max_sequence_length": 9}

    def judged(task: str, length: int, window: int | None, said: str = "") -> CaseResult:
        case = Case("recall", "msra", length, "float32", "training", task=task)
        if window is None:
            return CaseResult(case, "failed", "wrong", said)
        config = {"window": window, **shape, "max_sequence_length": length}
        metrics = {"accuracy": window / 100}
        return CaseResult(case, "measured", "", f"{window}", metrics, config=config)

    results = [
        judged("mqar", 64, None),
        judged("mqar", 128, 28),
        judged("mqar", 256, 28),
        judged("needle", 128, 60),
        judged("needle", 256, None, "60"),
        judged("needle", 512, None),
    ]
    recorder = Recorder(info, journal)
    recorder.start()
    for result in results:
        journal.append(result)
        recorder.log(result)
    assert recorder.finish("FINISHED").startswith("Recorded 6 cases")
    _, children = runs_of(sqlite, info, "recall")
    assert {run.info.run_name for run in children} == {"msra"}
    found = {run.data.params["config.window"]: run.data for run in children}
    assert {name: data.metrics for name, data in found.items()} == {
        "28": {"training.float32.mqar.accuracy": 0.28},
        "60": {"training.float32.needle.accuracy": 0.60},
    }
    assert [data.params["semantics"] for data in found.values()] == list(found)
    assert not any("config.max_sequence_length" in data.params for data in found.values())
    cases = {name: sum("danon.case." in tag for tag in data.tags) for name, data in found.items()}
    assert cases == {"28": 4, "60": 2}
    assert upload(journal.run_dir).startswith("0 of 6 cases were new")
    assert len(runs_of(sqlite, info, "recall")[1]) == 2


def test_upload_completes_a_partial_recording_and_a_second_one_adds_nothing(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
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
    assert upload(journal.run_dir).startswith("3 of 6 cases were new")
    assert upload(journal.run_dir).startswith("0 of 6 cases were new")
    (parent,), children = runs_of(sqlite, info)
    assert {run.info.status for run in (parent, *children)} == {"KILLED"}
    assert len(children) == 3
    for attention in ("sdpa", "msra"):
        points = history(sqlite, info, attention, "forward.float32.time_s")
        assert [step for step, _ in points] == list(LENGTHS)


def test_a_store_that_dies_stops_the_recording_once_and_upload_finishes_it(
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

    recorder = Recorder(info, journal)
    recorder.start()
    results = some_results()
    with pytest.MonkeyPatch.context() as patch:
        for number, result in enumerate(results):
            if number == 2:
                patch.setattr(MlflowClient, "log_batch", refuse)
            journal.append(result)
            recorder.log(result)
        assert "danon record" in recorder.finish("FINISHED")
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert "MLflow recording stopped: connection refused" in warned[0]
    assert upload(journal.run_dir).startswith("4 of 6 cases were new")
    assert runs_of(sqlite, info)[0][0].info.status == "FINISHED"


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "postgresql://127.0.0.1:9/danon", "sqlite:////dev/null/no/m.db"]
)
def test_an_unreachable_store_is_said_within_seconds_and_measuring_goes_on(
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


def test_messages_hide_the_password_of_a_store() -> None:
    with pytest.raises(store.StoreError, match=r"me:\*\*\*@127\.0\.0\.1:9") as caught:
        store.connect("postgresql://me:secret@127.0.0.1:9/danon")
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, " * 100)
    begun = time.monotonic()
    with pytest.raises(store.StoreError, match="file is not a database"):
        store.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert time.monotonic() - begun < 5


def test_who_waits_for_a_lock_that_is_removed_holds_one_that_others_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "of an owner.lock"
    lock.touch()
    waiting = threading.Thread(target=Owner.current, args=(lock,))
    unlink = Path.unlink

    def late(self: Path, missing_ok: bool = False) -> None:
        waiting.start()
        time.sleep(0.3)  # it waits by now
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    remove_unheld(lock)
    waiting.join()
    assert lock.exists() and is_held(lock)
    remove_unheld(lock)
    assert lock.exists(), "it is held"
    end(lock)
    assert not is_held(lock)


@pytest.mark.parametrize("ended", ["FINISHED", "FAILED"])
def test_a_run_that_ends_while_another_looks_keeps_its_status(
    sqlite: str, tmp_path: Path, info: RunInfo, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    journal = Journal.create(tmp_path, info)
    recorder = Recorder(info, journal)
    recorder.start()
    recorder.log(some_results()[0])

    def found_free(lock: Path) -> bool:
        """Look at the lock just after its process ended the run."""
        if journal.owner().lock == lock or Path(lock) == mine:
            recorder.finish(ended)
        return False

    mine = Path(store.owner_tags(sqlite, info.run_id)["danon.lock"])
    for module in ("danon.tracking.store", "danon.runs.journal"):
        monkeypatch.setattr(f"{module}.is_held", found_free)
    assert store.reap_stale() == 0
    parents, children = runs_of(sqlite, info)
    assert {run.info.status for run in (*parents, *children)} == {ended}
    journal.set_status("RUNNING")
    assert journal.status == ended


def test_runs_of_dead_processes_are_marked_killed_and_the_living_left_alone(
    sqlite: str, tmp_path: Path, info: RunInfo
) -> None:
    def record(run_id: str) -> RunInfo:
        one = replace(info, run_id=run_id)
        recorder = Recorder(one, Journal.create(tmp_path, one))
        recorder.start()
        recorder.log(some_results()[0])
        return one

    def record_and_die(run_id: str, lock: Path) -> RunInfo:
        dead = {**store.owner_tags(sqlite, run_id), "danon.lock": str(lock)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "owner_tags", lambda *_: dead)
            one = record(run_id)
        if lock != unseen:
            lock.touch()  # and nobody holds it
        return one

    def statuses(one: RunInfo) -> set[str]:
        parents, children = runs_of(sqlite, one)
        return {run.info.status for run in (*parents, *children)}

    mine = Path(store.owner_tags(sqlite, "")["danon.lock"])
    free = [mine.with_name(mine.name.replace(".lock", f"{n}.lock")) for n in (1, 2)]
    unseen = tmp_path / "of another container"
    living, hidden = record("living"), record_and_die("hidden", unseen)
    first = record_and_die("first", free[0])
    assert store.reap_stale() == 1
    assert store.reap_stale() == 0
    assert (statuses(first), statuses(living)) == ({"KILLED"}, {"RUNNING"})
    assert mine.exists() and not any(lock.exists() for lock in free)
    second = record_and_die("second", free[1])
    assert statuses(second) == {"RUNNING"}
    next_one = record("next")
    assert statuses(second) == {"KILLED"}
    assert statuses(living) == statuses(next_one) == statuses(hidden) == {"RUNNING"}


def test_the_lock_of_a_server_store_is_for_every_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "postgresql://127.0.0.1:9/danon"
    monkeypatch.setattr(store, "SHARED", tmp_path)
    before = os.umask(0o077)
    try:
        with store.exclusive(uri):
            pass
        lock = store.owner_tags(uri, "")["danon.lock"]
    finally:
        os.umask(before)
        end(Path(lock))
        store._owner_lock.cache_clear()
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666}
    (locked,) = (file for file in tmp_path.iterdir() if "owner" not in file.name)
    locked.unlink()
    locked.mkdir()
    with pytest.raises(store.StoreError, match=f"Is a directory: '{locked}'"), store.exclusive(uri):
        pass


@pytest.mark.parametrize("letters", ["a b", "50%20", "a?b", "a#b", "%", "é&=;+[x]"])
def test_any_path_has_an_address(letters: str, tmp_path: Path) -> None:
    file = tmp_path / letters / "mlflow.db"
    uri = store.sqlite_uri(file)
    assert make_url(uri).database == str(file) and store.sqlite_file(uri) == file
    engine = create_engine(uri)
    file.parent.mkdir()
    with engine.connect() as opened:
        opened.exec_driver_sql("CREATE TABLE x (y)")
    engine.dispose()
    assert file.exists()


@pytest.mark.parametrize("letters", ["50%20", "a?b"])
def test_an_address_made_without_quoting_is_refused_with_the_right_one(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / letters
    folder.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    right = store.sqlite_uri(folder / "mlflow.db")
    with pytest.raises(store.StoreError) as caught:
        store.connect(store.tracking_uri())
    assert str(caught.value).endswith(f"{folder}/mlflow.db must be written {right}")
    assert [place.name for place in tmp_path.iterdir()] == [letters]
    assert store.sqlite_file(right) == folder / "mlflow.db"
    assert store.sqlite_file(f"{right}?timeout=5") == folder / "mlflow.db"


def test_a_store_that_is_no_file_has_none() -> None:
    for uri in (
        "http://127.0.0.1",
        "postgresql://me@there/x",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:/x?uri=true",
    ):
        assert store.sqlite_file(uri) is None
    assert store.sqlite_file("sqlite+pysqlite:////a/b%3Fc?timeout=5") == Path("/a/b?c")


def test_a_checkout_at_any_path_is_recorded_with_its_files(
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
    assert [artifact.path for artifact in artifacts] == ["report.html"]
    assert [found.name for found in file.parent.rglob("report.html")] == ["report.html"]


def test_what_mlflow_refuses_costs_only_itself(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    odd = measured("sdpa", 1024, **{"rate+": 1.0, "a=b": 2.0})
    recorder = Recorder(info, journal)
    recorder.start()
    for result in (odd, measured("sdpa", 4096)):
        journal.append(result)
        recorder.log(result)
    said = recorder.finish("FINISHED")
    assert said.startswith("Recorded 2 cases")
    assert "forward.float32.a=b = 2.0 (" in said
    assert "forward.float32.rate+ = 1.0 (" in said
    points = [(n, n / 1e6) for n in LENGTHS]
    assert history(sqlite, info, "sdpa", "forward.float32.time_s") == points
    _, (child,) = runs_of(sqlite, info)
    refused = {name for name in child.data.tags if name.startswith("danon.refused.")}
    assert refused == {f"danon.refused.forward_float32_{name}" for name in ("rate_", "a_b")}
    assert upload(journal.run_dir).startswith("0 of 2 cases were new")


def test_the_default_store_stands_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".git").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    uri = store.tracking_uri()
    assert uri == f"sqlite:///{tmp_path}/.mlflow/mlflow.db"
    assert store.artifact_location(uri) == f"file://{tmp_path}/.mlflow/artifacts"


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


def test_benches_that_start_at_once_on_a_fresh_store_lose_nothing(
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
        time_s = "forward.float32.time_s"
        both = [history(uri, journal.info(), f"attention {odd}", time_s) for odd in (0, 1)]
        steps = [step for points in both for step, _ in points]
        assert sorted(steps) == list(range(1, 31))
    assert len(journals[0].results()) == 30
