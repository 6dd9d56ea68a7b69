"""Files that commands write: a full disk, a folder that is not there."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from simulated_runs import REFERENCE_RUN
from typer.testing import CliRunner, Result

from danon.cli.app import app
from danon.console import exit_status
from danon.runs import files
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal

PAIR = (REFERENCE_RUN, "--attention", "ucsa", "--with", "window")


def danon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def run_dir(journal: Journal) -> Path:
    """Create a run of one case."""
    case = Case("speed", "sdpa", 64, "float32", "forward")
    metrics = {"time_s": 1e-3, "time_ratio": 1.0, "speedup": 1.0}
    journal.append(CaseResult(case, "measured", "", "exact", metrics, {"candidate_s": [1e-3]}))
    journal.set_status("FINISHED")
    return journal.run_dir


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no room for a file that is replaced."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)


def check_printed(done: Result, file: Path, words: str) -> None:
    """Check that what was measured is printed although a file could not be written."""
    assert done.exit_code == exit_status.NOT_WRITTEN, (done.stderr, done.exception)
    assert words in done.stdout and str(file) not in done.stdout
    assert done.stderr == f"danon: [Errno 28] No space left on device: '{file}'\n"
    assert not file.exists()


class TestFullDisk:
    def test_report(self, run_dir: Path, full_disk: None) -> None:
        check_printed(danon("report", run_dir), run_dir / "report.html", "sdpa")

    def test_page_of_a_comparison(self, tmp_path: Path, full_disk: None) -> None:
        page = tmp_path / "page.html"
        check_printed(danon("compare", *PAIR, "--html", page), page, "ucsa")
        done = danon("compare", *PAIR, "--html", page, "--json")
        check_printed(done, page, "ucsa")
        assert json.loads(done.stdout)["figures"]


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        (("report",), "picture.pdf", "must end in .png"),
        (("report",), "no/picture.png", "there is no folder"),
        (("compare",), "no/page.html", "there is no folder"),
        (("compare",), "", "is a folder, not a file"),
    ],
)
def test_file_that_cannot_be_written(
    command: tuple[str], name: str, words: str, run_dir: Path, tmp_path: Path
) -> None:
    option, runs = ("--html", PAIR) if command == ("compare",) else ("--picture", (run_dir,))
    done = danon(*command, *runs, option, tmp_path / name)
    assert (done.exit_code, done.stdout) == (exit_status.REFUSED, "")
    assert f"{option} {tmp_path / name}: {words}" in done.stderr


def test_name_that_is_too_long(tmp_path: Path) -> None:
    done = danon("compare", *PAIR, "--html", tmp_path / f"{'x' * 300}.html")
    assert done.exit_code == exit_status.NOT_WRITTEN and "File name too long" in done.stderr


def test_run_given_as_a_folder_needs_no_results(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = danon("report", run_dir, "--results", file)
    assert done.exit_code == exit_status.DONE and "sdpa" in done.stdout
    done = danon("report", run_dir.name, "--results", file)
    assert done.exit_code == exit_status.REFUSED and "is a file, not a folder" in done.stderr
