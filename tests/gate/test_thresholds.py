"""Thresholds: the file, what moves them, and what the gate makes of them."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import math
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from repositories import MINE, git
from rich.console import Console
from typer.testing import CliRunner

from danon.cli.app import app
from danon.gate import workspace
from danon.gate.acceptance import RECALIBRATED, Allowance, accept, allowances
from danon.gate.case_history import read_points
from danon.gate.cases import gate_cases
from danon.gate.command import accept_cases, calibrate, gate
from danon.gate.exact_metrics import Missing, compare_exact
from danon.gate.gate_recorder import BASELINE, case_of, record, register, try_record
from danon.gate.result import ExactMetric, GateResult, Row
from danon.gate.result_report import FILES, write
from danon.gate.thresholds import Accepted, Threshold, Thresholds, ThresholdsError, Timing
from danon.gate.workspace import THRESHOLDS, Options
from danon.measure.fingerprint import fingerprint
from danon.measure.statistics import Estimate
from danon.runs.case import Case
from danon.tracking import store

CASE = Case("speed", "MyAttention", 128, "float32", "forward")
A, B, C, D = (f"speed/{name}/N128/float32/forward/cpu" for name in "abcd")
HERE = fingerprint(torch.device("cpu"))
WHEN = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)


TIME = {"relative": 2.0, "spread": 0.01, "drift": 0.02}


def refuse(*_: object, **__: object) -> None:
    raise MlflowException("connection refused")


def runs_of_the_gate(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("danon/gate")
    return list(client.search_runs([experiment.experiment_id]))


def threshold(relative_time: float = 2.0, **facts: float) -> Threshold:
    return Threshold(time=Timing(**TIME | {"relative": relative_time}), facts=facts)


def thresholds(cases: dict[str, Threshold], *, fingerprint: dict[str, str] = HERE) -> Thresholds:
    return Thresholds(
        commit="a" * 40, when="2026-01-31", pairs=10, fingerprint=fingerprint, cases=cases
    )


class TestFile:
    """results/thresholds.json, as people edit it."""

    def test_file_is_read_as_written(self, tmp_path: Path) -> None:
        place = tmp_path / "results" / "thresholds.json"
        some = thresholds({B: threshold(flops=8.0, peak_bytes=4.0), A: threshold()})
        some.write(place)
        text = place.read_text()
        assert Thresholds.read(place) == some
        assert text.index(A) < text.index(B) and text.endswith("}\n")
        Thresholds.read(place).write(place)
        assert place.read_text() == text

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"cases": {A: {"time": TIME | {"relative": -1}}}}, r"relative: .*greater than 0"),
            ({"cases": {A: {"time": TIME | {"relative": "NaN"}}}}, "time -> relative"),
            ({"cases": {A: {"facts": {"flops": "many"}}}}, "facts -> flops: .*valid number"),
            ({"cases": {A: {"history": [{"why": ""}]}}}, r"history -> 0 -> .*\(5 more\)"),
            ({"cases": {A: {"timing": 1}}}, "timing: Extra inputs are not permitted"),
            ({"cases": {"fast": {}}}, "fast.*should match pattern"),
            ({"format": 1}, "format: Input should be 2"),
        ],
    )
    def test_errors_of_a_wrong_file(
        self, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        place = tmp_path / "thresholds.json"
        values = json.loads(thresholds({A: threshold()}).model_dump_json())
        for name, new in change.pop("cases", {}).items():
            values["cases"][name] = values["cases"][A] | new
        place.write_text(json.dumps(values | change))
        with pytest.raises(ThresholdsError, match=words):
            Thresholds.read(place)

    def test_missing_file_and_half_a_file(self, tmp_path: Path) -> None:
        place = tmp_path / "thresholds.json"
        with pytest.raises(ThresholdsError, match="is not there: `nox -s calibrate` measures it"):
            Thresholds.read(place)
        place.write_text('{"format": 2, "cas')
        with pytest.raises(ThresholdsError, match="the file: Invalid JSON"):
            Thresholds.read(place)


def compared(place: Path, ratio: float | None, *facts: ExactMetric, head: str = "b" * 40) -> Path:
    """Write a gate.json with this time ratio of cases A to C and these exact metrics of A."""
    time = None if ratio is None else Estimate(ratio, ratio, ratio)
    rows = (
        Row(case_of(A), "slower", time, facts=facts),
        Row(case_of(B), "slower", time),
        Row(case_of(C), "same", time),
        Row(case_of(D), "broken"),
    )
    found = GateResult("a" * 40, head, "then", "now", rows, WHEN, 1.0)
    place.write_text(found.to_json())
    return place


class TestAccept:
    """Moving a threshold."""

    def test_measured_figures_become_the_threshold(self, tmp_path: Path) -> None:
        found = compared(tmp_path / "gate.json", 1.25, ExactMetric("flops", 8.0, 16.0))
        old = thresholds({A: threshold(2.0, flops=8.0, parameters=3.0), B: threshold()})
        new = accept(old, found, A, reason="exact now", user="Ada")
        assert new.cases[A].time == Timing(**TIME | {"relative": 2.5})
        assert new.cases[A].facts == {"flops": 16.0, "parameters": 3.0}
        (kept,) = new.cases[A].history
        assert (kept.why, kept.by, kept.commit) == ("exact now", "Ada", "b" * 40)
        assert (kept.relative_time, kept.facts) == (2.0, {"flops": 8.0, "parameters": 3.0})
        assert new.cases[B] == old.cases[B]
        again = accept(new, found, A, reason="in words", user="Ada").cases[
            A
        ]  # not 1.25 times twice
        assert again == new.cases[A].model_copy(update={"history": again.history})
        assert again.history == (kept.model_copy(update={"why": "in words"}),)
        compared(tmp_path / "gate.json", 1.25, head="c" * 40)
        later = accept(new, found, A, reason="twice", user="Ada").cases[A]
        assert later.time == Timing(**TIME | {"relative": 3.125})
        assert [entry.why for entry in later.history] == ["exact now", "twice"]

    def test_accepting_on_another_machine_scales_by_a_factor(self, tmp_path: Path) -> None:
        """Its bytes are others; what they grew by is allowed there, and here."""
        growth = ExactMetric("peak_bytes", 300.0, 400.0), ExactMetric("flops", 8.0, 16.0)
        old = thresholds({A: threshold(2.0, flops=8.0, peak_bytes=301.0)})
        found = compared(tmp_path / "gate.json", None, *growth)
        new = accept(old, found, A, reason="exact now", user="Ada")
        assert new.cases[A].facts == {"flops": 16.0, "peak_bytes": 402.0}
        allowed = allowances(old, new)[A]
        for base, head, finding in (
            (300.0, 400.0, "same"),
            (301.0, 402.0, "same"),
            (300.0, 402.0, "larger"),
        ):
            row = compare_exact(CASE, {"peak_bytes": base}, {"peak_bytes": head}, allowed)
            assert row.finding == finding

    def test_pattern_accepts_regressed_cases(self, tmp_path: Path) -> None:
        found = compared(tmp_path / "gate.json", 1.25)
        old = thresholds({name: threshold(2.0) for name in (A, B, C, D)})
        new = accept(old, found, "speed/*/forward/cpu", reason="exact now", user="Ada")
        assert [name for name in old.cases if new.cases[name] != old.cases[name]] == [A, B]
        for pattern in ("speed/c/*", "speed/d/*", "speed/a/*"):  # same, broken, accepted already
            with pytest.raises(ThresholdsError, match="no regression left that it is a pattern of"):
                accept(new, found, pattern, reason="exact now", user="Ada")

    @pytest.mark.parametrize(
        ("name", "why", "ratio", "words"),
        [
            (A, " ", 1.2, "needs --reason"),
            ("c", "so", 1.2, f"no threshold of 'c', .*; known: {A}"),
            (A, "so", None, f"no figures of '{A}'"),
        ],
    )
    def test_acceptance_that_is_refused(
        self, tmp_path: Path, name: str, why: str, ratio: float | None, words: str
    ) -> None:
        found = compared(tmp_path / "gate.json", ratio)
        with pytest.raises(ThresholdsError, match=words):
            accept(thresholds({A: threshold()}), found, name, reason=why, user="Ada")
        with pytest.raises(ThresholdsError, match="run the gate first"):
            accept(thresholds({A: threshold()}), tmp_path / "none", A, reason="so", user="Ada")

    def test_allowances_are_of_entries_between_two_commits(self) -> None:
        entry = Accepted(
            when="2026-02-01", commit="b", by="Ada", why="exact now", relative_time=2.0, facts={}
        )
        before = thresholds({name: threshold(2.0) for name in (A, B, C)})
        moved = threshold(2.5, flops=16.0).model_copy(update={"history": (entry,)})
        after = thresholds({A: moved, B: threshold(2.5), D: moved})  # nobody accepted B
        found = allowances(before, after)
        assert list(found) == [A] and found[A].reason == "exact now"
        assert found[A].log_time == pytest.approx(math.log(1.25))
        assert allowances(None, after) == allowances(before, None) == {}

    def test_recalibration_allows_nothing(self) -> None:
        """On another machine every time would be another, and every slowdown pass."""
        entry = Accepted(
            when="2026-02-01", commit="b", by="Ada", why=RECALIBRATED, relative_time=2.0, facts={}
        )
        before = thresholds({A: threshold(2.0), B: threshold(2.0)})
        measured = threshold(9.0).model_copy(update={"history": (entry,)})
        accepted = entry.model_copy(update={"why": "exact now"})
        again = entry.model_copy(update={"relative_time": 3.0})
        both = threshold(9.0).model_copy(update={"history": (accepted, again)})
        found = allowances(before, thresholds({A: measured, B: both}))
        assert list(found) == [B] and found[B].log_time == pytest.approx(math.log(1.5))

    def test_growth_up_to_and_beyond_the_accepted_one(self) -> None:
        allowed = Allowance(0.0, {"flops": 2.0}, {}, "exact now")
        row = compare_exact(CASE, {"flops": 8.0}, {"flops": 16.0}, allowed)
        assert row.finding == "same" and row.note == "accepted: exact now"
        assert compare_exact(CASE, {"flops": 8.0}, {"flops": 17.0}, allowed).finding == "larger"
        both = {"flops": 8.0, "peak_bytes": 1.0}, {"flops": 16.0, "peak_bytes": 2.0}
        assert compare_exact(CASE, *both, allowed).finding == "larger"


@pytest.fixture
def own(repository: Path, monkeypatch: pytest.MonkeyPatch, gate_inputs: Path, sqlite: str) -> Path:
    """Enter the repository at its first commit, with a gate of one small case."""
    git(repository, "reset", "--hard", "HEAD~1")
    git(repository, "config", "user.name", "Ada")
    git(repository, "config", "user.email", "ada@example.org")
    monkeypatch.setattr(workspace, "gate_cases", lambda names: [CASE])
    monkeypatch.setattr(workspace, "write_inputs", lambda path: gate_inputs)
    monkeypatch.chdir(repository)
    return repository


OPTIONS = Options(("mine.py:MyAttention",), "", False, 10.0, Path("out"))


def told(run: Any, *arguments: Any) -> tuple[int, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    status: int = run(*arguments, console)
    return status, " ".join(console.export_text().split())


def commit(folder: Path, work: int, *more: str) -> None:
    (folder / "mine.py").write_text(MINE.format(work=work))
    git(folder, "commit", "-m", f"work {work}", "--", "mine.py", *more)


class TestGate:
    """From calibration to acceptance, in a repository of one's own."""

    @pytest.mark.slow  # test_gate_recall goes the same way with a model
    def test_from_calibration_to_acceptance(self, own: Path) -> None:
        status, said = told(gate, OPTIONS)
        assert status == 7 and "nox -s calibrate" in said

        status, said = told(calibrate, OPTIONS, 3)
        assert status == 0 and "1 of 1 cases calibrated" in said
        found = Thresholds.read(own / THRESHOLDS).cases[CASE.id]
        assert found.facts["flops"] == 4 * 4 * 128 * 128 * 64
        assert found.time is not None and not found.history
        assert 0.3 < found.time.relative < 30 and 0.005 < found.time.spread < 1
        git(own, "add", str(THRESHOLDS))
        git(own, "commit", "-m", "thresholds")

        status, said = told(gate, OPTIONS)
        assert status == 0 and "thresholds of 20" in said and "no regression in 1 cases" in said
        (point,) = read_points(CASE.id)
        assert point.relative_time == pytest.approx(found.time.relative, rel=0.5)

        commit(own, 2)
        status, said = told(gate, OPTIONS)
        assert status == 1 and "slower" in said and "floating point operations" in said

        status, said = told(accept_cases, CASE.id, "twice as exact", Path("out"))
        assert status == 0 and "of dense attention's time" in said
        moved = Thresholds.read(own / THRESHOLDS).cases[CASE.id]
        assert moved.time is not None and moved.time.relative > 1.3 * found.time.relative
        assert (moved.history[-1].by, moved.history[-1].why) == ("Ada", "twice as exact")
        git(own, "commit", "-am", "accept it")

        assert told(gate, OPTIONS)[0] == 0
        against = replace(OPTIONS, against="HEAD~2")
        status, said = told(gate, against)
        assert status == 0 and "accepted: twice as exact" in said

    @pytest.mark.slow
    def test_thresholds_of_other_machines(self, own: Path) -> None:
        """Operations are compared anywhere, bytes with one torch, times and peaks with room."""
        facts = {"flops": 4.0 * 4 * 128 * 128 * 64, "parameters": 0.0}
        peak = 0.0
        for other, known, status, words, unsaid in (
            ({"torch": "9.9", "cpu": "abacus"}, 1.0, 0, "(abacus,", "peak memory"),
            ({"cpu_capability": "fingers"}, 1.0, 1, "larger", "are not compared"),
            ({"cpu_capability": "fingers"}, 1.4, 0, "no regression", "peak memory"),
        ):
            case = threshold(1000.0, peak_bytes=peak / known, **facts)  # nothing is slower
            thresholds({CASE.id: case}, fingerprint=HERE | other).write(own / THRESHOLDS)
            git(own, "add", str(THRESHOLDS))
            git(own, "commit", "-m", "thresholds")
            found, said = told(gate, OPTIONS)
            assert found == status and words in said and unsaid not in said
            assert "only what is 6 times as slow beside dense attention" in said
            if found:
                assert "or takes 1.5 times the memory is a regression" in said
                (row,) = GateResult.read(Path("out/gate.json")).rows
                ((peak,),) = [[fact.head for fact in row.facts]]
            else:
                assert ("; bytes and graph breaks are not compared" in said) == ("torch" in other)
            found, said = told(accept_cases, CASE.id, "so", Path("out"))
            assert found == 7 and "compare with --against REV first, or calibrate here" in said

    @pytest.mark.slow
    def test_recalibration_is_in_the_history(self, own: Path) -> None:
        known = threshold(1000.0, flops=1.0)
        thresholds({CASE.id: known, B: known}).write(own / THRESHOLDS)
        git(own, "add", ".")
        git(own, "commit", "-m", "thresholds")
        assert told(calibrate, OPTIONS, 2)[0] == 0
        found = Thresholds.read(own / THRESHOLDS).cases
        assert found[B] == known  # not measured: stays
        (entry,) = found[CASE.id].history
        assert (entry.why, entry.relative_time) == ("calibrated again", 1000.0)
        timing = found[CASE.id].time
        assert timing is not None and timing.relative < 100

    def test_bad_input(self, own: Path, forked_workers: None) -> None:
        assert told(calibrate, OPTIONS, 1) == (2, "danon: --pairs 1: must be at least 2")
        (own / THRESHOLDS).parent.mkdir()
        (own / THRESHOLDS).write_text("{}")
        git(own, "add", ".")
        git(own, "commit", "-m", "wrong")
        status, said = told(gate, OPTIONS)
        assert status == 7 and "commit: Field required" in said
        thresholds({CASE.id: threshold()}).write(own / THRESHOLDS)
        git(own, "commit", "-a", "-m", "right")
        mistyped = replace(OPTIONS, attentions=("mien.py:MyAttention",))
        status, said = told(gate, mistyped)
        assert status == 6 and said.endswith("danon: head: no file mien.py")


def test_case_without_threshold_is_new() -> None:
    row = compare_exact(CASE, Missing("there is no threshold of it", "removed"), {"flops": 1.0})
    assert row == Row(CASE, "new", note="there is no threshold of it")


class TestStore:
    """Runs and model versions in MLflow."""

    def test_acceptance_makes_a_model_version(self, sqlite: str, tmp_path: Path) -> None:
        first = thresholds({A: threshold(2.0, flops=8.0), B: threshold()})
        assert "registered danon-a, danon-b (baseline)" in register(first, "calibrated")
        assert "thresholds are those of" in register(first, "read again")  # nothing new
        found = compared(tmp_path / "gate.json", 1.25)
        moved = accept(first, found, A, reason="exact now", user="Ada")
        assert "registered danon-a (baseline)" in register(moved, "exact now")
        client = MlflowClient(sqlite)
        versions = client.search_model_versions("name = 'danon-a'")
        assert sorted(int(v.version) for v in versions) == [1, 2]
        baseline = client.get_model_version_by_alias("danon-a", BASELINE)
        assert int(baseline.version) == 2 and baseline.tags["danon.why"] == "exact now"
        assert any("exact now (Ada, " in text for text in baseline.tags.values())
        run = client.get_run(baseline.run_id)
        assert run.data.metrics["a.forward.float32.relative_time"] == 2.5
        assert run.data.metrics["a.forward.float32.flops"] == 8.0
        assert run.info.status == "FINISHED"
        kept = client.download_artifacts(baseline.run_id, "thresholds/a/thresholds.json")
        assert json.loads(Path(kept).read_text())[A]["time"]["relative"] == 2.5

    def test_version_with_every_case_accepted(self, sqlite: str) -> None:
        names = [case.id for case in gate_cases(["a"])]
        entry = Accepted(
            when="2026-02-01", commit="b", by="Ada", why="exact now", relative_time=2.0, facts={}
        )
        moved = threshold().model_copy(update={"history": (entry,)})
        assert "registered danon-a" in register(thresholds(dict.fromkeys(names, moved)), "x")

    def test_comparison_is_a_run(self, sqlite: str, tmp_path: Path) -> None:
        ratio = Estimate(1.1, 1.05, 1.15)
        row = Row(CASE, "slower", ratio, 9, 0.1, 0.11)
        found = GateResult("a" * 40, "b" * 40, "then", "now", (row,), WHEN, 1.0, HERE)
        write(found, tmp_path)
        client = MlflowClient(sqlite)
        with pytest.MonkeyPatch.context() as patch:  # the store dies in the middle
            patch.setattr(MlflowClient, "log_text", refuse)
            said = try_record(found, tmp_path)
        assert said.startswith(f"not recorded, `danon record {tmp_path}` tries again: sqlite")
        (run,) = runs_of_the_gate(client)
        assert run.info.status == "FAILED"
        said = CliRunner().invoke(app, ["record", str(tmp_path)]).output
        assert said.startswith("recorded in sqlite")
        assert record(found).startswith("recorded before in sqlite")
        (run,) = runs_of_the_gate(client)
        assert (run.info.status, run.info.start_time) == ("FINISHED", WHEN.timestamp() * 1000)
        assert run.data.tags["danon.outcome"] == "regression"
        assert run.data.metrics["MyAttention.forward.float32.ratio"] == 1.1
        assert {f.path for f in client.list_artifacts(run.info.run_id)} == set(FILES)
        (tmp_path / FILES[0]).write_text('{"rows": 1}')
        refusal = CliRunner().invoke(app, ["record", str(tmp_path)])
        assert refusal.exit_code == 2 and "run the gate again: base: Field" in refusal.output

    def test_store_that_cannot_be_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("no database")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file")
        assert register(thresholds({A: threshold()}), "x").startswith("thresholds are not regist")
        found = GateResult("a", "b", "", "", (), WHEN, 1.0)
        assert try_record(found, tmp_path).startswith("not recorded, ")

    @pytest.mark.slow
    def test_three_processes_on_a_fresh_store_make_one_version(self, sqlite: str) -> None:
        code = (
            "from test_thresholds import A, register, threshold, thresholds\n"
            "print(register(thresholds({A: threshold()}), 'x'))"
        )
        both = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                text=True,
                stdout=subprocess.PIPE,
            )
            for _ in range(3)
        ]
        said = sorted(process.communicate(timeout=100)[0].split()[0] for process in both)
        assert said == ["registered", "thresholds", "thresholds"]  # "are those of ..."
        assert len(MlflowClient(sqlite).search_model_versions("name = 'danon-a'")) == 1

    def test_locked_database(
        self, sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "PROBE_TIMEOUT_S", 1)
        file = sqlite.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            said = register(thresholds({A: threshold()}), "x")
        assert said.startswith("thresholds are not registered") and "database is locked" in said
        assert "registered danon-a" in register(thresholds({A: threshold()}), "x")  # nothing stays

    def test_older_schema_of_the_store(self, sqlite: str) -> None:
        file = sqlite.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute("UPDATE alembic_version SET version_num = '0a8213491aaa'")
        assert "mlflow db upgrade" in register(thresholds({A: threshold()}), "x")
