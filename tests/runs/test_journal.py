"""The journal of a run: every case is kept once, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded_cases import measured, some_results

from danon.runs import files
from danon.runs.journal import LOCK, Journal
from danon.runs.run_info import RunInfo

ROOT = Path(__file__).parents[2]


def test_last_line_of_a_repeated_case(journal: Journal, info: RunInfo) -> None:
    for result in some_results():
        journal.append(result)
    again = measured("sdpa", 1024, speedup=2.5)
    journal.append(again)
    reopened = Journal(journal.run_dir)
    assert reopened.results() == [again, *some_results()[1:]]
    assert reopened.info() == info


def test_torn_last_line(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third, *_ = some_results()
    journal.append(first)
    with (journal.run_dir / "cases.jsonl").open("ab") as file:
        file.write(second.to_json().encode()[:40])
    resumed = Journal(journal.run_dir)
    assert resumed.results() == [first]
    assert "the last line is incomplete (40 bytes" in caplog.text
    resumed.append(third)
    assert resumed.results() == [first, third]


def test_damaged_line_in_the_middle(journal: Journal) -> None:
    journal.append(some_results()[0])
    with (journal.run_dir / "cases.jsonl").open("ab") as file:
        file.write(b'{"case": {"suite": "speed"}}\n')
    with pytest.raises(ValueError, match=r"cases\.jsonl, line 2: case -> attention: Field"):
        journal.results()


BUSY = """
import sys
from pathlib import Path
from danon.runs.journal import Journal, RunInfo

journal = Journal.create(Path(sys.argv[1]), RunInfo.capture("quick", 0, "bench", {}))
print(journal.run_dir, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Yield a process that has created a journal and still runs, and the journal's folder."""
    command = [sys.executable, "-c", BUSY, str(tmp_path / "runs")]
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=known) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_status_while_the_owner_lives_and_after_its_end(
    busy: tuple[subprocess.Popen[str], Path],
) -> None:
    process, run_dir = busy
    path = run_dir / "run.json"
    content = json.loads(path.read_text())
    assert content["owner"]["pid"] == process.pid
    content["owner"]["pid"] = 2**22 + 1  # as another container numbers it: none here has that
    path.write_text(json.dumps(content))
    journal = Journal(run_dir)
    assert journal.status == "RUNNING"
    with pytest.raises(OSError, match="another process runs this") as caught:
        journal.set_status("RUNNING")
    assert caught.value.errno in files.UNWRITABLE and caught.value.filename == str(run_dir)
    process.kill()
    process.wait()
    assert journal.status == "KILLED"
    journal.set_status("RUNNING")
    assert journal.status == Journal(run_dir).status == "RUNNING"
    assert journal.owner().pid == os.getpid()
    journal.set_status("FINISHED")
    assert journal.status == "FINISHED"
    with pytest.raises(ValueError, match="'DONE': must be one of RUNNING, FINISHED"):
        journal.set_status("DONE")  # type: ignore[arg-type]


def test_status_of_a_run_of_another_host(journal: Journal) -> None:
    path = journal.run_dir / "run.json"
    content = json.loads(path.read_text())
    content["owner"]["host"] = "elsewhere"
    path.write_text(json.dumps(content))
    (journal.run_dir / LOCK).unlink()  # which a file system may not show other machines
    assert journal.status == "RUNNING"


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it has no run\.json"):
        Journal(tmp_path)
