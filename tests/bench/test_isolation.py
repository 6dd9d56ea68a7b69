"""What an attention raises, changes, or dies of, stays with its own case."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.discovery import discover
from danon.bench import attempts
from danon.bench import supervisor as module
from danon.bench.cluster_job import AttentionJob
from danon.bench.command import bench
from danon.bench.isolation import Isolation
from danon.bench.progress import Display
from danon.bench.session import Options, ResumeError, Session
from danon.bench.supervisor import MAX_EXITS, Supervisor
from danon.console.reasons import one_line
from danon.measure.process_state import SETTINGS, ProcessState
from danon.processes.event_channel import EventChannel
from danon.processes.interruption import Interruption
from danon.report.remarks import HARMLESS
from danon.runs import failures
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from suites.profiles import PROFILES

CASE = Case("speed", "sdpa", 64, "float32", "forward")
HERE = {"id": "here", "cpu": "a", "device": "cpu", "threads": "1"}


def measured(case: Case = CASE) -> CaseResult:
    return CaseResult(case, "measured", metrics={"time_s": 1.0})


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    discover((), ())


class TestProcessState:
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("torch's threads", lambda: torch.set_num_threads(1 + torch.get_num_threads())),
            ("torch's default dtype", lambda: torch.set_default_dtype(torch.float64)),
            ("torch's default device", lambda: torch.set_default_device("meta")),
            ("grad mode", lambda: torch.set_grad_enabled(False)),
            ("autocast", lambda: torch.set_autocast_enabled("cpu", True)),
            ("autocast", torch.autocast("cpu", torch.bfloat16).__enter__),
            ("anomaly detection", lambda: torch.set_anomaly_enabled(True)),
            ("deterministic algorithms", lambda: torch.use_deterministic_algorithms(False)),
            ("float32 matmul precision", lambda: torch.set_float32_matmul_precision("medium")),
            ("torch's seed", lambda: torch.manual_seed(77)),
            ("the warning filters", lambda: warnings.simplefilter("ignore")),
            ("the environment", lambda: os.environ.update(DANON_TEST="1")),
            ("sys.path", lambda: sys.path.insert(0, "/nowhere")),
            ("the current folder", lambda: os.chdir("/")),
            ("signal handlers", lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)),
            ("timers", lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 1000)),
            ("the garbage collector", gc.disable),
            ("the recursion limit", lambda: sys.setrecursionlimit(5000)),
            ("the umask", lambda: os.umask(0o007)),
            ("functions", lambda: setattr(torch, "softmax", len)),
            ("functions", lambda: setattr(time, "perf_counter", time.time)),
            ("functions", lambda: setattr(torch.Tensor, "softmax", len)),
            ("functions", lambda: setattr(F, "scaled_dot_product_attention", F.softmax)),
        ],
    )
    def test_a_change_is_told_and_set_back(
        self, name: str, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(Path.cwd())
        state = ProcessState()
        change()
        changes = state.restore()
        assert name in changes.described
        assert not changes.unrestored
        assert not state.restore().described, "it is as it was"

    def test_every_change_at_once(self) -> None:
        state = ProcessState()
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)
        mode = torch.inference_mode()
        mode.__enter__()
        changes = state.restore()
        assert {"inference mode", "grad mode"} <= set(changes.described) and not changes.unrestored
        made = torch.zeros(2, requires_grad=True) * 2
        assert (made.device.type, made.dtype, made.requires_grad) == ("cpu", torch.float32, True)
        del mode  # it sets back what was before it, once it is collected
        gc.collect()
        torch.set_grad_enabled(True)

    def test_what_a_package_wraps_is_no_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(F, "gelu", F.gelu)  # set back after the test
        state = ProcessState()

        def wrapped(x: torch.Tensor) -> torch.Tensor:
            return x

        wrapped.__code__ = wrapped.__code__.replace(co_filename=f"{np.__path__[0]}/wrap.py")
        F.gelu = wrapped  # type: ignore[assignment]
        assert not state.restore().described and F.gelu is wrapped

    def test_what_torch_cannot_name_is_set_back_too(self) -> None:
        state = ProcessState()
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        told = state.restore().described
        assert told["torch's backends"] == "mkldnn.matmul"
        assert told["float32 matmul precision"] == "reading it raises RuntimeError"
        assert torch.get_float32_matmul_precision() == "highest"

    def test_random_numbers_are_drawn_again_without_a_word(self) -> None:
        state = ProcessState()
        first = torch.rand(3)
        assert not state.restore().described
        assert torch.equal(first, torch.rand(3))

    def test_a_thread_that_goes_on_cannot_be_set_back(self) -> None:
        state, end = ProcessState(), threading.Event()
        thread = threading.Thread(target=end.wait, name="left over")
        thread.start()
        try:
            changes = state.restore()
        finally:
            end.set()
            thread.join()
        assert changes.described == {"running threads": "left over"}
        assert changes.unrestored == ("running threads",)
        assert not state.restore().described

    def test_a_worker_without_work_is_no_running_thread(self) -> None:
        state = ProcessState()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            deadline = time.monotonic() + 10
            while state.restore().described and time.monotonic() < deadline:
                time.sleep(0.01)  # until it waits
            assert not state.restore().described
            begun, end = threading.Event(), threading.Event()
            pool.submit(lambda: (begun.set(), end.wait()))
            begun.wait()
            described = state.restore().described
            end.set()
            assert "running threads" in described

    def test_harmless_settings_are_settings(self) -> None:
        assert {setting.name for setting in SETTINGS} >= HARMLESS


class TestIsolation:
    @pytest.mark.parametrize(
        "error",
        [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd"), KeyError("x")],
        ids=lambda error: type(error).__name__,
    )
    def test_whatever_is_raised_is_a_failed_row(self, error: BaseException) -> None:
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

    def test_the_end_of_the_session_is_no_row(self) -> None:
        def measure(case: Case) -> CaseResult:
            raise Interruption("SIGINT")

        with pytest.raises(Interruption):
            Isolation().outcome(CASE, measure)

    def test_a_shortage_of_memory_stays_over_budget(self) -> None:
        def measure(case: Case) -> CaseResult:
            raise MemoryError

        assert Isolation().outcome(CASE, measure).status == "over budget"

    def test_what_cannot_be_stored_is_a_failed_row(self) -> None:
        result = Isolation().outcome(CASE, lambda case: replace(measured(), config={"a": object()}))
        assert result.status == "failed" and "not JSON serializable" in result.reason

    def test_an_error_that_cannot_be_shown_is_a_row_too(self) -> None:
        class OddError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        def measure(case: Case) -> CaseResult:
            raise OddError

        reason = Isolation().outcome(CASE, measure).reason
        assert reason.startswith("OddError: its message cannot be shown (test_isolation.py:")
        assert one_line(ValueError("a \ud800\n b")) == r"ValueError: a \ud800 b"

    def test_a_change_is_a_note_of_the_row_and_said_once(self) -> None:
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


def test_a_forked_copy_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_lasts_from_an_import_replaces_no_process() -> None:
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


def test_a_case_within_a_case_finds_the_process_as_it_was() -> None:
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


OWN = """
from danon.attention.base import BaseAttention

class {name}(BaseAttention):
    description = "{semantics}"

    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)
"""


class TestNames:
    def write(self, file: Path, name: str, semantics: str = "") -> Path:
        file.parent.mkdir(exist_ok=True)
        file.write_text(OWN.format(name=name, semantics=semantics))
        return file

    def test_two_classes_of_one_name_are_refused(self, tmp_path: Path) -> None:
        first = self.write(tmp_path / "first.py", "NamedTwice")
        second = self.write(tmp_path / "second.py", "NamedTwice")
        both = f"{first}:NamedTwice", f"{second}:NamedTwice"
        with pytest.raises(ValueError, match=r"both called 'NamedTwice': rename a class"):
            discover(both, ("sdpa",))

    def test_one_that_is_given_twice_is_refused(self, tmp_path: Path) -> None:
        target = f"{self.write(tmp_path / 'once.py', 'GivenTwice')}:GivenTwice"
        with pytest.raises(ValueError, match="GivenTwice' is given twice"):
            discover((target, target), ("sdpa",))

    def test_files_of_one_name_are_two_modules(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            file = self.write(tmp_path / folder / "same.py", f"In_{folder}", semantics=folder)
            registry.load(f"{file}:In_{folder}")
        for folder in ("a", "b"):
            kind = registry.get(f"In_{folder}")
            assert kind.description == folder
            assert getattr(sys.modules[kind.__module__], f"In_{folder}") is kind  # as pickle does

    def test_classes_of_one_file_share_its_module(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "shared.py", "SharedOne")
        file.write_text(file.read_text() + "\nclass SharedTwo(SharedOne):\n    pass\n")
        for name in ("SharedOne", "SharedTwo"):
            registry.load(f"{file}:{name}")
        one, two = (registry.get(name) for name in ("SharedOne", "SharedTwo"))
        assert issubclass(two, one)
        assert sys.modules[one.__module__].SharedOne is one  # as pickle does

    def test_a_registered_name_is_not_taken_away(self, tmp_path: Path) -> None:
        known = registry.get("sdpa")
        taken = type(known.__name__, (BaseAttention,), {"__qualname__": known.__qualname__})
        with pytest.raises(ValueError, match="'sdpa' is already registered"):
            registry.register("sdpa")(taken)
        assert registry.get("sdpa") is known

    @pytest.mark.parametrize("error", ["SystemExit(0)", "KeyboardInterrupt", "GeneratorExit"])
    def test_a_file_that_ends_the_process_is_refused(self, tmp_path: Path, error: str) -> None:
        file = tmp_path / "ends.py"
        file.write_text(f"\nraise {error}\n")
        with pytest.raises(ValueError, match=r"does not import: .*\(ends.py:2\)"):
            discover((f"{file}:Any",), ("sdpa",))


class Process:
    """The suites' process, as a script: reports, then how it ends.

    Attributes:
        answers: that it was given.
        options: of the suites.
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
    def test_a_case_that_ends_the_process_has_failed_and_the_others_go_on(
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

    def test_a_kill_for_memory_is_told_from_others(
        self, run: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kills = iter((3, 4, 4, 4))
        monkeypatch.setattr(module, "_memory_kills", lambda: next(kills))
        _, _, journal = run(([plan(), begin(CASES[0])], -signal.SIGKILL), ([plan(), FINISHED], 0))
        assert "killed for memory (SIGKILL)" in self.row(journal, CASES[0]).reason

    def test_the_innermost_case_is_the_one_that_died(self, run: Any) -> None:
        outer, inner = CASES[:2]
        _, _, journal = run(
            ([plan(), begin(outer), begin(inner)], -signal.SIGABRT),
            ([plan(), *through(outer), FINISHED], 0),
        )
        assert self.row(journal, inner).status == "failed"
        assert self.row(journal, outer).status == "measured"

    def test_an_attention_that_dies_always_is_not_tried_for_ever(self, run: Any) -> None:
        mine = [case for case in CASES if case.attention == "a"]
        scripts = [([plan(), begin(case)], -signal.SIGSEGV) for case in mine[:MAX_EXITS]]
        _, _, journal = run(*scripts, ([plan(), FINISHED], 0))
        last = self.row(journal, mine[MAX_EXITS])
        assert last.reason.startswith(f"not tried: the process ended {MAX_EXITS} times with this")
        assert {result.case.attention for result in journal.results()} == {"a"}

    def test_before_there_is_a_plan_nothing_is_measured(self, run: Any) -> None:
        what = "attention 'mine.py:Mine' is imported"
        suites, heard, _ = run(([{"event": "prepare", "what": what}], None))
        limit = f"no answer within {module.PREPARE_LIMIT_S:.0f} s"
        assert suites.failure == f"{what}: {limit} (mine.py:25)"
        assert not heard

    def test_a_process_that_leaves_is_replaced_without_a_row(self, run: Any) -> None:
        _, _, journal = run(
            ([plan(), *through(CASES[0]), {"event": "leaving"}], 0),
            ([plan(), *through(*CASES[1:]), FINISHED], 0),
        )
        assert {result.status for result in journal.results()} == {"measured"}

    def test_death_between_cases_is_said_and_bounded(self, run: Any) -> None:
        scripts = [([plan(), *through(CASES[0])], -signal.SIGSEGV) for _ in range(MAX_EXITS)]
        suites, heard, journal = run(*scripts, ([plan(), FINISHED], 0))
        assert any("was replaced after speed/a/N64" in event.get("text", "") for event in heard)
        assert self.row(journal, CASES[0]).status == "measured"
        assert self.row(journal, CASES[2]).status == "failed"

    def test_who_waits_for_another_bench_may_wait(self) -> None:
        progress = module._ProcessProgress()
        progress.hear({"event": "waiting"})
        assert progress.limit_s is None
        progress.hear({"event": "going"})
        assert progress.limit_s == module.PREPARE_LIMIT_S

    def test_a_limit_is_several_times_what_a_case_may_take(self) -> None:
        profile = PROFILES["quick"]
        assert profile.limit(CASE) == 15 * profile.cap_s
        (training,) = profile.plans_of("recall")[:1]
        case = replace(CASE, suite="recall", length=training.lengths[0], task=training.task)
        assert profile.limit(case) == 5 * training.cap_s + 15 * profile.cap_s


def test_a_unit_of_a_cluster_goes_on_in_the_same_way(
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
    def test_a_planned_case_without_an_outcome_is_an_error_by_name(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        session = Session(options(tmp_path), console)
        session.open(HERE, {}, [CASE.id, "speed/lost/N64/float32/forward/cpu"])
        session.keep(measured())
        assert session.close((), "", 0) == 2
        said = console.export_text()
        assert "no outcome speed/lost/N64/float32/forward/cpu" in said
        assert "1 of 2 planned cases have no outcome" in said
        assert session.journal is not None and session.journal.status == "FAILED"

    def test_a_traceback_is_in_the_folder_and_the_report(self, tmp_path: Path) -> None:
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

    def test_a_run_goes_on_only_with_what_it_began_with(self, tmp_path: Path) -> None:
        basis = {"code of danon": "sha256:a", "attentions": "sdpa, Mine", "file mine": "sha256:b"}
        first = Session(options(tmp_path), Console(file=io.StringIO()))
        run_dir = first.open(HERE, basis)
        assert first.journal is not None
        first.journal.set_status("KILLED")

        def resumed(machine: dict[str, str], now: dict[str, str], **changes: Any) -> Path:
            again = options(tmp_path, resume=True, **changes)
            return Session(again, Console(file=io.StringIO())).open(machine, now)

        for machine, now, changes, words in (
            (HERE, basis | {"code of danon": "sha256:c"}, {}, "the same: code of danon. Without"),
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

    def test_a_run_goes_on_with_its_own_threads(self, tmp_path: Path) -> None:
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

    def test_fewer_threads_are_said_when_the_bench_begins(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        Session(options(tmp_path), console).open(HERE, {}, most_threads=2)
        said = console.export_text()
        assert "Another program keeps this machine busy: all is timed with 1 of 2 threads" in said
        assert "OMP_NUM_THREADS=2" in said

    def test_what_kills_the_bench_itself_is_not_tried_for_ever(self, tmp_path: Path) -> None:
        first = Session(options(tmp_path), Console(file=io.StringIO()))
        run_dir = first.open(HERE)
        assert first.journal is not None
        for rows in (0, 1):  # the first time may be anybody's
            attempts.begin(run_dir, CASES[0])
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

    def test_without_a_killed_run_a_new_one_begins(self, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=io.StringIO())
        Session(options(tmp_path, resume=True), console).open(HERE, {})
        assert "Nothing to resume: no run was killed" in console.export_text()


FATAL = '''
import os, signal, sys, time
import torch
from danon import BaseAttention

class Base(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        if q.shape[2] == 64:
            self.harm()
        return self.compute_attention(q, k).softmax(-1) @ v

class Exits(Base):
    def harm(self):
        sys.exit(0)

class Vanishes(Base):
    def harm(self):
        os._exit(0)

class Crashes(Base):
    def harm(self):
        import ctypes
        ctypes.string_at(0)

class Hangs(Base):
    def harm(self):
        time.sleep(3600)

class Changes(Base):
    def harm(self):
        torch.set_num_threads(1 + torch.get_num_threads())
        torch.set_default_dtype(torch.float64)

class Watches(Base):
    """Fails where others have changed something."""

    def harm(self):
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_num_threads() == int(os.environ["DANON_TEST_THREADS"])
'''


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_store")
def test_a_bench_of_fatal_attentions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(module._ProcessProgress):
        def hear(self, event: dict[str, Any]) -> None:
            super().hear(event)
            if self.cases and self.cases[-1].case.attention == "Hangs":
                self.limit_s = 5.0

    monkeypatch.setattr(module, "_ProcessProgress", Impatient)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DANON_TEST_THREADS", "1")
    own = tmp_path / "fatal.py"
    own.write_text(FATAL)
    names = ("Exits", "Vanishes", "Crashes", "Hangs", "Changes", "Watches")
    asked = options(
        tmp_path / "runs",
        only="sdpa",
        suites="speed",
        attentions=tuple(f"{own}:{name}" for name in names),
    )
    console = Console(record=True, width=200, file=io.StringIO())
    assert bench(asked, console) == 1
    said = console.export_text()
    (place,) = (tmp_path / "runs").glob("*/run.json")
    journal = Journal(place.parent)
    assert journal.status == "FINISHED"
    found = {r.case.id: r for r in journal.results()}
    assert len(found) == 3 * (1 + len(names)), "every case has a row"
    line = {name: 1 + FATAL[: FATAL.index(f"class {name}")].count("\n") for name in names}
    for name, reason in (
        ("Exits", f"SystemExit: 0 (fatal.py:{line['Exits'] + 2})"),
        ("Vanishes", "the process ended itself with status 0"),
        ("Crashes", f"the process died by SIGSEGV (fatal.py:{line['Crashes'] + 3})"),
        ("Hangs", f"no answer within 5 s (fatal.py:{line['Hangs'] + 2})"),
    ):
        row = found[f"speed/{name}/N64/float32/forward/cpu"]
        assert (row.status, row.reason) == ("failed", reason)
        assert found[f"speed/{name}/N128/float32/forward/cpu"].status == "measured"
        assert f"failed speed/{name}/N64/float32/forward/cpu: {reason}" in said
    changes = found["speed/Changes/N64/float32/forward/cpu"]
    assert set(changes.notes) == {"torch's threads", "torch's default dtype"}
    assert "Changes changed torch's threads (1 -> " in said
    watching = [r for r in found.values() if r.case.attention == "Watches"]
    assert {r.status for r in watching} == {"measured"}, [r.reason for r in watching]
    assert len(list((place.parent / failures.FOLDER).iterdir())) == 8
