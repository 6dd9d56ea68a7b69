"""Progress of a bench: lines without a terminal, a table that fills in on one."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from rich.text import Text

from danon.bench import progress
from danon.bench.progress import Display, describe_result
from danon.runs.case import Case, CaseResult, Status

CASE = Case("speed", "ucsa", 16384, "bfloat16", "forward")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("danon.bench.progress.time.monotonic", lambda: now[0])
    return now


def measured(case: Case = CASE, status: Status = "measured", **metrics: float) -> CaseResult:
    return CaseResult(case, status, "no room" if status != "measured" else "", metrics=metrics)


class TestTimeLeft:
    def test_measured_cases_outweigh_the_forecast(self, clock: list[float]) -> None:
        display = Display(Console(file=io.StringIO()))
        display.plan([("first", 10.0), ("second", 30.0)])
        assert "0/2 cases, 0:40 left" in display.line()
        clock[0] += 20  # twice as long as expected
        display.done("first", reused=False)
        # 24 of the 14 expected seconds, the 4 that count from the start included
        assert display.line().startswith("1/2 cases, 0:51 left")

    def test_cases_of_an_earlier_session_do_not_count(self, clock: list[float]) -> None:
        display = Display(Console(file=io.StringIO()))
        display.plan([("reused", 500.0), ("short", 10.0), ("long", 40.0)])
        display.done("reused", reused=True)
        assert display.line().startswith("1/3 cases, 0:50 left")
        clock[0] += 10
        display.done("short", reused=False)
        assert display.line().startswith("2/3 cases, 0:40 left")

    def test_cases_alike_are_unavailable_too(self) -> None:
        display = Display(Console(file=io.StringIO()))
        first = Case("speed", "gla", 1024, "bfloat16", "forward")
        later = [
            Case("speed", "gla", 4096, "bfloat16", "forward"),
            Case("speed", "gla", 4096, "float32", "forward+backward"),
            Case("speed", "gla-fast", 4096, "bfloat16", "forward"),
            Case("memory", "gla", 4096, "bfloat16", "forward"),
        ]
        display.plan([(case.id, 10.0) for case in (first, *later)])
        display.measured(measured(first, "unavailable"), lambda: "")
        assert [display._weights[case.id] for case in (first, *later)] == [0.05, 0.05, 10, 10, 10]


def wait_for(sink: io.StringIO, text: str) -> None:
    """Wait until a text is printed: the machine may be busy."""
    deadline = time.monotonic() + 30
    while text not in sink.getvalue():
        assert time.monotonic() < deadline, sink.getvalue()
        time.sleep(0.005)


class TestLines:
    def test_lines_come_without_any_event(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "LINE_S", 0.02)
        sink = io.StringIO()
        with Display(Console(width=100, file=sink)) as display:
            wait_for(sink, "preparing: importing torch")
            display.plan([("a case", 600.0)])
            display.begin("a case")
            wait_for(sink, "1 cases, 10:00 expected")
            wait_for(sink, " left; now: a case")
            display.measured(measured(time_ratio=0.3125), lambda: pytest.fail("no terminal"))
            wait_for(sink, " left; last: speed of ucsa at 16k: 3.20 times as fast as dense")

    def test_no_line_follows_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "LINE_S", 0.01)
        sink = io.StringIO()
        with Display(Console(file=sink)) as display:
            wait_for(sink, "preparing")
        before = sink.getvalue()
        time.sleep(0.05)
        assert sink.getvalue() == before and not display._lines.is_alive()


def test_wait_for_another_bench() -> None:
    display = Display(Console(file=io.StringIO()))
    display.wait(waiting=True)
    assert display.line() == "waiting for another bench or study on this machine"
    display.plan([("a", 10.0)])
    assert (
        display.line() == "0/1 cases, 0:10 left; waiting for another bench or study on this machine"
    )
    display.wait(waiting=False)
    display.begin("a")
    assert display.line().endswith("; now: a")


def test_table_fills_in_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Display(console) as display:
        display.plan([("a", 1.0), ("b", 1.0)])
        display.measured(measured(), lambda: Text("the table so far"))
        display.done("a", reused=False)
        display._live.refresh()
    assert "the table so far" in sink.getvalue() and "1/2 cases" in sink.getvalue()


def test_dumb_terminal_gets_lines() -> None:
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=True, width=100, _environ={"TERM": "dumb"})
    with Display(console) as display:
        display.plan([("a", 65.0)])
    assert sink.getvalue() == "1 cases, 1:05 expected\n"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (measured(time_ratio=0.5), "speed of ucsa at 16k: 2.00 times as fast as dense"),
        (measured(time_ratio=0.5, conclusive=0.0), "speed of ucsa at 16k: 2.00? times"),
        (measured(status="failed"), "speed of ucsa at 16k: failed"),
        (
            measured(Case("recall", "msra", 256, "float32", "forward", task="mqar")),
            "recall mqar of msra at 256",
        ),
        (
            measured(Case("speed", "msra", 64, "float32", "forward+backward"), time_ratio=2.0),
            "speed of msra at 64 (forward+backward): 0.50 times",
        ),
    ],
)
def test_outcome_in_words(result: CaseResult, words: str) -> None:
    assert describe_result(result).startswith(words)
