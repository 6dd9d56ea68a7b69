"""A suite and a metric, each in one file of a user, from the bench to MLflow and the report."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from installed_packages import install
from typer.testing import CliRunner

from danon.bench import suite as suites
from danon.bench.suite_selection import select_suites
from danon.cli.app import app
from danon.processes.interpreter import bundle, python_command, python_environment
from danon.processes.suite_modules import GROUP, import_suites
from danon.runs.suite_info import Metric

SUITE = '''
"""The norm of the output."""

from danon.bench.call_suite import CallSuite
from danon.bench.suite import register
from danon.runs.suite_info import Metric


@register
class OutputNorm(CallSuite):
    """Measures the root mean square of the output."""

    name = "output-norm"
    description = "Root mean square of the output."
    metrics = (
        Metric("output_rms", "root mean square", unit="V", better="lower", charted=True),
    )

    def figures(self, workload, correctness):
        out = workload.call()().double()
        return {"output_rms": float(out.square().mean().sqrt())}, {}
'''
METRIC = '''
"""The largest entry of the output, beside the figures of the suite memory."""

from danon.bench.suite import extra_metric
from danon.runs.suite_info import Metric


@extra_metric("memory", Metric("output_max", "largest entry of the output", better="lower"))
def output_max(workload):
    return float(workload.call()().max())
'''


def danon(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = python_environment(COLUMNS="80", OMP_NUM_THREADS="1")
    command = python_command("-m", "danon", *arguments)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def bench(folder: Path, suites: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    arguments = ("--profile", "smoke", "--only", "window", "--results", "runs", "--suites", suites)
    done = danon(folder, "bench", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "runs").iterdir()
    return done, run


def recorded(uri: str) -> set[str]:
    """Return the names of the metrics of the benches in a store."""
    query = (
        "select distinct key from metrics join runs using (run_uuid) "
        "join experiments using (experiment_id) where experiments.name = ?"
    )
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as store:
        return {name for (name,) in store.execute(query, ("danon/bench",))}


@pytest.mark.parametrize(
    ("source", "target", "suite", "metric"),
    [
        (SUITE, "mine.py:OutputNorm", "output-norm", "output_rms"),
        (METRIC, "mine.py:output_max", "memory", "output_max"),
    ],
)
def test_suite_or_metric_of_one_file(
    tmp_path: Path, sqlite: str, source: str, target: str, suite: str, metric: str
) -> None:
    (tmp_path / "mine.py").write_text(source)
    _, run = bench(tmp_path, target)
    stored = json.loads((run / "results.json").read_text())
    figures = {
        (r["case"]["attention"], r["case"]["length"]): r["metrics"][metric]
        for r in stored["results"]
    }
    assert {r["case"]["suite"] for r in stored["results"]} == {suite}
    assert set(figures) == {(name, n) for name in ("sdpa", "window") for n in (64, 128)}
    assert all(value > 0 for value in figures.values())
    assert metric in {m["name"] for m in stored["run"]["suites"][suite]["metrics"]}
    # terminal and report, by a process that does not have the file
    (tmp_path / "mine.py").unlink()
    shown = CliRunner().invoke(app, ["report", str(run), "--tables"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    line = next(line for line in shown.output.splitlines() if f"{suite} · forward" in line)
    table = shown.output[shown.output.index(line) :]
    assert metric in table and f"{figures['window', 128]:.3g}" in table
    page = (run / "report.html").read_text()
    assert f"<h3>{suite} " in page and f"{figures['sdpa', 128]:.3g}" in page
    # MLflow
    assert f"{suite}.forward.float32.{metric}" in recorded(sqlite)


def test_suite_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"output-norm": "norms:OutputNorm", "broken": "norms:Missing"}
    install(tmp_path / "package", "norms", GROUP, points)
    (tmp_path / "package" / "norms.py").write_text(SUITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "package"), prepend=os.pathsep)
    done, run = bench(tmp_path, "output-norm")
    stored = json.loads((run / "results.json").read_text())
    assert {r["case"]["suite"] for r in stored["results"]} == {"output-norm"}
    said = " ".join(done.stdout.split())
    assert "suite 'broken' of the installed package norms 1.0 is left out" in said


def test_suite_of_a_broken_package_is_refused_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "broken", GROUP, {"lost": "nowhere_at_all:Lost"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    done = danon(tmp_path, "bench", "--profile", "smoke", "--suites", "lost")
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert "suite 'lost' of the installed package broken 1.0 is left out: " in said
    assert not (tmp_path / "results").exists()


def test_report_beside_a_folder_called_suites(tmp_path: Path) -> None:
    """A run without its suites' descriptions asks danon's suites, not those of the folder."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "speed.py").write_text("raise RuntimeError('not this one')")
    program = (
        "from danon.report.suite_infos import suite_info; "
        "print(*(metric.name for metric in suite_info('speed').metrics))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,  # first on the path of a program that is given so
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(bundle())))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "time_s" in done.stdout.split()


class TestAddedMetrics:
    @pytest.fixture(autouse=True)
    def _suites(self) -> None:
        import_suites()

    def test_two_of_one_name_are_refused(self) -> None:
        metric = Metric("twice", "a number")
        suites.extra_metric("memory", metric)(first)
        try:
            suites.extra_metric("memory", metric)(first)  # the same one, imported again
            with pytest.raises(ValueError, match="'twice' is already added to suite 'memory'"):
                suites.extra_metric("memory", metric)(second)
        finally:
            del suites._EXTRA["memory"]["twice"]

    def test_figure_of_the_suite_is_not_replaced(self) -> None:
        suites.extra_metric("memory", Metric("undeclared", "a number"))(first)
        try:
            with pytest.raises(ValueError, match="suite 'memory' measures one of that name"):
                suites.extra_metrics("memory", None, {"undeclared": 1.0})  # type: ignore[arg-type]
        finally:
            del suites._EXTRA["memory"]["undeclared"]


def first(workload: object) -> float:
    return 1.0


def second(workload: object) -> float:
    return 2.0


class TestWrongTargets:
    @pytest.mark.parametrize(
        ("source", "target", "words"),
        [
            ("class A: pass", "A", "neither a danon.bench.suite.Suite nor"),
            ("1 / 0", "A", "does not import: ZeroDivisionError"),
            (SUITE.replace('"output-norm"', '"a/b"'), "OutputNorm", "letters, digits"),
            (SUITE.replace('"output-norm"', '"speed"'), "OutputNorm", "is already registered"),
            (METRIC.replace('"memory"', '"recall"'), "output_max", "has no calls to measure"),
            (
                METRIC.replace('"output_max"', '"peak_bytes"'),
                "output_max",
                "already has a metric of that name",
            ),
        ],
    )
    def test_refusal_of_a_file_without_a_suite(
        self, tmp_path: Path, source: str, target: str, words: str
    ) -> None:
        file = tmp_path / f"mine_{abs(hash((source, target)))}.py"
        file.write_text(source)
        with pytest.raises(ValueError, match=words):
            select_suites([f"{file}:{target}"], print)

    def test_refusal_of_an_unknown_suite(self) -> None:
        with pytest.raises(ValueError, match="unknown suite 'sped'; known: speed, memory, decode"):
            select_suites(["sped"], print)

    def test_refusal_of_a_metric_of_an_unknown_suite(self) -> None:
        with pytest.raises(ValueError, match="unknown suite 'none'"):
            suites.extra_metric("none", Metric("a", "a"))


def test_descriptions_of_all_suites() -> None:
    for name in select_suites((), print):
        info = suites.get(name).info()
        assert info.description.endswith(".") and info.metrics
        for metric in info.metrics:
            assert metric.description, (name, metric.name)
