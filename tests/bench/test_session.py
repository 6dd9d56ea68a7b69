"""A session of the command: outcomes, tracebacks, and runs that are resumed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from danon.attention.discovery import discover
from danon.bench import attempts
from danon.bench.progress import Display
from danon.bench.session import Options, ResumeError, Session
from danon.runs import failures
from danon.runs.case import Case, CaseResult

CASE = Case("speed", "sdpa", 64, "float32", "forward")
HERE = {"id": "here", "cpu": "a", "device": "cpu", "threads": "1"}


def measured(case: Case = CASE) -> CaseResult:
    return CaseResult(case, "measured", metrics={"time_s": 1.0})


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    discover((), ())


def options(folder: Path, **changes: Any) -> Options:
    values = {
        "profile": "smoke",
        "device": "cpu",
        "attentions": (),
        "only": "",
        "suites": "",
        "results": folder,
        "resume": False,
        "command": "danon bench",
        **changes,
    }
    return Options(**values)


@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_store")
class TestSession:
    def test_planned_case_without_an_outcome_is_an_error(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        session = Session(options(tmp_path), console)
        session.open(HERE, {}, [CASE.id, "speed/lost/N64/float32/forward/cpu"])
        session.keep(measured())
        assert session.close((), "", 0) == 2
        said = console.export_text()
        assert "no outcome speed/lost/N64/float32/forward/cpu" in said
        assert "1 of 2 planned cases have no outcome" in said
        assert session.journal is not None and session.journal.status == "FAILED"

    def test_traceback_in_folder_and_report(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        session = Session(options(tmp_path), console)
        run_dir = session.open(HERE)
        with Display(console) as display:
            text = "Traceback <b>\nValueError: no"
            session.handle({"event": "trace", "case": CASE.id, "text": text}, display)
            failed = CaseResult(CASE, "failed", "ValueError: no (mine.py:3)")
            session.handle({"event": "result", "result": failed.to_json()}, display)
        assert session.close((), "", 0) == 1
        (file,) = (run_dir / failures.FOLDER).iterdir()
        assert file.name == "speed-sdpa-N64-float32-forward-cpu.txt" and file.read_text() == text
        page = (run_dir / "report.html").read_text()
        assert "Traceback &lt;b&gt;" in page and "ValueError: no (mine.py:3)" in page
        said = console.export_text()
        assert "failed speed/sdpa/N64/float32/forward/cpu: ValueError: no (mine.py:3)" in said
        assert str(run_dir / failures.FOLDER) in said

    def test_resume_requires_the_same_options_and_code(self, tmp_path: Path) -> None:
        basis = {"code of danon": "sha256:a", "attentions": "sdpa, Mine", "file mine": "sha256:b"}
        first = Session(options(tmp_path), Console(file=io.StringIO()))
        run_dir = first.open(HERE, basis)
        assert first.journal is not None
        first.journal.set_status("KILLED")

        def resumed(machine: dict[str, str], now: dict[str, str], **changes: Any) -> Path:
            again = options(tmp_path, resume=True, **changes)
            return Session(again, Console(file=io.StringIO())).open(machine, now)

        for machine, now, changes, words in (
            (HERE, basis | {"code of danon": "sha256:c"}, {}, "differs in: code of danon. Without"),
            (HERE, basis | {"attentions": "sdpa"}, {}, r"attentions \(was sdpa, Mine, is sdpa\)"),
            (HERE, basis | {"file mine": "sha256:d"}, {}, "file mine"),
            (HERE, {}, {}, r"attentions \(was sdpa, Mine, is none\); code of danon; file mine"),
            (HERE | {"cpu": "b"}, basis, {}, r"cpu \(was a, is b\)"),
            (HERE, basis, {"profile": "quick"}, r"profile \(was smoke, is quick\)"),
        ):
            with pytest.raises(ResumeError, match=words):
                resumed(machine, now, **changes)
        assert list(tmp_path.iterdir()) == [run_dir], "nothing new has begun"
        assert resumed(HERE, basis) == run_dir

    def test_resume_keeps_the_threads_of_the_run(self, tmp_path: Path) -> None:
        first = Session(options(tmp_path), Console(file=io.StringIO()))
        run_dir = first.open(HERE, {}, most_threads=2)
        assert first.journal is not None and first.threads == 1
        first.journal.set_status("KILLED")
        console = Console(record=True, width=200, file=io.StringIO())
        again = Session(options(tmp_path, resume=True), console)
        assert again.open(HERE | {"threads": "2"}, {}, most_threads=2) == run_dir
        assert again.threads == 1 and "busy" not in console.export_text()
        first.journal.set_status("KILLED")
        (run_dir / "run.json").write_text(
            (run_dir / "run.json").read_text().replace('"threads": "1"', '"threads": "4"')
        )
        with pytest.raises(ResumeError, match=r"threads \(was 4, is 2\)"):
            again.open(HERE | {"threads": "2"}, {}, most_threads=2)

    def test_fewer_threads_are_reported_at_the_start(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        Session(options(tmp_path), console).open(HERE, {}, most_threads=2)
        said = console.export_text()
        assert (
            "Another program keeps this machine busy: all cases are timed with 1 of 2 threads"
            in said
        )
        assert "OMP_NUM_THREADS=2" in said

    def test_case_that_kills_the_bench_is_given_up(self, tmp_path: Path) -> None:
        first = Session(options(tmp_path), Console(file=io.StringIO()))
        run_dir = first.open(HERE)
        assert first.journal is not None
        for rows in (0, 1):  # the first time may be anybody's
            attempts.begin(run_dir, replace(CASE, length=128))
            attempts.end(run_dir)
            for _ in range(rows + 1):  # begun, and the bench is killed
                attempts.begin(run_dir, CASE)
            first.journal.set_status("KILLED")
            again = Session(options(tmp_path, resume=True), Console(file=io.StringIO()))
            assert again.open(HERE) == run_dir
            assert len(first.journal.results()) == rows
        (row,) = first.journal.results()
        assert (row.case, row.status) == (CASE, "failed")
        assert row.reason == "the bench as a whole was killed at this case 2 times"

    def test_resume_without_a_killed_run(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        Session(options(tmp_path, resume=True), console).open(HERE, {})
        assert "was killed before its end; a new run begins" in console.export_text()
