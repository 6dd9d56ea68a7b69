"""Training that goes on: checkpoints that are whole, alone and of this run; recording in MLflow."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import drawing, settings, small, text, weights
from torch.utils.data import Dataset

import danon.training.training_recorder
from danon.tracking import store
from danon.training import Trainer, checkpoint
from danon.training.training_recorder import record_training

ROOT = Path(__file__).parents[2]


KILLS = ((0, 1), (5, 1), (7, 4), (11, 5))
"""Step that kills the process, and steps between checkpoints."""
KILLED = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import small_training as t
from danon.training import Trainer
for at, every in {kills!r}:
    class Dies(Trainer):
        def backward_step(self, loss):
            if self.step == at:
                os._exit(9)
            super().backward_step(loss)
    if process := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        continue
    c = t.settings(checkpoint_every=every, eval_every=3)
    Dies(t.drawing(), c, directory={place!r} + "/" + str(at)).fit(t.text(), t.text())
    os._exit(0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the folder of each killed run, which has the name of its step."""
    place = tmp_path_factory.mktemp("killed")
    code = KILLED.format(
        root=str(ROOT), tests=str(ROOT / "tests"), kills=KILLS, place=str(place)
    )  # a process for all: it imports torch once
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return place


@pytest.mark.parametrize(("at", "every"), KILLS)
def test_killed_run_resumes_to_the_same_weights(killed: Path, at: int, every: int) -> None:
    whole, place = drawing(), killed / str(at)
    c = settings(checkpoint_every=every, eval_every=3)
    want = Trainer(whole, c).fit(text(), text())
    again = drawing(seed=5)  # its weights come from the checkpoint, or from the start
    if not list(place.glob("step-*")):
        again = drawing()
    got = Trainer(again, c, directory=place).fit(text(), text())
    assert torch.equal(weights(again), weights(whole))
    assert got == want


def damage(folder: Path) -> str:
    """Cut the end off the largest file; its name."""
    files = (file for file in folder.rglob("*") if file.is_file())
    file = max(files, key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    return str(file.relative_to(folder))


def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    c = settings(checkpoint_every=4)
    whole, again = drawing(), drawing(seed=5)
    Trainer(whole, c, directory=tmp_path).fit(text())
    newest = tmp_path / "step-00000012"
    name = damage(newest)
    Trainer(again, c, directory=tmp_path).fit(text())
    assert warnings_of(caplog) == [
        f"checkpoint {newest} is damaged ({name} changed since it was "
        "written): step-00000008 is used instead"
    ]
    assert torch.equal(weights(again), weights(whole))
    assert checkpoint.read(newest)[0] == 12  # written again


def test_run_with_only_damaged_checkpoints_is_refused(tmp_path: Path) -> None:
    c = settings(steps=2, checkpoint_every=1)
    Trainer(small(), c, directory=tmp_path).fit(text())
    damage(tmp_path / "step-00000001")
    (tmp_path / "step-00000002" / checkpoint.SEAL).unlink()
    message = (
        f"{tmp_path} has no whole checkpoint: .*step-00000002 is damaged .FileNotFound.*"
        "step-00000001 is damaged .*; remove the directory to start anew"
    )
    with pytest.raises(ValueError, match=message):
        Trainer(small(), c, directory=tmp_path).fit(text())


class Judged(Trainer):
    """The evaluation is best at step 4."""

    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        return {"eval_loss": abs(self.step - 4.0)}


def test_best_checkpoint_stays_and_can_be_loaded(tmp_path: Path) -> None:
    c = {"schedule": "constant", "eval_every": 2, "checkpoint_every": 3}
    Judged(small(), settings(**c), directory=tmp_path).fit(text(), text())
    assert [p.name[-2:] for p in sorted(tmp_path.glob("step-*"))] == ["04", "09", "12"]
    best, four = Trainer(small(seed=5), settings(**c), directory=tmp_path), small()
    best.load_best()
    Trainer(four, settings(schedule="constant", steps=4)).fit(text())
    assert torch.equal(weights(best.model), weights(four))


def test_load_best_without_evaluations_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(small(), settings(steps=1), directory=tmp_path)
    for at in ("no run", "no evaluation"):
        with pytest.raises(ValueError, match=rf"directory = {tmp_path}: must hold checkpoints of"):
            trainer.load_best()
        if at == "no run":
            trainer.fit(text())
    with pytest.raises(ValueError, match="directory = None: must hold"):
        Trainer(small(), settings()).load_best()


def test_directory_in_use_is_refused(tmp_path: Path) -> None:
    class Second(Trainer):
        def train_step(self, batch: object) -> torch.Tensor:
            with pytest.raises(ValueError, match=f"{tmp_path} is in use by another training run"):
                Trainer(small(), self.config, directory=tmp_path).fit(text())
            return super().train_step(batch)

    c = settings(steps=1)
    Second(small(), c, directory=tmp_path).fit(text())
    assert Trainer(small(), c, directory=tmp_path).fit(text()).step == 1


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.12345").mkdir()
    (tmp_path / ".step-00000007.12345" / "random-0.pt").write_text("half")
    Trainer(small(), settings(steps=1), directory=tmp_path).fit(text())
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "step-00000001"}


def content(text: str) -> Any:
    return lambda place: (place / "x").write_text(text)


def test_checkpoint_of_a_repeated_step_is_never_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.name.startswith("step-"):
            raise KeyboardInterrupt
        return real(path, target)

    final = checkpoint.save(tmp_path, 1, content("old"), {}, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 1, content("new"), {}, 2)
    with checkpoint.alone(tmp_path):
        assert checkpoint.read(final) and (final / "x").read_text() == "old"
        checkpoint.save(tmp_path, 1, content("new"), {}, 2)
    assert checkpoint.read(final) and (final / "x").read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "step-00000001"}


def test_damaged_later_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (8, 9, 1, 2):
        checkpoint.save(tmp_path, step, content("x"), {}, 2)
    assert [p.name[-1] for p in sorted(tmp_path.iterdir())] == ["1", "2", "8", "9"]


def test_oldest_checkpoints_are_removed(tmp_path: Path) -> None:
    Trainer(
        small(), settings(steps=6, checkpoint_every=1, keep_checkpoints=3), directory=tmp_path
    ).fit(text())
    assert [p.name[-1] for p in sorted(tmp_path.glob("step-*"))] == ["4", "5", "6"]


def test_failed_write_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, content("1"), {}, 2)

    def full(place: Path) -> None:
        (place / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, full, {}, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(small(), settings(steps=2), directory=tmp_path).fit(text())
    with pytest.raises(ValueError, match=r"is of a run with steps = 2: must have steps = 3, or"):
        Trainer(small(), settings(steps=3), directory=tmp_path).fit(text())


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    c = settings(steps=1)
    Trainer(small(), c, directory=tmp_path).fit(text(), text())
    wider = Trainer(torch.nn.Embedding(32, 8), c, directory=tmp_path)
    for load in (lambda: wider.fit(text()), wider.load_best):
        with pytest.raises(
            ValueError,
            match=r"step-00000001 is of another model: weight is of "
            r"shape none \(it is not there\), must be \(32, 8\)",
        ):
            load()
    other = small()
    other.norm = torch.nn.RMSNorm(64)
    with pytest.raises(ValueError, match=r": norm.weight is of shape \(32,\), must be \(64,\);"):
        Trainer(other, c, directory=tmp_path).fit(text())


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied: making the tables takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.experiment_id(store.connect(f"sqlite:///{file}"), f"sqlite:///{file}", "training")
    return file


@pytest.fixture
def database(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "mlflow.db"
    shutil.copy(empty_store, file)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file


def runs() -> list[Any]:
    client = store.connect(store.tracking_uri())
    where = store.experiment_id(client, store.tracking_uri(), "training")
    return list(client.search_runs([where], order_by=["attributes.start_time ASC"]))


@pytest.mark.usefixtures("database")
def test_recorded_run_has_metrics_and_status() -> None:
    c = settings(steps=4, log_every=2)
    with record_training("good", c.to_dict()) as listener:
        result = Trainer(small(), c, listeners=(listener,)).fit(text(), text())
    with pytest.raises(RuntimeError, match="broken"), record_training("bad", {}):
        raise RuntimeError("broken")
    with pytest.raises(KeyboardInterrupt), record_training("stopped", {}):
        raise KeyboardInterrupt
    found = {run.info.run_name: run for run in runs()}
    ended = {name: run.info.status for name, run in found.items()}
    assert ended == {"good": "FINISHED", "bad": "FAILED", "stopped": "KILLED"}
    good = found["good"]
    assert good.data.params["learning_rate"] == "0.003"
    steps = store.connect(store.tracking_uri()).get_metric_history(good.info.run_id, "loss")
    assert {m.step: m.value for m in steps} == {
        step: metrics["loss"] for step, metrics in result.history.items()
    }
    assert good.data.metrics["eval_loss"] == result.best


def drop(database: Path, table: str) -> None:
    with closing(sqlite3.connect(database)) as opened:
        opened.execute(f"DROP TABLE {table}")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("danon.training")]


def test_training_continues_without_its_store(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def dies(step: int, metrics: object) -> None:
        if step == 4:
            drop(database, "metrics")

    c = settings(log_every=2)
    with record_training("dies", {}) as listener:
        result = Trainer(small(), c, listeners=(dies, listener)).fit(text())
    assert (result.outcome, result.step) == ("finished", 12)
    (said,) = warnings_of(caplog)
    assert said.startswith(
        "training goes on, but from step 4 on it is not recorded in MLflow at "
        f"sqlite:///{database}: no such table: metrics"
    )


@pytest.mark.usefixtures("database")
def test_refused_metric_is_reported_once_and_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Trainer):
        def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
            value: Any = None if self.step == 4 else 2.0
            return {"eval_loss": 1.0 / self.step, "top+5": 0.5, "sometimes": value}

    c = settings(log_every=2, eval_every=2)
    with record_training("odd", {}) as listener:
        Odd(small(), c, listeners=(listener,)).fit(text(), text())
    said = warnings_of(caplog)
    assert (
        len(said) == 2 and "refuses a metric of step 2, which is not recorded: top+5 = " in said[0]
    )
    assert "refuses a metric of step 4, which is not recorded: sometimes = None" in said[1]
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert run.data.tags["danon.refused.top_5"].startswith("top+5 = 0.5 (")
    assert run.data.tags["danon.refused.sometimes"].startswith("sometimes = None (")
    client = store.connect(store.tracking_uri())
    for name, steps in (("loss", 6), ("eval_loss", 6), ("sometimes", 5)):
        assert len(client.get_metric_history(run.info.run_id, name)) == steps


def test_store_failure_is_a_tag_of_the_run(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def fails(*_: object, **__: object) -> None:
        raise OSError("no room")

    with record_training("lost", {}) as listener:
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", fails)
            listener(3, {"loss": 1.0})
        listener(4, {"loss": 1.0})
    (run,) = runs()
    assert run.data.tags["danon.lost"] == "from step 3 on it is not recorded"


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("how", ["parameter", "file", "monitor"])
def test_failed_start_leaves_no_running_run(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    def fails(*_: object) -> None:
        raise RuntimeError("no thread")

    names: dict[str, Any] = {"a+b": 1} if how == "parameter" else {"a": 1}
    if how == "file":
        (tmp_path / "mlflow-run").mkdir()
        monkeypatch.setattr(danon.training.training_recorder, "_still_there", lambda *_: None)
    if how == "monitor":
        monkeypatch.setattr(SystemMetricsMonitor, "start", fails)
    message = {"parameter": r"a\+b", "file": "Is a directory", "monitor": "no thread"}[how]
    with (
        pytest.raises((store.StoreError, RuntimeError), match=message),
        record_training("never", names, directory=tmp_path),
    ):
        pass
    assert [run.info.status for run in runs()] == ["FAILED"]


def test_error_of_training_survives_a_dead_store(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks() -> None:
        drop(database, "runs")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), record_training("dies", {}):
        breaks()
    (said,) = warnings_of(caplog)
    assert "(FAILED) is not recorded in MLflow at sqlite:///" in said and "no such table" in said


@pytest.mark.usefixtures("database")
def test_resumed_training_continues_its_mlflow_run(tmp_path: Path) -> None:
    place = tmp_path / "training"

    class Dies(Trainer):
        def backward_step(self, loss: torch.Tensor) -> None:
            if self.step == 6:
                raise KeyboardInterrupt
            super().backward_step(loss)

    c = settings(log_every=1, checkpoint_every=4)
    for kind in (Dies, Trainer):
        try:
            with record_training("long", c.to_dict(), directory=place) as listener:
                (run,) = runs()
                assert run.info.status == "RUNNING"
                with pytest.raises(ValueError, match=f"{place} is in use by another training run"):
                    record_training("long", c.to_dict(), directory=place).__enter__()
                kind(small(), c, directory=place, listeners=(listener,)).fit(text())
        except KeyboardInterrupt:
            assert runs()[0].info.status == "KILLED"
    (run,) = runs()
    assert run.info.status == "FINISHED"
    client = store.connect(store.tracking_uri())
    steps = client.get_metric_history(run.info.run_id, "loss")
    assert {m.step for m in steps} == set(range(1, 13))
    with (
        pytest.raises(store.StoreError, match="Changing param values is not allowed"),
        record_training("long", {"steps": 13}, directory=place),
    ):
        pass
    assert runs()[0].info.status == "FINISHED"
    client.delete_run(run.info.run_id)  # a new one where the store has it no more
    for kept in (None, "of another store", ""):
        if kept is not None:
            (place / "mlflow-run").write_text(kept)
        with record_training("again", {}, directory=place):
            assert runs()[-1].info.status == "RUNNING"
    assert [run.info.run_name for run in runs()] == ["again"] * 3


def test_missing_package_of_recording_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = [name for name in sys.modules if name.split(".")[0] == "mlflow"]
    for module in ("mlflow", *imported):
        monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(store.StoreError, match=r"pip install danon\[bench\]"),
        record_training("a", {}),
    ):
        pass
