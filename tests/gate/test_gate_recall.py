"""Recall of a trained model before a change and after it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from repositories import MINE, git
from rich.console import Console

from danon.gate import workspace
from danon.gate.acceptance import RECALIBRATED, Allowance, allowances
from danon.gate.cases import gate_cases
from danon.gate.command import accept_cases, calibrate, gate
from danon.gate.exact_metrics import Missing, compare_exact
from danon.gate.recall_probe import PLAN
from danon.gate.result import RECALL_TOLERANCE_POINTS, ExactMetric
from danon.gate.thresholds import Accepted, Threshold, Thresholds
from danon.gate.worker_client import WorkerClient
from danon.gate.workspace import MODELS, THRESHOLDS, Options

ROOT = Path(__file__).parents[2]
CASE = list(gate_cases(["MyAttention"]))[-1]
WHOLE = MINE.format(work=1)
"""Softmax attention."""
FORGETFUL = WHOLE.replace("return out", "out[:, :, 4::64] = 0; return out")
OTHER = WHOLE.replace(
    "self.setup_attention(config)",
    "self.setup_attention(config); self.scale = torch.nn.Parameter(torch.ones(1))",
)


def test_case_is_the_one_that_the_suite_trains() -> None:
    (longest,) = (c for c in PLAN.cases("MyAttention", "cpu") if c.length == PLAN.lengths[-1])
    assert longest == CASE


def test_committed_weights_match_plan_and_thresholds() -> None:
    stored = json.loads((ROOT / "results" / "thresholds.json").read_text())
    models = {x["model"] for x in stored["cases"].values() if x["model"]}
    weights = sorted((ROOT / "results" / "recall").glob("*.pt"))
    assert weights
    for file in weights:
        assert torch.load(file, weights_only=True)["plan"] == PLAN.digest, file.name
    assert models == {hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in weights}


class TestCompareExact:
    """A row, from two sides' figures."""

    def test_recall_within_the_tolerance_is_the_same(self) -> None:
        base = {"recall_8": 0.950, "recall_32": 0.5}
        same = compare_exact(
            CASE, base, {"recall_8": 0.950 - 0.9 * RECALL_TOLERANCE_POINTS, "recall_32": 0.6}
        )
        assert same.finding == "same"
        assert [fact.name for fact in same.facts] == ["recall_8", "recall_32"]  # told in any case
        assert compare_exact(CASE, base, {"recall_8": 0.938, "recall_32": 0.6}).finding == "worse"

    def test_accepted_fall_of_recall_is_the_limit(self) -> None:
        def known(recall: float, *history: Accepted) -> Thresholds:
            case = Threshold(time=None, facts={"recall_8": recall}, model="m", history=history)
            return Thresholds(
                commit="a", when="2026-01-31", pairs=2, fingerprint={}, cases={CASE.id: case}
            )

        entry = Accepted(
            when="2026-02-01",
            commit="b",
            by="Ada",
            why="smaller",
            relative_time=None,
            facts={"recall_8": 0.95},
        )
        may = allowances(known(0.95), known(0.90, entry))[CASE.id]
        assert may.absolute["recall_8"] == pytest.approx(0.05) and may.log_time == 0
        again = entry.model_copy(update={"why": RECALIBRATED, "facts": {"recall_8": 0.90}})
        assert allowances(known(0.95), known(0.60, entry, again))[CASE.id] == may  # another model
        base = {"recall_8": 0.80}  # another model than that of the thresholds
        assert compare_exact(CASE, base, {"recall_8": 0.745}, may).finding == "same"
        assert compare_exact(CASE, base, {"recall_8": 0.735}, may).finding == "worse"
        assert compare_exact(CASE, base, {"recall_8": 0.735}, Allowance()).finding == "worse"

    def test_weights_that_do_not_fit_are_not_measured(self) -> None:
        row = compare_exact(CASE, {"recall_8": 0.9}, Missing("do not fit", "not measured"))
        assert (row.finding, row.note) == ("not measured", "do not fit")


def test_direction_of_exact_metrics() -> None:
    assert ExactMetric("flops", 1.0, 2.0).is_worse() and not ExactMetric(
        "flops", 1.0, 2.0
    ).is_worse(2.0)
    assert not ExactMetric("flops", 2.0, 1.0).is_worse()
    assert not ExactMetric("recall_8", 0.5, 0.9).is_worse() and ExactMetric(
        "recall_8", 0.9, 0.5
    ).is_worse(0.3)


@pytest.fixture
def own(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    gate_inputs: Path,
    sqlite: str,
    forked_workers: None,
) -> Path:
    """Commit softmax attention to the repository, with a gate that measures recall alone."""
    monkeypatch.setattr(workspace, "gate_cases", lambda names: [CASE])
    monkeypatch.setattr(workspace, "write_inputs", lambda path: gate_inputs)
    monkeypatch.chdir(repository)
    git(repository, "config", "user.name", "Ada")
    git(repository, "config", "user.email", "ada@example.org")
    commit(repository, WHOLE)
    return repository


def commit(folder: Path, source: str) -> None:
    (folder / "mine.py").write_text(source)
    git(folder, "add", ".", ":!out")
    git(folder, "commit", "-m", "next")


def told(run: Any, *arguments: Any) -> tuple[int, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    status: int = run(*arguments, console)
    return status, " ".join(console.export_text().split())


@pytest.fixture
def stored_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer a request to train with the weights of ucsa, without what softmax does not have.

    The slow test of this file trains.
    """
    request = WorkerClient.request

    def answer(worker: WorkerClient, do: str, **arguments: Any) -> Any:
        if do != "train":
            return request(worker, do, **arguments)
        saved = torch.load(ROOT / "results" / "recall" / "ucsa.pt", weights_only=True)
        state = {name: x for name, x in saved["state"].items() if "_pool." not in name}
        torch.save({**saved, "state": state}, arguments["path"])
        return None

    monkeypatch.setattr(WorkerClient, "request", answer)


def test_from_calibration_to_acceptance(own: Path, sqlite: str, stored_training: None) -> None:
    options = Options(("mine.py:MyAttention",), "", False, 10.0, Path("out"))
    status, said = told(calibrate, options, 2)
    assert status == 0 and "1 of 1 cases calibrated" in said
    threshold = Thresholds.read(own / THRESHOLDS).cases[CASE.id]
    assert threshold.time is None and threshold.facts["recall_8"] > 0.9
    (weights,) = (own / MODELS).iterdir()
    assert weights.name == "MyAttention.pt" and weights.stat().st_size < 400_000
    commit(own, WHOLE)

    status, said = told(gate, options)
    known = f"{threshold.facts['recall_32']:.1%}"
    assert status == 0 and f"recall of 32 pairs {known} -> {known}" in said

    commit(own, FORGETFUL)  # one in 32 of the questions
    status, said = told(gate, options)
    assert status == 1 and "worse" in said and "more questions wrongly" in said
    client = MlflowClient(sqlite)
    experiment = client.get_experiment_by_name("danon/gate")
    last = client.search_runs([experiment.experiment_id])[0].data.metrics
    found = threshold.facts["recall_32"] - last["MyAttention.training.float32.mqar.recall_32"]
    assert RECALL_TOLERANCE_POINTS < found < 0.05

    status, said = told(accept_cases, CASE.id, "never asked there", Path("out"))
    assert status == 0 and "recall_32 0.9" in said
    commit(own, FORGETFUL)
    assert told(gate, options)[0] == 0

    commit(own, OTHER)
    status, said = told(gate, options)
    assert status == 2 and "MyAttention.pt does not fit: " in said and "scale" in said


@pytest.mark.slow
def test_against_a_commit_with_recall(own: Path) -> None:
    commit(own, FORGETFUL)
    options = Options(("mine.py:MyAttention",), "", False, 10.0, Path("out"), "HEAD~1")
    status, said = told(gate, options)
    assert status == 1 and "worse" in said
    assert not (own / MODELS).exists()
