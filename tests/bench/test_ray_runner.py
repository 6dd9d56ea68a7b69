"""The engine ray without a cluster: refusals, machines of figures, dispatch of jobs."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from danon.bench.command import Options, bench
from danon.bench.progress import Display
from danon.bench.ray_runner import _AttentionDispatcher
from danon.bench.session import ResumeError, Session
from danon.cluster import connection, pool
from danon.cluster.connection import ClusterError, Node, check_engine, connected
from danon.cluster.install_check import incompatibility, installed
from danon.report.run_origin import DIFFERENT, describe_machines
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo

CASE = Case("speed", "window", 64, "float32", "forward")
HERE, THERE = (
    {"id": "here", "cpu": "a", "device": "cpu"},
    {"id": "there", "cpu": "b", "device": "cpu"},
)
NODES = [Node(name * 8, f"host-{name}", "10.0.0.1", 1, 0) for name in "ab"]


@pytest.mark.parametrize(
    ("engine", "address", "words"),
    [
        ("dask", "", "--engine 'dask': must be one of local, ray"),
        ("local", "auto", "--address 'auto': only with --engine ray"),
        ("ray", "ray://head:10001", "--address 'ray://head:10001': must be auto or host:port"),
    ],
)
def test_unknown_engine_is_refused(engine: str, address: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        check_engine(engine, address)
    console = Console(record=True, width=200, file=io.StringIO())
    asked = Options("smoke", "cpu", (), "", "", tmp_path, False, "danon bench", engine, address)
    assert bench(asked, console) == 2
    assert words in console.export_text()


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install danon\[ray\]"), connected(""):
        pass


def test_address_without_an_answer_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 3)
    with socket.socket() as deaf:  # takes calls and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ClusterError, match=f"{address}: no Ray cluster"), connected(address):
            pass
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "nowhere.invalid:6379"])
def test_unreachable_address_is_refused_at_once(address: str) -> None:
    pytest.importorskip("ray")
    start = time.monotonic()
    with pytest.raises(ClusterError, match=f"--address {address}: "), connected(address):
        pass
    assert time.monotonic() - start < 10


class TestInstallCheck:
    def test_same_code_is_compatible(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("a = 1\n")
        here = installed(str(tmp_path), ["mine.py"])
        assert incompatibility(here, installed(str(tmp_path), ["mine.py"])) == ""

    def test_other_code_is_incompatible(self) -> None:
        here = installed("", [])
        assert "has other code of danon" in incompatibility(here, {**here, "code": "x"})
        assert "No module" in incompatibility(here, {"error": "No module named 'danon'"})

    def test_missing_danon_is_the_reason(self) -> None:
        pickle = pytest.importorskip("ray").cloudpickle.dumps(pool._installed_task())
        code = (
            "import pickle, sys; sys.modules['danon'] = None; "
            f"print(pickle.loads({pickle!r})('', ()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith("{'error': ") and "danon" in done.stdout, done.stderr

    def test_other_or_missing_file_is_incompatible(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("a = 1\n")
        here = installed(str(tmp_path), ["mine.py"])
        assert "has no mine.py" in incompatibility(here, installed("/nowhere", ["mine.py"]))
        (tmp_path / "mine.py").write_text("a = 2\n")
        assert "has another mine.py" in incompatibility(here, installed(str(tmp_path), ["mine.py"]))


class TestPlaces:
    def test_result_without_a_place_has_no_field_for_it(self) -> None:
        old = CaseResult(CASE, "measured")
        assert "place" not in json.loads(old.to_json())
        assert CaseResult.from_json(old.to_json()) == old
        new = replace(old, place={"host": "a", "node": "1", "machine": HERE})
        assert CaseResult.from_json(new.to_json()) == new

    def test_different_machines_are_reported(self) -> None:
        info = RunInfo.capture("smoke", 0, "danon bench", HERE)
        assert len(describe_machines([CaseResult(CASE, "measured")], info)) == 1
        some = [
            CaseResult(
                replace(CASE, attention=name),
                "measured",
                place={"host": f"host-{name}", "node": name * 8, "machine": machine},
            )
            for name, machine in (("a", HERE), ("b", THERE))
        ]
        lines = describe_machines(some, info)
        assert lines[0].startswith("host-a, node aaaaaaaa: a (a, fingerprint here)")
        assert lines[-1] == DIFFERENT


class _Bench:
    """The jobs of a bench of two attentions, with given events."""

    def __init__(self, folder: Path) -> None:
        console = Console(file=io.StringIO())
        options = Options("smoke", "cpu", (), "", "", folder, False, "danon bench", "ray")
        self.session = Session(options, console)
        self.session.open(HERE)
        assert self.session.journal is not None
        self.journal: Journal = self.session.journal
        self.cases = [replace(CASE, attention=name) for name in ("sdpa", "window")]
        plan = {"cases": [(c.id, 1.0) for c in self.cases], "attentions": ["sdpa", "window"]}
        self.said: list[str] = []
        with Display(console) as display:
            self.units = _AttentionDispatcher(
                self.session, options, plan, display, self.said.append
            )

    def measure(self, node: Node, case: Case, machine: dict[str, str]) -> None:
        place = {"host": node.host, "node": node.id, "machine": machine}
        result = CaseResult(case, "measured", metrics={"time_s": 1.0}).to_json()
        self.units.on_event(
            node, {"event": "result", "result": result, "place": place, "models": []}
        )

    def end(self, node: Node, status: int = 0) -> None:
        self.units.on_event(node, {"event": "ended", "status": status, "tail": "", "files": {}})
        self.units.on_job_end(node, lost=False)


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Bench:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return _Bench(tmp_path)


def test_gpu_bench_does_not_resume_a_cpu_bench(units: _Bench, tmp_path: Path) -> None:
    units.journal.set_status("KILLED")
    options = Options("smoke", "cuda", (), "", "", tmp_path, True, "danon bench", "ray")
    session = Session(options, Console(file=io.StringIO()))
    with pytest.raises(ResumeError, match=r"device \(was cpu, is cuda\)"):
        session.open({**THERE, "device": "cuda"})
    assert session.open(THERE) == units.journal.run_dir


def offered(units: _Bench, node: Node) -> Any:
    job = units.units.next_job(node)
    return job and job.attention


class TestAttentionDispatcher:
    def test_row_of_dense_attention_is_of_its_own_job(self, units: _Bench) -> None:
        assert [offered(units, node) for node in NODES] == ["sdpa", "window"]
        dense, window = units.cases
        units.measure(NODES[1], dense, THERE)  # beside window
        units.measure(NODES[1], window, THERE)
        units.measure(NODES[0], dense, HERE)
        found = {r.case.attention: r.place["host"] for r in units.journal.results()}
        assert found == {"sdpa": "host-a", "window": "host-b"}
        units.end(NODES[0])
        units.end(NODES[1])
        assert units.units.done and not units.units.left

    def test_job_of_a_dead_machine_runs_once_more(self, units: _Bench) -> None:
        assert [offered(units, node) for node in NODES] == ["sdpa", "window"]
        units.measure(NODES[0], units.cases[0], HERE)
        units.units.on_job_end(NODES[0], lost=True)
        units.end(NODES[1])
        assert offered(units, NODES[1]) == "sdpa"
        units.units.on_job_end(NODES[1], lost=True)
        assert units.units.done and units.units.left == ["sdpa"]
        assert len(units.journal.results()) == 1

    def test_job_of_dead_suites_runs_once_more(self, units: _Bench) -> None:
        assert offered(units, NODES[0]) == "sdpa"
        units.end(NODES[0], -9)
        assert offered(units, NODES[0]) == "sdpa" and not units.units.done


def test_ray_is_imported_at_first_use() -> None:
    code = "import sys, danon.bench.command, danon.bench.ray_runner, danon.tuning.ray_executor; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('ray' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
