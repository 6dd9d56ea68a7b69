"""The MLflow store: addresses, refusals, dead runs."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_cases import runs_of, some_results
from sqlalchemy import create_engine, make_url

from danon.runs.journal import Journal
from danon.runs.owner import end
from danon.runs.run_info import RunInfo
from danon.tracking import run_owners, store
from danon.tracking.bench_recorder import Recorder


def test_password_in_messages() -> None:
    with pytest.raises(store.StoreError, match=r"me:\*\*\*@127\.0\.0\.1:9") as caught:
        store.connect("postgresql://me:secret@127.0.0.1:9/danon")
    assert "secret" not in str(caught.value)


def test_file_that_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, " * 100)
    begun = time.monotonic()
    with pytest.raises(store.StoreError, match="file is not a database"):
        store.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("ended", ["FINISHED", "FAILED"])
def test_run_that_ends_while_its_lock_is_probed(
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

    mine = Path(run_owners.owner_tags(sqlite, info.run_id)["danon.lock"])
    for module in ("danon.tracking.run_owners", "danon.runs.journal"):
        monkeypatch.setattr(f"{module}.is_held", found_free)
    assert run_owners.reap_stale() == 0
    parents, children = runs_of(sqlite, info)
    assert {run.info.status for run in (*parents, *children)} == {ended}
    journal.set_status("RUNNING")
    assert journal.status == ended


def test_reaping_of_runs_of_dead_processes(sqlite: str, tmp_path: Path, info: RunInfo) -> None:
    def record(run_id: str) -> RunInfo:
        one = replace(info, run_id=run_id)
        recorder = Recorder(one, Journal.create(tmp_path, one))
        recorder.start()
        recorder.log(some_results()[0])
        return one

    def record_and_die(run_id: str, lock: Path) -> RunInfo:
        dead = {**run_owners.owner_tags(sqlite, run_id), "danon.lock": str(lock)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_owners, "owner_tags", lambda *_: dead)
            one = record(run_id)
        if lock != unseen:
            lock.touch()  # and nobody holds it
        return one

    def statuses(one: RunInfo) -> set[str]:
        parents, children = runs_of(sqlite, one)
        return {run.info.status for run in (*parents, *children)}

    mine = Path(run_owners.owner_tags(sqlite, "")["danon.lock"])
    free = [mine.with_name(mine.name.replace(".lock", f"{n}.lock")) for n in (1, 2)]
    unseen = tmp_path / "of another container"
    living, hidden = record("living"), record_and_die("hidden", unseen)
    first = record_and_die("first", free[0])
    assert run_owners.reap_stale() == 1
    assert run_owners.reap_stale() == 0
    assert (statuses(first), statuses(living)) == ({"KILLED"}, {"RUNNING"})
    assert mine.exists() and not any(lock.exists() for lock in free)
    second = record_and_die("second", free[1])
    assert statuses(second) == {"RUNNING"}
    next_one = record("next")
    assert statuses(second) == {"KILLED"}
    assert statuses(living) == statuses(next_one) == statuses(hidden) == {"RUNNING"}


def test_mode_of_the_lock_of_a_server_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "postgresql://127.0.0.1:9/danon"
    monkeypatch.setattr(store, "SHARED", tmp_path)
    before = os.umask(0o077)
    try:
        with store.exclusive(uri):
            pass
        lock = run_owners.owner_tags(uri, "")["danon.lock"]
    finally:
        os.umask(before)
        end(Path(lock))
        run_owners._owner_lock.cache_clear()
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666}
    (locked,) = (file for file in tmp_path.iterdir() if "owner" not in file.name)
    locked.unlink()
    locked.mkdir()
    with pytest.raises(store.StoreError, match=f"Is a directory: '{locked}'"), store.exclusive(uri):
        pass


@pytest.mark.parametrize("letters", ["a b", "50%20", "a?b", "a#b", "%", "é&=;+[x]"])
def test_address_of_a_path_with_special_characters(letters: str, tmp_path: Path) -> None:
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
def test_address_without_quoting(
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


def test_file_of_a_store_that_is_no_file() -> None:
    for uri in (
        "http://127.0.0.1",
        "postgresql://me@there/x",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:/x?uri=true",
    ):
        assert store.sqlite_file(uri) is None
    assert store.sqlite_file("sqlite+pysqlite:////a/b%3Fc?timeout=5") == Path("/a/b?c")


def test_default_store_below_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".git").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    uri = store.tracking_uri()
    assert uri == f"sqlite:///{tmp_path}/.mlflow/mlflow.db"
    assert store.artifact_location(uri) == f"file://{tmp_path}/.mlflow/artifacts"
