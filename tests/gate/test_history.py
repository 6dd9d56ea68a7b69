"""Slow drift over many runs of the gate."""

from __future__ import annotations

import datetime as dt
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from danon.gate import command
from danon.gate.case_history import HistoryError, Point, find_changes, read_points
from danon.gate.gate_recorder import record
from danon.gate.result import GateResult, Row
from danon.measure.statistics import Estimate
from danon.runs.case import Case
from danon.tracking import store

CASE = Case("speed", "msra", 1024, "float32", "forward")
LONG = Case("speed", "msra", 4096, "float32", "forward")


def run_of(times: np.ndarray) -> list[Point]:
    return [Point(60_000 * i, f"{i:040x}", float(t)) for i, t in enumerate(times)]


@pytest.mark.parametrize("seed", range(10))
def test_one_percent_per_run_is_found_and_noise_is_not(seed: int) -> None:
    """Each step is as small as the noise of a run: no gate sees it."""
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.01, 20))
    found = find_changes(run_of(2.0 * noise * 1.01 ** np.arange(20)))
    assert found and all(change.ratio > 1.02 for change in found)
    assert not find_changes(run_of(2.0 * noise))


def test_position_and_size_of_a_step() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, 20))
    (change,) = find_changes(run_of(noise * np.repeat((1.0, 1.1), (12, 8))))
    assert change.at == 12 and change.ratio == pytest.approx(1.1, abs=0.02)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(HistoryError, match="3 runs: a change can be told from 6 on"):
        find_changes(run_of(np.ones(3)))


def recorded(ratio: float, number: int, machine: str = "here") -> None:
    """Record a run of the gate that found this ratio to the threshold of 2."""
    rows = tuple(
        Row(case, "same", Estimate(r, r, r), 3, 1.0, r, relative_time=2 * r)
        for case, r in ((CASE, ratio), (LONG, 1.0))
    )
    when = dt.datetime(2026, 1, 31, 12, 0, number, tzinfo=dt.UTC)
    machines = {"cpu": machine}
    found = GateResult("a" * 40, f"{number:040x}", "then", "now", rows, when, 1.0, machines)
    assert "mlflow.db" in record(found)


@pytest.mark.parametrize("name", ["nosuch", "speed/msra/1k/float32/forward/cpu", "a/b/c/d/e/f"])
def test_name_that_is_no_case(name: str, tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    assert command.history(name, tmp_path, console) == 8
    assert f"{name!r} is no case: must be like 'speed/msra/" in console.export_text()


def test_history_of_recorded_runs(sqlite: str, tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    assert command.history(CASE.id, tmp_path, console) == 8
    assert "no run of the gate has" in console.export_text()
    for number in range(5):
        recorded(9.0, number, machine="elsewhere")
    for number in range(8):
        recorded(1.0 if number < 4 else 1.2 + number / 1000, number)
    assert [round(point.relative_time, 3) for point in read_points(CASE.id)][3:6] == [
        2.0,
        2.408,
        2.41,
    ]
    assert command.history(CASE.id, tmp_path, console) == 0
    (line,) = (x for x in console.export_text().splitlines() if "from here on" in x)
    assert f"{4:040x}"[:10] in line and "+20.5%" in line
    (plot,) = tmp_path.glob("history-speed-msra-N1024-*.png")
    assert plot.stat().st_size > 5000


def test_runs_with_missing_tags_or_wrong_times_are_passed_over(
    sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorded(1.0, 0)
    recorded(0.0, 1)
    recorded(1.1, 2)
    client = store.connect(sqlite)
    experiment = store.experiment_id(client, sqlite, "gate")
    first = min(client.search_runs([experiment]), key=lambda run: run.info.start_time)
    client.delete_tag(first.info.run_id, "danon.head")
    assert [point.relative_time for point in read_points(CASE.id)] == [pytest.approx(2.2)]
    assert f"passed over: run {first.info.run_id} in MLflow: it has no tag" in caplog.text
    assert "relative_time = 0: must be positive" in caplog.text
