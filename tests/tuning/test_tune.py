"""The command tune, from its options to files, records and pictures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from danon.cluster.connection import ClusterError
from danon.tuning import candidates, command
from danon.tuning.command import Options, Search, join, tune
from danon.tuning.study import StudyError
from danon.tuning.subject import Subject

MINE = """
import torch
from danon import BaseAttention
from danon.tuned.search_space import Categorical, Space
from danon.tuning import measured_case

measured_case.TIMING_S = 0.1  # in the process that measures


class Mine(BaseAttention):
    def __init__(self, config, window=64):
        super().__init__()
        self.setup_attention(config)
        self.window = window

    @classmethod
    def search_space(cls):
        return Space({"window": Categorical((16, 32, 64, 128))}, {"window": 64})

    def forward(self, q, k, v, mask=None):
        if self.window == 16:
            raise RuntimeError("too narrow")
        logits = self.compute_attention(q, k)
        at = torch.arange(q.shape[2])
        far = at[:, None] - at >= self.window
        return torch.softmax(logits.masked_fill(far, -torch.inf), dim=-1) @ v
"""


def options(tmp_path: Path, **changes: Any) -> Options:
    """Options of a small study; a change is named as its field in Options, Subject or Search."""
    subject = {
        "kind": "hyperparameters",
        "attention": str(tmp_path / "mine.py") + ":Mine",
        "device": "cpu",
        "length": 192,
        "dtype": "float32",
    }
    search = {"objective": "speed,quality", "sampler": "random", "trials": 6}
    rest = {
        "results": tmp_path / "results",
        "study": "s",
        "storage": f"sqlite:///{tmp_path / 'optuna.db'}",
        "command": "danon tune",
    }
    parts: list[dict[str, Any]] = [
        values | {name: value for name, value in changes.items() if name in fields}
        for values, fields in (
            (subject, Subject.__dataclass_fields__),
            (search, Search.__dataclass_fields__),
            (rest, Options.__dataclass_fields__),
        )
    ]
    return Options(Subject(**parts[0]), Search(**parts[1]), **parts[2])


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_workers: None) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    for name, number in (("REPEATS", 1), ("CHOOSING_REPEATS", 1), ("MAX_REPEATED", 1)):
        monkeypatch.setattr(candidates, name, number)
    return tmp_path


def test_study_of_a_user_attention(
    mine: Path, sqlite: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(mine)
    assert tune(asked, Console(width=120)) == 0
    said = capsys.readouterr().out
    assert "failed: RuntimeError: too narrow" in said and re.search(r", \d again", said)
    assert "best for" in said and "commit it" in said
    found = json.loads((mine / "results" / "tuned" / "Mine.json").read_text())
    assert found["attention"] == "Mine" and set(found["best"]) >= {"speed", "balanced"}
    exact = found["best"]["quality"]
    done = exact["provenance"]["trials"]
    assert exact["settings"]["window"] >= 64 and 4 <= done <= 6  # there are four choices
    folder = mine / "results" / "tune" / "s"
    assert (folder / "front.png").stat().st_size > 5000
    page = (folder / "report.html").read_text()
    for part in (
        "Pareto",
        "Front: time",
        "Optimization History",
        "<th>best for</th>",
        "<td>(default)</td>",
        "Mine, 192 tokens, float32 on cpu, random sampler",
    ):
        assert part in page, part

    client = mlflow.MlflowClient(sqlite)
    experiment = client.get_experiment_by_name("danon/tune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "danon.trial" not in run.data.tags]
    trials = [run for run in runs if run is not parent]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in trials)
    states = {run.data.tags["danon.state"]: run.info.status for run in trials}
    assert states == {"complete": "FINISHED", "fail": "FAILED"}
    assert parent.info.status == "FINISHED" and parent.data.tags["danon.trials"] == str(done)
    (complete, *_) = [run for run in trials if run.info.status == "FINISHED"]
    assert {"time_ratio", "error", "objective.speed"} <= set(complete.data.metrics)

    assert tune(asked, Console(width=120)) == 0  # has them all: nothing is measured again
    assert "trial 0" not in capsys.readouterr().out.split("best for")[0]
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)

    def gone(*_: object) -> None:
        raise ClusterError("nobody is left")

    monkeypatch.setattr(command.SubprocessEvaluator, "settings", gone)
    (folder / "report.html").unlink()
    assert tune(asked, Console(width=120)) == 1
    said = capsys.readouterr()
    assert "not written: nobody is left" in said.err
    assert "best for" in said.out and "MLflow" in said.out
    assert (folder / "report.html").is_file()


def test_space_that_changes_during_a_study(mine: Path) -> None:
    """A choice must not stand for another thing from one repeat to the next."""
    local = command.SubprocessEvaluator(options(mine).subject, mine / "log")
    try:
        choice = local.describe().default
        assert local.settings(choice) == {"window": 64}
        (mine / "mine.py").write_text(MINE.replace("(16, 32, 64, 128)", "(32, 64)"))
        local.close()  # as for a repeat
        with pytest.raises(StudyError, match=r"Mine has changed .*: window was .*16.*, is .*"):
            local.settings(choice)
    finally:
        local.close()


@pytest.mark.slow
def test_worker_joins_by_the_name_of_the_study(
    mine: Path, sqlite: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[str]()
    keep = lambda run, *_: written.append(run.command) or ([], 0)  # noqa: E731
    monkeypatch.setattr(command, "write_output", keep)
    monkeypatch.setattr(command, "redact_password", lambda url: "sqlite:///***")
    asked = options(mine, trials=1)
    typed = f"danon tune --storage {asked.storage}"
    assert tune(replace(asked, command=typed), Console(width=200)) == 0
    assert written == ["danon tune --storage sqlite:///***"]  # a password stays where it was typed
    capsys.readouterr()
    assert join("s", asked.storage, 3, Console(width=200), "danon tune worker") == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^trial \d+", said, re.MULTILINE)) == 2  # the first one is there
    assert join("t", asked.storage, 3, Console(width=200), "danon tune worker") == 2
    assert "no study 't'; there are: s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, "--trials 0: must be at least 1"),
        ({"engine": "dask"}, "--engine 'dask': must be one of local, ray"),
        (
            {"kind": "luck"},
            "--kind 'luck': must be one of architecture, hyperparameters, quantization",
        ),
        ({"objective": "fame"}, "--objective 'fame': must be of speed, memory, quality, balanced"),
        ({"limits": ("speed=fast",)}, "--limit 'speed=fast': must be"),
        ({"attention": "sdpa"}, "attention 'sdpa' has nothing to tune"),
        ({"attention": "nobody"}, "unknown attention 'nobody'; known: "),
        ({"study": "it's"}, "must be of letters, digits"),
        ({"storage": "postgresql+psycopg://127.0.0.1:9/none"}, "--storage postgresql"),
    ],
)
def test_wrong_option_is_refused_in_one_line(
    mine: Path, sqlite: str, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    assert tune(options(mine, **changes), Console(width=200)) == 2
    said = capsys.readouterr()
    assert said.out == "" and words in said.err and len(said.err.splitlines()) == 1
    assert not (mine / "results").exists()


@pytest.mark.slow
def test_limit_that_no_trial_meets(
    mine: Path, sqlite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options(mine, trials=2, objective="memory", limits=("quality=0.0001",))
    assert tune(asked, Console(width=200)) == 1
    assert "no trial met quality <= 0.0001 (the least is" in capsys.readouterr().err
    assert not list((mine / "results" / "tuned").iterdir())
