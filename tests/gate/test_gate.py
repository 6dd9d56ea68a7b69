"""The gate from two commits to an exit status, and its exact metrics."""

from __future__ import annotations

import errno
import io
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from xml.etree import ElementTree

import pytest
from gate_results import CASE
from gate_workspaces import workspace_of
from repositories import MINE, git
from rich.console import Console

from danon.gate import decision_rule, sequential_test, workspace
from danon.gate.command import gate
from danon.gate.decision_rule import ALPHA, CONFIRMING, SCREENING
from danon.gate.exact_metrics import ExactMetrics, compare_exact, exact_metrics_of
from danon.gate.result import Row
from danon.gate.workspace import Options

LONG = replace(CASE, length=1024)  # graph breaks are counted there
Looks = tuple[tuple[int, ...], tuple[int, ...], float]
"""Pairs at which screening and confirmation look, and the error that they share."""


@pytest.fixture
def small(
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
    gate_inputs: Path,
    sqlite: str,
    forked_workers: None,
) -> Path:
    """Enter the repository, with a gate of one small case."""
    monkeypatch.setattr(workspace, "gate_cases", lambda names: [CASE])
    monkeypatch.setattr(workspace, "write_inputs", lambda path: gate_inputs)
    monkeypatch.chdir(repository)
    return repository


def gated(*, base: str = "HEAD~1", dirty: bool = False, minutes: float = 10.0) -> tuple[int, str]:
    console = Console(width=100, record=True, file=io.StringIO())
    options = Options(("mine.py:MyAttention",), "", dirty, minutes, Path("out"), base)
    status = gate(options, console)
    return status, " ".join(console.export_text().split())


class Full(io.StringIO):
    """A log whose disk is full when the table comes."""

    def write(self, text: str) -> int:
        if "Gate" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


REMEMBER = """if hasattr(self, "out"):
            return self.out.clone()
        self.out = torch.softmax(self.compute_attention(q, k), dim=-1) @ v
        """


class TestGate:
    """From two commits to an exit status."""

    @pytest.mark.parametrize(
        "looks",
        [
            pytest.param(((2,), (2,), 0.25), id="few pairs"),
            pytest.param((SCREENING, CONFIRMING, ALPHA), id="all pairs", marks=pytest.mark.slow),
        ],
    )
    def test_twice_the_work_is_a_regression(
        self, small: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screening, confirming, alpha = looks
        monkeypatch.setattr(sequential_test, "SCREENING", screening)
        for module in (sequential_test, decision_rule):
            monkeypatch.setattr(module, "CONFIRMING", confirming)
        monkeypatch.setattr(decision_rule, "ALPHA", alpha)
        status, said = gated()
        assert status == 1 and "regression: 1 of 1 cases" in said
        found = json.loads((small / "out" / "gate.json").read_text())
        (row,) = found["rows"]
        assert row["finding"] == "slower and larger" and row["pairs"] in confirming
        assert 1.3 < row["time_ratio"]["low"] < row["time_ratio"]["high"] < 2.6
        assert {f["name"] for f in row["facts"]} >= {"flops"}
        assert "slower" in (small / "out" / "gate.md").read_text()
        ElementTree.parse(small / "out" / "gate.xml")

    @pytest.mark.slow
    def test_half_the_work_is_no_regression(self, small: Path) -> None:
        (small / "mine.py").write_text(MINE.format(work=1))
        status, said = gated(base="HEAD", dirty=True)
        assert status == 0 and "faster" in said and "no regression in 1 cases" in said
        found = json.loads((small / "out" / "gate.json").read_text())
        assert found["rows"][0]["pairs"] == SCREENING[0]

    def test_time_limit_before_the_first_pair_is_undecided(self, small: Path) -> None:
        status, said = gated(minutes=1e-6)
        assert (
            status == 2
            and "could not decide: 1 of 1 cases" in said
            and "--time-limit-minutes" in said
        )
        assert "the time was over" in said

    @pytest.mark.slow
    def test_time_limit_during_a_call_ends_it(self, small: Path) -> None:
        """An attention that takes minutes a call does not make the gate take them."""
        slow = "import time; time.sleep(300)\n        for _ in"
        (small / "mine.py").write_text(MINE.format(work=1).replace("for _ in", slow))
        start = perf_counter()
        status, said = gated(base="HEAD", dirty=True, minutes=0.4)
        assert status == 2 and "could not decide: 1 of 1 cases" in said
        assert perf_counter() - start < 60

    def test_attention_that_caches_outputs_fails(self, small: Path) -> None:
        (small / "mine.py").write_text(
            MINE.format(work=1).replace("for _ in", REMEMBER + "for _ in")
        )
        status, said = gated(base="HEAD", dirty=True)
        assert status == 1 and "failed" in said and "it remembers outputs" in said
        assert "no time to compare" in said

    @pytest.mark.parametrize(
        ("source", "status", "words"),
        [
            ("import nowhere", 6, "No module named 'nowhere'"),
            (MINE.format(work=1).replace("return out", "raise RuntimeError('no')"), 1, "broken"),
        ],
    )
    def test_head_that_does_not_run(
        self, small: Path, source: str, status: int, words: str
    ) -> None:
        (small / "mine.py").write_text(source)
        found, said = gated(base="HEAD", dirty=True)
        assert found == status and words in said

    def test_case_that_only_the_head_can_run_is_new(self, small: Path) -> None:
        (small / "mine.py").write_text(
            MINE.format(work=1).replace("return out", "raise RuntimeError('no')")
        )
        git(small, "commit", "-a", "-m", "broken")
        git(small, "revert", "--no-edit", "HEAD")
        status, said = gated()
        assert status == 0 and "new" in said and "base: RuntimeError: no" in said

    def test_attention_without_a_file_in_one_commit(self, small: Path) -> None:
        git(small, "rm", "mine.py")  # nothing is left
        git(small, "commit", "-m", "without")
        status, said = gated()
        assert status == 2 and "removed" in said and "head: no file mine.py" in said
        git(small, "revert", "--no-edit", "HEAD")
        status, said = gated()
        assert status == 0 and "new" in said and "base: no file mine.py" in said

    def test_class_that_the_base_lacks_is_new(self, small: Path) -> None:
        other = MINE.format(work=1).replace("class MyAttention", "class Other")
        (small / "mine.py").write_text(other)
        git(small, "commit", "-a", "-m", "another class")
        git(small, "revert", "--no-edit", "HEAD")
        status, said = gated()
        assert status == 0 and "new" in said
        assert "base: no class MyAttention in mine.py; found: BaseAttention, Other" in said

    def test_attention_that_neither_commit_has_is_refused(self, small: Path) -> None:
        git(small, "mv", "mine.py", "yours.py")
        git(small, "commit", "-m", "moved")
        status, said = gated(base="HEAD")
        assert status == 6 and said.endswith("danon: head: no file mine.py")

    def test_attention_that_neither_side_has_is_refused(self, small: Path) -> None:
        unknown = replace(CASE, attention="msar")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace, "gate_cases", lambda names: [CASE, unknown])
            status, said = gated(base="HEAD")
        assert status == 6 and "head: no attention 'msar'; known: " in said and "msra" in said

    def test_error_of_the_gate_is_no_regression(
        self, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken(place: Path) -> Path:
            raise subprocess.CalledProcessError(1, "danon.data.qkv")

        monkeypatch.setattr(workspace, "write_inputs", broken)
        status, said = gated()
        assert status == 70 and "nothing is decided" in said
        assert "danon.data.qkv" in capsys.readouterr().err

    def test_results_that_cannot_be_written_are_printed(self, small: Path) -> None:
        (small / "out").write_text("no folder")
        status, said = gated(minutes=1e-6)
        assert (
            status == 74
            and "could not decide: 1 of 1 cases" in said
            and "File exists: 'out'" in said
        )

    def test_full_disk_under_the_log_is_no_regression(self, small: Path) -> None:
        options = Options(("mine.py:MyAttention",), "", True, 1e-6, Path("out"), "HEAD~1")
        assert gate(options, Console(file=Full())) == 74
        assert json.loads((small / "out" / "gate.json").read_text())["status"] == 2  # undecided

    def test_exit_statuses_of_bad_input(self, small: Path, tmp_path: Path) -> None:
        assert gated(base="mian")[0] == 3
        for minutes in (0.0, -1.0, math.nan):
            assert gated(minutes=minutes)[0] == 2
        (small / "mine.py").write_text("x")
        assert gated()[0] == 4
        assert not (small / "out").exists()


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = gated()
    assert status == 5 and "not a git repository" in said


class TestExactMetrics:
    """Metrics that are the same in every run."""

    @staticmethod
    def of(folder: Path, inputs: Path, source: str) -> ExactMetrics:
        """Measure an attention with that source, in a process of its own."""
        (folder / "mine.py").write_text(source)
        workspace = workspace_of(folder, "mine.py:MyAttention", inputs=inputs, scratch=folder)
        models = workspace.committed_models
        return exact_metrics_of(workspace, workspace.side("head"), [LONG], models)[LONG]

    def test_five_percent_more_memory_and_one_graph_break_are_found(
        self, tmp_path: Path, gate_inputs: Path, forked_workers: None
    ) -> None:
        source = MINE.format(work=1)
        base = self.of(tmp_path, gate_inputs, source)
        assert isinstance(base, dict) and base["graph_breaks"] == 0
        some = int(base["peak_bytes"] * 0.05 / 4)
        lines = f"extra = q.new_empty({some}); torch._dynamo.graph_break()"
        worse = self.of(tmp_path, gate_inputs, source.replace("for _", f"{lines}\n        for _"))
        assert isinstance(worse, dict)
        for figure in ("peak_bytes", "graph_breaks"):
            row = compare_exact(LONG, base, base | {figure: worse[figure]})
            assert (row.finding, [fact.name for fact in row.facts]) == ("larger", [figure])
        row = compare_exact(LONG, base, worse)
        assert [fact.name for fact in row.facts] == ["peak_bytes", "graph_breaks"]
        assert compare_exact(LONG, base, self.of(tmp_path, gate_inputs, source)) == Row(
            LONG, "same"
        )
