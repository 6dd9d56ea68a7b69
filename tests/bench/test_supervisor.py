"""Supervision of the suites' processes: dead and silent ones are replaced, their cases fail."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from danon.bench import attempts
from danon.bench import supervisor as module
from danon.bench.cluster_job import AttentionJob
from danon.bench.supervisor import MAX_EXITS, Supervisor
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from suites.profiles import PROFILES

CASE = Case("speed", "sdpa", 64, "float32", "forward")
HERE = {"id": "here", "cpu": "a", "device": "cpu", "threads": "1"}


def measured(case: Case = CASE) -> CaseResult:
    return CaseResult(case, "measured", metrics={"time_s": 1.0})


class Process:
    """A stand-in for the suites' process: given reports, then a given end.

    Attributes:
        answers: answers to its reports.
        options: options of the suites.
    """

    scripts: list[tuple[list[dict[str, Any]], int | None]]
    begun: list[Process]

    def __init__(self, options: Sequence[str], scratch: Path) -> None:
        self.options = tuple(options)
        events, self.status = self.scripts[len(self.begun)]
        self._events = iter(events)
        self.answers: list[dict[str, Any]] = []
        self.log = self.benchmark = scratch / "none"
        self.running = False
        self.begun.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def event(self, limit_s: float | None) -> dict[str, Any] | None:
        for event in self._events:
            return event
        if self.status is None:
            return None
        raise EOFError

    def answer(self, **values: Any) -> None:
        self.answers.append(values)

    def abort(self) -> None:
        self.status = -signal.SIGABRT

    def stop(self) -> None: ...

    def wait(self) -> int:
        return self.status or 0

    def tail(self, lines: int = 15) -> str:
        return (
            "Current thread 0x1 (most recent call first):\n"
            f'  File "{torch.__file__}", line 2 in call\n  File "/home/mine.py", line 25 in harm\n'
        )

    @staticmethod
    def finished(status: int) -> bool:
        return status in (0, 1, 5)


CASES = [replace(CASE, attention=name, length=n) for n in (64, 128, 256, 512) for name in "ab"]


def plan() -> dict[str, Any]:
    return {
        "event": "plan",
        "described": [asdict(case) for case in CASES],
        "cases": [(case.id, 1.0) for case in CASES],
        "fingerprint": HERE,
        "basis": {},
    }


def begin(case: Case) -> dict[str, Any]:
    return {"event": "begin", "case": case.id, "described": asdict(case), "limit_s": 7.0}


def through(*cases: Case) -> list[dict[str, Any]]:
    return [
        event
        for case in cases
        for event in (
            begin(case),
            {"event": "result", "result": measured(case).to_json()},
            {"event": "done", "case": case.id},
        )
    ]


FINISHED = {"event": "finished", "status": 0}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Supervisor, list[dict[str, Any]], Journal]]:
    def go(
        *scripts: tuple[list[dict[str, Any]], int | None],
    ) -> tuple[Supervisor, list[dict[str, Any]], Journal]:
        monkeypatch.setattr(Process, "scripts", list(scripts), raising=False)
        monkeypatch.setattr(Process, "begun", [], raising=False)
        monkeypatch.setattr(module, "SuiteProcess", Process)
        journal = Journal.create(tmp_path, RunInfo.capture("smoke", 0, "danon bench", HERE))
        heard = []
        with Supervisor((), tmp_path) as suites:
            for event in suites.events():
                heard.append(event)
                if event["event"] == "plan":
                    suites.go(journal, 1)
                elif event["event"] == "result":
                    journal.append(CaseResult.from_json(event["result"]))
                    suites.stored()
        return suites, heard, journal

    return go


class TestSupervisor:
    def row(self, journal: Journal, case: Case) -> CaseResult:
        (found,) = (result for result in journal.results() if result.case == case)
        return found

    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            (-signal.SIGSEGV, "the process died by SIGSEGV (mine.py:25)"),
            (-signal.SIGKILL, "the process died by SIGKILL (mine.py:25)"),
            (0, "the process ended itself with status 0 (mine.py:25)"),
            (None, "no answer within 7 s (mine.py:25)"),
        ],
    )
    def test_fatal_case_fails_and_others_are_measured(
        self, run: Any, status: int | None, reason: str
    ) -> None:
        first, fatal, *others = CASES
        suites, heard, journal = run(
            ([plan(), *through(first), begin(fatal)], status),
            ([plan(), *through(*others), {"event": "done", "case": first.id}, FINISHED], 0),
        )
        assert suites.failure == ""
        row = self.row(journal, fatal)
        assert (row.status, row.reason) == ("failed", reason)
        assert {result.case for result in journal.results()} == set(CASES)
        assert [event["event"] for event in heard].count("plan") == 1
        done = [event["case"] for event in heard if event["event"] == "done"]
        assert sorted(done) == sorted(case.id for case in CASES), "each once"
        (trace,) = (event["trace"] for event in heard if event.get("trace"))
        assert fatal.id in trace and "mine.py" in trace
        first = [process.answers[0] for process in Process.begun]
        assert first == 2 * [{"run": str(journal.run_dir), "threads": 1}], "all with as many"
        assert not (journal.run_dir / attempts.FILE).exists(), "the bench has outlived it"

    def test_kill_for_memory_is_distinguished(
        self, run: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kills = iter((3, 4, 4, 4))
        monkeypatch.setattr(module, "_memory_kills", lambda: next(kills))
        _, _, journal = run(([plan(), begin(CASES[0])], -signal.SIGKILL), ([plan(), FINISHED], 0))
        assert "killed for memory (SIGKILL)" in self.row(journal, CASES[0]).reason

    def test_innermost_case_fails(self, run: Any) -> None:
        outer, inner = CASES[:2]
        _, _, journal = run(
            ([plan(), begin(outer), begin(inner)], -signal.SIGABRT),
            ([plan(), *through(outer), FINISHED], 0),
        )
        assert self.row(journal, inner).status == "failed"
        assert self.row(journal, outer).status == "measured"

    def test_attention_with_repeated_deaths_is_given_up(self, run: Any) -> None:
        mine = [case for case in CASES if case.attention == "a"]
        scripts = [([plan(), begin(case)], -signal.SIGSEGV) for case in mine[:MAX_EXITS]]
        _, _, journal = run(*scripts, ([plan(), FINISHED], 0))
        last = self.row(journal, mine[MAX_EXITS])
        assert last.reason.startswith(f"not tried: the process ended {MAX_EXITS} times with this")
        assert {result.case.attention for result in journal.results()} == {"a"}

    def test_death_before_the_plan(self, run: Any) -> None:
        what = "attention 'mine.py:Mine' is imported"
        suites, heard, _ = run(([{"event": "prepare", "what": what}], None))
        limit = f"no answer within {module.PREPARE_LIMIT_S:.0f} s"
        assert suites.failure == f"{what}: {limit} (mine.py:25)"
        assert not heard

    def test_leaving_process_is_replaced_without_a_row(self, run: Any) -> None:
        _, _, journal = run(
            ([plan(), *through(CASES[0]), {"event": "leaving"}], 0),
            ([plan(), *through(*CASES[1:]), FINISHED], 0),
        )
        assert {result.status for result in journal.results()} == {"measured"}

    def test_death_between_cases_is_reported_and_bounded(self, run: Any) -> None:
        scripts = [([plan(), *through(CASES[0])], -signal.SIGSEGV) for _ in range(MAX_EXITS)]
        suites, heard, journal = run(*scripts, ([plan(), FINISHED], 0))
        assert any("was replaced after speed/a/N64" in event.get("text", "") for event in heard)
        assert self.row(journal, CASES[0]).status == "measured"
        assert self.row(journal, CASES[2]).status == "failed"

    def test_wait_for_another_bench_has_no_limit(self) -> None:
        progress = module._ProcessProgress()
        progress.hear({"event": "waiting"})
        assert progress.limit_s is None
        progress.hear({"event": "going"})
        assert progress.limit_s == module.PREPARE_LIMIT_S

    def test_time_limit_of_a_case(self) -> None:
        profile = PROFILES["quick"]
        assert profile.limit(CASE) == 15 * profile.cap_s
        (training,) = profile.plans_of("recall")[:1]
        case = replace(CASE, suite="recall", length=training.lengths[0], task=training.task)
        assert profile.limit(case) == 5 * training.cap_s + 15 * profile.cap_s


def test_cluster_job_replaces_dead_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, fatal, *others = CASES
    scripts = [
        ([plan(), *through(first), begin(fatal)], -signal.SIGSEGV),
        ([plan(), *through(*others), FINISHED], 0),
    ]
    monkeypatch.setattr(Process, "scripts", scripts, raising=False)
    monkeypatch.setattr(Process, "begun", [], raising=False)
    monkeypatch.setattr(module, "SuiteProcess", Process)
    info = RunInfo.capture("smoke", 0, "danon bench", HERE)
    place = {"host": "a", "node": "1"}
    heard = list(AttentionJob((), "a", info, ()).events(place))
    rows = [event for event in heard if event["event"] == "result"]
    found = {CaseResult.from_json(event["result"]).case: event for event in rows}
    assert set(found) == set(CASES) and heard[-1]["status"] == 0
    assert found[fatal]["place"] == {**place, "machine": HERE}
    assert "SIGSEGV" in CaseResult.from_json(found[fatal]["result"]).reason
