"""Isolation of cases: exceptions become rows, changes of the process are undone."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import replace

import pytest
import torch

from danon.attention.discovery import discover
from danon.bench.isolation import Isolation
from danon.console.reasons import one_line
from danon.measure.process_state import ProcessState
from danon.processes.event_channel import EventChannel
from danon.processes.interruption import Interruption
from danon.runs.case import Case, CaseResult

CASE = Case("speed", "sdpa", 64, "float32", "forward")


def measured(case: Case = CASE) -> CaseResult:
    return CaseResult(case, "measured", metrics={"time_s": 1.0})


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    discover((), ())


class TestIsolation:
    @pytest.mark.parametrize(
        "error",
        [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd"), KeyError("x")],
        ids=lambda error: type(error).__name__,
    )
    def test_exception_makes_a_failed_row(self, error: BaseException) -> None:
        heard: list[tuple[Case, str]] = []
        isolation = Isolation(on_trace=lambda case, text: heard.append((case, text)))

        def measure(case: Case) -> CaseResult:
            raise error

        result = isolation.outcome(CASE, measure)
        assert result.status == "failed"
        assert result.reason.startswith(type(error).__name__)
        line = measure.__code__.co_firstlineno + 1
        assert result.reason.endswith(f"(test_isolation.py:{line})")
        ((case, text),) = heard
        assert case == CASE and text.startswith("Traceback") and "raise error" in text

    def test_interruption_makes_no_row(self) -> None:
        def measure(case: Case) -> CaseResult:
            raise Interruption("SIGINT")

        with pytest.raises(Interruption):
            Isolation().outcome(CASE, measure)

    def test_out_of_memory_is_over_budget(self) -> None:
        def measure(case: Case) -> CaseResult:
            raise MemoryError

        assert Isolation().outcome(CASE, measure).status == "over budget"

    def test_result_that_cannot_be_stored_is_a_failed_row(self) -> None:
        result = Isolation().outcome(CASE, lambda case: replace(measured(), config={"a": object()}))
        assert result.status == "failed" and "not JSON serializable" in result.reason

    def test_error_without_a_string_is_a_failed_row(self) -> None:
        class OddError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        def measure(case: Case) -> CaseResult:
            raise OddError

        reason = Isolation().outcome(CASE, measure).reason
        assert reason.startswith("OddError: its message cannot be shown (test_isolation.py:")
        assert one_line(ValueError("a \ud800\n b")) == r"ValueError: a \ud800 b"

    def test_change_is_a_note_and_reported_once(self) -> None:
        said: list[str] = []
        isolation = Isolation(on_change=lambda key, text: said.append(text))

        def measure(case: Case) -> CaseResult:
            torch.set_num_threads(before + 1)
            return measured(case)

        before = torch.get_num_threads()
        for _ in range(2):
            result = isolation.outcome(CASE, measure)
            assert result.notes == {"torch's threads": f"{before} -> {before + 1}"}
            assert torch.get_num_threads() == before
            assert CaseResult.from_json(result.to_json()) == result
        assert said == [f"sdpa changed torch's threads ({before} -> {before + 1}): set back"]
        assert "notes" not in json.loads(measured().to_json())


def test_forked_copy_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    monkeypatch.setenv("DANON_CHANNEL", str(there.detach()))
    channel = EventChannel()
    channel.send(event="begin")
    assert here.recv(100) == b'{"event": "begin"}\n'
    if os.fork() == 0:
        channel.send(event="begin")
        os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
    here.setblocking(False)
    with pytest.raises(BlockingIOError):
        here.recv(100)
    here.close()
    assert channel._stream is not None
    channel._stream.close()
    with pytest.raises(Interruption, match="has gone"):
        channel.ask(event="result")


def test_lasting_change_of_an_import_keeps_the_process() -> None:
    said: list[str] = []
    isolation, end = Isolation(on_change=lambda key, text: said.append(text)), threading.Event()
    thread = threading.Thread(target=end.wait, name="of a library")
    state = ProcessState()
    thread.start()
    isolation.prepare("Mine", state)
    assert said == ["Mine changed running threads (of a library): stays for the whole run"]
    assert not isolation.outcome(CASE, measured).notes and not isolation.needs_new_process
    end.set()
    thread.join()

    def measure(case: Case) -> CaseResult:
        end.clear()
        threading.Thread(target=end.wait, name="left over").start()
        return measured(case)

    assert isolation.outcome(CASE, measure).notes == {"running threads": "left over"}
    assert isolation.needs_new_process and said[-1].endswith("(left over): the process is replaced")
    end.set()


def test_nested_case_starts_from_the_same_state() -> None:
    isolation, before = Isolation(), torch.get_num_threads()
    within = replace(CASE, attention="within")
    seen = []

    def inner(case: Case) -> CaseResult:
        seen.append(torch.get_num_threads())
        return measured(case)

    def outer(case: Case) -> CaseResult:
        torch.set_num_threads(before + 1)
        assert not isolation.outcome(within, inner).notes
        return measured(case)

    assert set(isolation.outcome(CASE, outer).notes) == {"torch's threads"}
    assert seen == [before] and torch.get_num_threads() == before
