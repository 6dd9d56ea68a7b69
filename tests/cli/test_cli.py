"""The commands as a user types them: what they refuse, what a stopped bench leaves behind."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

import suites.conftest
from danon.bench.command import Options, bench
from danon.cli.app import app
from danon.cli.machine_terminal import grouped, print_machine
from danon.cli.main import main
from danon.processes.interpreter import bundle
from danon.processes.suite_process import SuiteProcess
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.runs.saved_model import SavedModel

DANON = [sys.executable, "-c", "from danon.cli.main import main; main()"]
NO_STORE = "http://127.0.0.1:9"  # refuses at once: these tests are not about MLflow


def refused(tmp_path: Path, **changes: object) -> tuple[int, str]:
    """Exit status and words of a bench that must not start measuring."""
    values: dict[str, object] = {
        "profile": "smoke",
        "device": "cpu",
        "attentions": (),
        "only": "sdpa",
        "suites": "",
        "results": tmp_path / "runs",
        "resume": False,
        "command": "danon bench",
        **changes,
    }
    console = Console(record=True, width=200, file=io.StringIO())
    status = bench(Options(**values), console)  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()
    return status, console.export_text()


class TestRefusals:
    def test_unknown_profile(self, tmp_path: Path) -> None:
        status, said = refused(tmp_path, profile="nope")
        assert status == 2
        assert "unknown profile 'nope'; known: smoke, quick, standard, full" in said
        assert len(said.splitlines()) == 1

    def test_user_attention_that_leaks(self, tmp_path: Path) -> None:
        own = tmp_path / "own.py"
        own.write_text(
            "from danon.attention.base import BaseAttention\n"
            "class Leaky(BaseAttention):\n"
            "    def __init__(self, config):\n"
            "        super().__init__()\n"
            "        self.setup_attention(config)\n"
            "    def forward(self, q, k, v, mask=None):\n"
            "        return (q @ k.mT / 8).softmax(-1) @ v\n"
        )
        status, said = refused(tmp_path, attentions=(f"{own}:Leaky",))
        assert status == 2
        assert "attention 'Leaky' was built with causal=True but is not causal" in said

    def test_device_that_is_not_here(self) -> None:
        given = {"--danon-profile": "smoke", "--danon-device": "tpu"}
        with pytest.raises(ValueError, match="unknown device 'tpu'; known: cpu, cuda"):
            suites.conftest._prepare(SimpleNamespace(getoption=given.get))  # type: ignore[arg-type]


STOPPED = ("--suites", "speed,language")
"""Options of the bench that is stopped: it has cases of calls, and models to store."""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": NO_STORE, "PYTHONPATH": str(bundle())}
    return subprocess.Popen(
        [*DANON, "bench", "--profile", "smoke", "--only", "window", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.is_file() else []


def first_cases(folder: Path, process: subprocess.Popen[str]) -> Path:
    """Wait until the journal of a bench has two cases, and return its path."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        found = list(folder.glob("results/runs/*/cases.jsonl"))
        if found and len(lines(found[0])) >= 2:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Folder, exit status and words of a bench that got Ctrl-C after its first cases."""
    folder = tmp_path_factory.mktemp("stopped")
    process = start(folder, *STOPPED)
    first_cases(folder, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    return folder, process.returncode, said


def test_answer_to_a_stopped_suite_process(tmp_path: Path) -> None:
    with SuiteProcess(("--danon-profile=smoke",), tmp_path) as process:
        process.stop()
        with pytest.raises(EOFError):
            process.event(None)
        process.answer(run="never read")
        assert process.wait() == -signal.SIGTERM


def test_suite_process_times_with_the_threads_of_its_answer(tmp_path: Path) -> None:
    options = ("--danon-profile=smoke", "--danon-only=sdpa", "--danon-suites=speed")
    asked = []
    with SuiteProcess(options, tmp_path) as process, contextlib.suppress(EOFError):
        while (event := process.event(None)) is not None:
            if event["event"] == "plan":
                asked.append(event["most_threads"])
                process.answer(run=None, threads=1)
            elif event["event"] == "result":
                process.answer()
        process.wait()
    assert asked and asked[0] >= 1
    stored = json.loads((tmp_path / "benchmark.json").read_text())
    assert stored["machine_info"]["danon"]["threads"] == "1"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux limits other processes")
class TestFullDisk:
    """A file that may not grow stands in for it."""

    @pytest.mark.slow
    def test_bench_keeps_its_results(self, tmp_path: Path) -> None:
        process = start(tmp_path, "--suites", "speed,memory")
        place = first_cases(tmp_path, process)
        room = place.stat().st_size + 100
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 74, said
        assert "File too large" in said and "cases.jsonl" in said and "Traceback" not in said
        journal = Journal(place.parent)
        measured = journal.results()
        assert 2 <= len(measured) and journal.status == "KILLED"
        said = " ".join(said.split())
        assert (
            f"{len(measured)} cases are stored in results/runs/{place.parent.name}; --resume"
            in said
        )
        process = start(tmp_path, "--suites", "speed,memory", "--resume")
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0 and f"{len(measured)} cases are measured already" in said
        assert journal.results()[: len(measured)] == measured and journal.status == "FINISHED"


class TestStopped:
    def test_interrupted_bench_keeps_its_results(self, stopped: tuple[Path, int, str]) -> None:
        folder, status, said = stopped
        assert status == 130, said
        (run,) = folder.glob("results/runs/*/run.json")
        journal = Journal(run.parent)
        assert journal.status == "KILLED"
        assert len(journal.results()) >= 2
        stored = json.loads((run.parent / "results.json").read_text())
        assert len(stored["results"]) == len(journal.results())
        assert "--resume continues" in said
        assert "Not recording in MLflow" in said

    def test_resume_measures_only_what_is_missing(self, stopped: tuple[Path, int, str]) -> None:
        folder, _, _ = stopped
        (run,) = folder.glob("results/runs/*/run.json")
        before = lines(run.parent / "cases.jsonl")
        process = start(folder, *STOPPED, "--resume")
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0, said
        assert list(folder.glob("results/runs/*/run.json")) == [run], "it made another run"
        after = lines(run.parent / "cases.jsonl")
        assert after[: len(before)] == before, "measured again"
        journal = Journal(run.parent)
        assert journal.status == "FINISHED"
        assert len({r.case for r in journal.results()}) == len(after)
        assert f"{len(before)} cases are measured already" in said
        assert (run.parent / "report.html").stat().st_size > 10_000
        entries = json.loads((run.parent / "benchmark.json").read_text())["benchmarks"]
        replayed = {b["params"]["case"] for b in entries}
        assert replayed <= {r.case.id for r in journal.results()}
        assert replayed
        models = {(saved.attention, saved.task) for saved, _ in SavedModel.all(run.parent)}
        assert models == {("sdpa", "code"), ("window", "code")}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    info = RunInfo.capture("smoke", 0, "danon bench", {"id": "x", "cpu": "test"})
    journal = Journal.create(tmp_path / "runs", info)
    case = Case("speed", "sdpa", 64, "float32", "forward")
    metrics = {"time_s": 1e-3, "time_ratio": 1.0, "speedup": 1.0}
    journal.append(CaseResult(case, "measured", "", "exact", metrics, {"candidate_s": [1e-3]}))
    journal.set_status("FINISHED")
    return journal.run_dir


class TestOtherCommands:
    def test_report_of_the_last_run(self, run_dir: Path) -> None:
        done = CliRunner().invoke(app, ["report", "--results", str(run_dir.parent)])
        assert done.exit_code == 0, done.output
        assert "sdpa" in done.output
        assert (run_dir / "report.html").is_file()

    def test_record_with_an_unreachable_store(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_STORE)
        done = CliRunner().invoke(app, ["record", str(run_dir)])
        assert done.exit_code == 2
        assert NO_STORE in done.output

    @pytest.mark.parametrize("width", [40, 80])
    def test_doctor_says_what_can_be_measured(self, width: int) -> None:
        console = Console(record=True, width=width, file=io.StringIO())
        print_machine("cpu", console)
        said = console.export_text()
        assert said.startswith("This machine measures ")
        words = " ".join(said.split())
        assert " attentions on cpu; the fastest dtype is " in words
        for word in ("cpu-flash", "cuda-flash", "no CUDA device", "msra", "flex-window", "sqlite"):
            assert word in said
        assert "linformer, nsa, performer: not bfloat16" in words
        assert "flash-attn, gla, xformers: not installed (pip install danon[cuda])" in words
        if width == 80:
            assert len(said.splitlines()) <= 40

    def test_doctor_groups_by_reason(self) -> None:
        reasons = {
            "a": "a is not installed (pip install x)",
            "b": "package bb is not installed (pip install x)",
            "c": "no CUDA device",
        }
        assert grouped(reasons) == [
            ("a, b", "not installed (pip install x)"),
            ("c", "no CUDA device"),
        ]

    def test_bare_installation(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "typer" else find(name)
        )
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert "not installed: typer; pip install danon[bench]" in capsys.readouterr().err


def test_arguments_of_the_suite_process() -> None:
    options = Options("quick", "cpu", ("a.py:B",), "x,y", "speed", Path("r"), False, "danon bench")
    assert options.arguments() == [
        "--danon-profile=quick",
        "--danon-device=cpu",
        "--danon-only=x,y",
        "--danon-suites=speed",
        "--danon-attention=a.py:B",
    ]
    assert asdict(options)["resume"] is False
