"""The command ``danon compare``: bad input, exit statuses, what goes to which stream."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from simulated_runs import QUIET, REFERENCE_RUN, measured_again, slower, stored
from typer.testing import CliRunner, Result

from danon.cli.app import app
from danon.runs.journal import Journal, RecordedRun

REFERENCE = REFERENCE_RUN.parent


def danon(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "100"})


def written(folder: Path, run: RecordedRun, status: str = "FINISHED") -> Path:
    """Write a run to a folder of runs, and return its own folder."""
    journal = Journal.create(folder, run.info)
    for result in run.results:
        journal.append(result)
    journal.set_status(status)  # type: ignore[arg-type]
    return journal.run_dir


def test_nothing_moved(tmp_path: Path) -> None:
    written(tmp_path, stored())
    written(tmp_path, measured_again(3, QUIET))
    done = danon(stored().info.run_id, "again-3", "--results", tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "Largest changes, all within noise" in done.stdout


def test_a_case_that_moved(tmp_path: Path) -> None:
    run = measured_again(3, QUIET)
    results = [
        slower(x, 2.0) if x.case.attention == "ucsa" and x.samples else x for x in run.results
    ]
    other = written(tmp_path, dataclasses.replace(run, results=results))
    page = tmp_path / "page.html"
    done = danon(REFERENCE_RUN, other, "--html", page)
    assert done.exit_code == 1
    assert "ucsa" in done.stdout
    assert page.is_file()
    done = danon(REFERENCE_RUN, other, "--attention", "ucsa", "--json")
    values = json.loads(done.stdout)
    assert {x["case"].split("/")[1] for x in values["figures"]} == {"ucsa"}


def test_two_attentions_of_one_run() -> None:
    done = danon(REFERENCE_RUN, "--attention", "ucsa", "--with", "window")
    assert done.exit_code == 1
    assert "ucsa window" in " ".join(done.stdout.split())


def test_two_machines() -> None:
    done = danon(REFERENCE / "cpu-quick", REFERENCE / "cpu-quick-amx")
    assert done.exit_code == 2
    assert "nothing can be compared: 318 measured on different machines" in done.stderr
    assert "differs: cpu AMD EPYC and Intel" in done.stdout
    assert "longformer" in done.stdout  # the figures are shown all the same


def test_two_devices(tmp_path: Path) -> None:
    run = measured_again(0, QUIET)
    results = [
        dataclasses.replace(x, case=dataclasses.replace(x.case, device="cuda")) for x in run.results
    ]
    facts = {**run.info.fingerprint, "id": "other", "device": "cuda"}
    info = dataclasses.replace(run.info, fingerprint=facts)
    other = written(tmp_path, dataclasses.replace(run, results=results, info=info))
    done = danon(REFERENCE_RUN, other)
    assert done.exit_code == 2
    assert "the runs are of two devices, cpu and cuda" in done.stderr


def test_a_killed_run(tmp_path: Path) -> None:
    run = measured_again(0, QUIET)
    other = written(tmp_path, dataclasses.replace(run, results=run.results[:60]), "KILLED")
    with (other / "cases.jsonl").open("a", encoding="utf-8") as journal:
        journal.write('{"case": {"attent')
    done = danon(REFERENCE_RUN, other)
    assert done.exit_code == 0
    assert "the second run is KILLED: it may lack cases" in done.stdout
    assert "only in the first run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((REFERENCE_RUN, REFERENCE_RUN), "is given twice: name two different runs"),
        ((REFERENCE_RUN,), "name a second run, or two attentions: --attention A --with B"),
        ((REFERENCE_RUN, "--with", "ucsa"), "name a second run, or two attentions"),
        ((REFERENCE_RUN, REFERENCE / "cpu-quick", "--with", "ucsa"), "two runs are given"),
        ((REFERENCE_RUN,) * 3, "3 runs are given"),
        ((REFERENCE_RUN, "nowhere"), "nowhere is no recorded run: neither a folder nor"),
        ((REFERENCE_RUN, "--attention", "ucsa", "--with", "ucsa"), "given twice"),
        (
            (REFERENCE_RUN, REFERENCE / "cpu-quick", "--attention", "nope"),
            "attention 'nope' is not recorded; recorded: sdpa, ",
        ),
    ],
)
def test_bad_input(arguments: tuple[object, ...], said: str) -> None:
    done = danon(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_an_older_schema(tmp_path: Path) -> None:
    other = written(tmp_path, measured_again(0, QUIET))
    stored_run = json.loads((other / "run.json").read_text(encoding="utf-8"))
    (other / "run.json").write_text(json.dumps({**stored_run, "schema": 0}), encoding="utf-8")
    done = danon(REFERENCE_RUN, other)
    assert done.exit_code == 2
    assert "has schema 0; this danon reads schema 1" in done.stderr


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    written(tmp_path, measured_again(0, QUIET))
    done = danon("nowhere", REFERENCE_RUN, "--results", tmp_path)
    assert "the last are again-0" in done.stderr
