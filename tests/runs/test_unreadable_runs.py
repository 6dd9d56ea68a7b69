"""A run that cannot be read is named and passed over; asked for by name it is refused."""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hybrids import record as record_figures
from rich.console import Console
from typer.testing import CliRunner, Result

from danon.attention.hybrid import measurements
from danon.bench.session import Options, Session
from danon.cli.app import app
from danon.report.terminal import render
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal, readable_runs
from danon.runs.run_info import RunInfo
from danon.runs.schema import SchemaError

MACHINE = {"id": "here", "cpu": "Z80", "device": "cpu"}
KINDS = {"sdpa": (1.0, 0.99), "ucsa": (0.5, 0.99)}  # time over dense, right answers


def record(root: Path, *, status: str = "FINISHED") -> Journal:
    """Write a run in which UCSA is twice as fast as dense attention and as accurate."""
    journal = Journal.create(root, RunInfo.capture("quick", 0, "danon bench", MACHINE))
    same = {"size": 16}  # of one configuration, or there would be no verdict
    for name, (ratio, right) in KINDS.items():
        case = Case("speed", name, 1024, "float32", "forward")
        interval = {"time_ratio_low": 0.9 * ratio, "time_ratio_high": 1.1 * ratio}
        figures = {"time_s": ratio, "time_ratio": ratio, **interval}
        journal.append(CaseResult(case, "measured", metrics=figures, config=same))
        case = Case("memory", name, 1024, "float32", "forward")
        journal.append(CaseResult(case, "measured", metrics={"peak_bytes": 1e6}, config=same))
        case = Case("pretrained", name, 1024, "float32", "forward", heads=1, task="lookup")
        answers = {"answers": 4096.0, "lost_answers": 0.0, "gained_answers": 0.0}
        figures = {"accuracy": right, **answers}
        journal.append(CaseResult(case, "measured", metrics=figures, config=same))
    journal.set_status(status)  # type: ignore[arg-type]
    return journal


def in_run(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(run_dir: Path) -> None:
        place = run_dir / "run.json"
        values = json.loads(place.read_text())
        change(values)
        place.write_text(json.dumps(values))

    return damage


def in_case(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """In the first line, the speed of dense attention."""

    def damage(run_dir: Path) -> None:
        place = run_dir / "cases.jsonl"
        first, *rest = place.read_text().splitlines()
        values = json.loads(first)
        change(values)
        place.write_text("\n".join((json.dumps(values), *rest, "")))

    return damage


def cut(name: str, characters: int, end: str = "") -> Callable[[Path], None]:
    def damage(run_dir: Path) -> None:
        text = (run_dir / name).read_text()
        (run_dir / name).write_text(text[:characters] + end)

    return damage


def a_folder(run_dir: Path) -> None:
    (run_dir / "cases.jsonl").unlink()
    (run_dir / "cases.jsonl").mkdir()


DAMAGES = {
    "later version": (
        in_run(lambda run: run.update(schema=2)),
        "/run.json: has schema 2; this danon reads schema 1",
    ),
    "no version": (
        in_run(lambda run: run.pop("schema")),
        "/run.json: has no version of its schema; this danon reads schema 1",
    ),
    "unknown field": (
        in_run(lambda run: run["info"].update(color="red")),
        "/run.json: info -> color: Unexpected keyword argument",
    ),
    "unknown run status": (
        in_run(lambda run: run.update(status="LOST")),
        "/run.json: status: Input should be 'RUNNING', 'FINISHED', 'FAILED' or 'KILLED'",
    ),
    "date": (
        in_run(lambda run: run["info"].update(started="yesterday")),
        "/run.json: info -> started = 'yesterday': must be a date",
    ),
    "cut-off run": (cut("run.json", 100), "/run.json: not whole JSON"),
    "no text": (
        lambda run_dir: (run_dir / "run.json").write_bytes(b"\xff\xfe"),
        "/run.json: not whole JSON",
    ),
    "cut-off case": (cut("cases.jsonl", 100, "\n"), "/cases.jsonl, line 1: the file: Invalid JSON"),
    "ratio of 0": (
        in_case(lambda case: case["metrics"].update(time_ratio=0)),
        "/cases.jsonl, line 1: metrics -> time_ratio = 0: must be positive",
    ),
    "bound of 0": (
        in_case(lambda case: case["metrics"].update(time_ratio_low=0)),
        "/cases.jsonl, line 1: metrics -> time_ratio_low = 0: must be positive",
    ),
    "metric in words": (
        in_case(lambda case: case["metrics"].update(time_s="fast")),
        "/cases.jsonl, line 1: metrics -> time_s: Input should be a valid number",
    ),
    "unknown status": (
        in_case(lambda case: case.update(status="skipped")),
        "/cases.jsonl, line 1: status: Input should be 'measured', 'unavailable'",
    ),
    "unknown phase": (
        in_case(lambda case: case["case"].update(phase="backward")),
        "/cases.jsonl, line 1: case -> phase: Input should be 'forward', 'forward+backward'",
    ),
    "check in words": (
        in_case(lambda case: case.update(check={"error": "small"})),
        "/cases.jsonl, line 1: check -> error = 'small': must be a number",
    ),
    "unknown task": (
        in_case(lambda case: case["case"].update(suite="pretrained", task="chess")),
        ": pretrained/chess/sdpa/N1024/float32/forward/cpu: task 'chess': must be one of adapted,",
    ),
    "no file": (a_folder, "/cases.jsonl: Is a directory"),
}


def danon(*arguments: object) -> Result:
    """Run the command, and fail the test on a traceback."""
    done = CliRunner().invoke(app, [str(x) for x in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def choose(runs: Path) -> Result:
    asked = ("--length", 1024, "--memory-gb", 1, "--task", "lookup")
    return danon("choose", "--results", runs, *asked)


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """Return the folder of a damaged run, and the message expected about it."""
    damage, said = DAMAGES[request.param]
    journal = record(tmp_path / "runs", status="KILLED")
    place = journal.run_dir.rename(tmp_path / "runs" / "29991231T235959Z-abcdef")  # the last
    damage(place)
    return place, f"{place}{said}"


def test_damaged_run_given_by_name(damaged: tuple[Path, str]) -> None:
    place, said = damaged
    for command in ("report", "record"):
        done = danon(command, place)
        assert done.exit_code == 2 and said in done.output


def test_damaged_run_as_the_only_one(damaged: tuple[Path, str]) -> None:
    place, said = damaged
    done = danon("report", "--results", place.parent)
    assert done.exit_code == 2 and said in done.output
    assert f"no run can be read under {place.parent}" in done.output
    done = choose(place.parent)
    assert done.exit_code == 2 and f"no recorded run can be read: {said}" in done.output


def test_damaged_run_beside_others(damaged: tuple[Path, str]) -> None:
    place, said = damaged
    record(place.parent)
    done = choose(place.parent)
    assert done.exit_code == 0 and f"passed over: {said}" in done.output
    assert "ucsa: 2.00" in done.output and "times as fast" in done.output, done.output


@pytest.mark.parametrize("damaged", ["cut-off run", "ratio of 0"], indirect=True)
def test_report_after_a_damaged_run(damaged: tuple[Path, str]) -> None:
    place, said = damaged
    good = record(place.parent)
    done = danon("report", "--results", place.parent)
    assert done.exit_code == 0 and f"passed over: {said}" in done.output
    assert (good.run_dir / "report.html").is_file()


def test_resume_after_a_damaged_run(
    damaged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    place, said = damaged
    killed = record(place.parent, status="KILLED")
    options = Options("quick", "cpu", (), "", "", place.parent, True, "danon bench")
    console = Console(file=io.StringIO(), width=300)
    assert Session(options, console).open(MACHINE) == killed.run_dir
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"passed over: {said}" in shown
    assert f"Resuming {killed.info().run_id}: 6 cases" in shown


def test_torn_last_line(tmp_path: Path) -> None:
    journal = record(tmp_path)
    place = journal.run_dir / "cases.jsonl"
    place.write_text(place.read_text()[:-20])
    (run,) = readable_runs((tmp_path,), pytest.fail)
    assert len(run.results) == 5


def test_folder_without_runs(tmp_path: Path) -> None:
    assert readable_runs((tmp_path, tmp_path / "nowhere"), pytest.fail) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    with pytest.raises(SchemaError, match=r"no recorded run can be read: .*/a/run\.json: has no"):
        readable_runs((tmp_path,), str)


def test_hybrid_selects_by_readable_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record_figures(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text('{"schema": 2}')
    with caplog.at_level(logging.WARNING):
        assert len(measurements.load(tmp_path)) == 1
    assert f"passed over: {tmp_path}/b/run.json: not a recorded run" in caplog.text
    (tmp_path / "a" / "run.json").unlink()
    with pytest.raises(ValueError, match="schema 2; this danon reads schema 1"):
        measurements.load(tmp_path)


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    run_dir = record(tmp_path).run_dir
    (run_dir / "report.html").mkdir()
    done = danon("report", run_dir)
    assert done.exit_code == 74 and "report.html" in done.output


STRANGE = (None, 0, -1, 1e308, float("nan"), float("inf"), "", "x", True, [], [1], {}, {"a": 1})


def places(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys and indices that lead to everything in some JSON."""
    parts = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in parts if isinstance(values, dict | list) else ():
        yield (*above, key)
        yield from places(value, (*above, key)) if isinstance(value, dict | list) else ()


def replaced(values: Any, place: tuple[Any, ...], value: object) -> Any:
    """Return a copy with another value at this path of keys."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


@pytest.mark.slow
def test_random_values_are_refused_or_shown(tmp_path: Path) -> None:
    """Files that pass the check end no reader."""
    run_dir = record(tmp_path).run_dir
    head = json.loads((run_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "cases.jsonl").read_text().splitlines()]
    everything = {"run": head, "cases": lines}
    wrong = [(p, x) for p in places(everything) if p[0] == "run" or len(p) > 2 for x in STRANGE]
    refused = list[str]()
    for place, value in random.Random(0).sample(wrong, 300):
        found = replaced(everything, place, value)
        (run_dir / "run.json").write_text(json.dumps(found["run"]))
        text = "".join(f"{json.dumps(case)}\n" for case in found["cases"])
        (run_dir / "cases.jsonl").write_text(text)
        try:
            (run,) = readable_runs((tmp_path,), refused.append)
        except SchemaError:
            continue
        render(run.results, run.info, Console(file=io.StringIO(), width=150))
        choose(tmp_path)
    assert 50 < len(refused) < 290
