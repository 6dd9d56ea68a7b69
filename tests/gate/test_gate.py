"""The gate: its decisions from ratios, and from two commits to an exit status."""

from __future__ import annotations

import datetime as dt
import errno
import io
import json
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from gate_workspaces import workspace_of
from repositories import MINE, git
from rich.console import Console

from danon.gate import decision_rule, workspace
from danon.gate.against_commit import merge_rows
from danon.gate.checkout import CheckoutError, DirtyError, Repository, RevisionError
from danon.gate.command import gate
from danon.gate.decision_rule import CONFIRMING, SCREENING, Decision, Tolerance
from danon.gate.exact_metrics import ExactMetrics, compare_exact, exact_metrics_of
from danon.gate.paired_processes import Measurement
from danon.gate.result import BAD, ExactMetric, Finding, GateResult, Row
from danon.gate.result_report import junit, markdown, render
from danon.gate.sequential_test import Measure, SequentialTest
from danon.gate.worker_client import (
    DiedError,
    OutputError,
    Side,
    TimeOverError,
    WorkerClient,
    WorkerError,
)
from danon.gate.workspace import Options
from danon.measure.statistics import Estimate
from danon.runs.case import Case

CASE = Case("speed", "MyAttention", 128, "float32", "forward")
LONG = replace(CASE, length=1024)  # graph breaks are counted there


class TestDecisionRule:
    """Ratios in, verdicts out."""

    @staticmethod
    def alarms(shift: float, noise: float, count: int) -> float:
        """Return the share of suspects that are called slower, in heavy-tailed noise."""
        draw = np.random.default_rng(0).standard_t(3, (count, CONFIRMING[-1])) * noise + shift
        tolerance, slow = Tolerance(), 0
        for row in draw:
            for look in CONFIRMING:
                (found,) = decision_rule.confirm({"a": row[:look]}, {"a": tolerance}, 1).values()
                if found is not Decision.UNDECIDED:
                    slow += found is Decision.REGRESSED
                    break
        return slow / count

    def test_false_alarm_rate_is_at_most_one_percent(self) -> None:
        """At every noise, and right at the slack, where the test has to hold its level."""
        for noise in (0.005, 0.03, 0.1):
            assert self.alarms(0.0, noise, 400) <= 0.01
        assert self.alarms(Tolerance().slack, 0.03, 1000) <= 0.015  # 0.01 + 1.6 standard errors

    @pytest.mark.parametrize(
        ("shift", "noise", "least"), [(0.1, 0.02, 0.99), (0.05, 0.01, 0.97), (0.1, 0.03, 0.97)]
    )
    def test_detection_rate_of_slowdowns(self, shift: float, noise: float, least: float) -> None:
        assert self.alarms(shift, noise, 200) >= least

    def test_many_suspects_need_more_evidence_each(self) -> None:
        """Nine positive pairs out of nine, 1 in 512, are enough for one suspect and not for two."""
        ratios = {name: [0.2] * 9 for name in "abcd"}
        tolerances = dict.fromkeys(ratios, Tolerance())
        one = decision_rule.confirm({"a": ratios["a"]}, tolerances, 1)
        assert one == {"a": Decision.REGRESSED}
        assert set(decision_rule.confirm(ratios, tolerances, 4).values()) == {Decision.UNDECIDED}
        more = {name: [0.2] * CONFIRMING[1] for name in "abcd"}
        assert set(decision_rule.confirm(more, tolerances, 4).values()) == {Decision.REGRESSED}

    def test_decisions_of_screening(self) -> None:
        tolerance = Tolerance()
        assert decision_rule.screen([0.0, 0.001, -0.002], tolerance, last=False) is Decision.CLEAR
        assert decision_rule.screen([0.2, 0.21, 0.19], tolerance, last=False) is Decision.SUSPECT
        wide = [-0.1, 0.12, 0.02]
        assert decision_rule.screen(wide, tolerance, last=False) is Decision.UNDECIDED
        assert decision_rule.screen(wide, tolerance, last=True) is Decision.SUSPECT

    def test_estimate_with_one_disturbed_pair(self) -> None:
        calm, disturbed = [0.01, 0.0, 0.02, 0.01, 0.0], [0.01, 0.0, 0.02, 0.01, 0.7]
        assert decision_rule.estimate(disturbed, 0.01).value == pytest.approx(
            decision_rule.estimate(calm, 0.01).value, abs=0.01
        )

    def test_limit_below_the_slack_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"limit = 0.01.*0 <= slack < limit"):
            Tolerance(slack=0.02, limit=0.01)


WHEN = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)


def comparison(*rows: Row) -> GateResult:
    return GateResult("a" * 40, "b" * 40, "before", "after | it", rows, WHEN, 12.0, {"id": "f00"})


def row(finding: Finding, **values: object) -> Row:
    return Row(CASE, finding, **values)  # type: ignore[arg-type]


class TestOutput:
    """Every form says the same."""

    @pytest.mark.parametrize(
        ("findings", "status"),
        [
            (("same", "faster", "new", "removed", "not measured"), 0),
            (("same", "slower", "undecided"), 1),
            (("larger",), 1),
            (("slower and larger",), 1),
            (("failed",), 1),
            (("worse",), 1),
            (("broken",), 1),
            (("same", "undecided"), 2),
            (("not measured",), 2),
            ((), 2),
        ],
    )
    def test_status_is_that_of_the_worst_finding(
        self, findings: tuple[Finding, ...], status: int
    ) -> None:
        found = comparison(*map(row, findings))
        assert found.status == status == json.loads(found.to_json())["status"]
        suite = ElementTree.fromstring(junit(found))[0]
        bad = sum(f in BAD for f in findings)
        assert (int(suite.attrib["failures"]), len(suite.findall("*/failure"))) == (bad, bad)
        assert len(suite.findall("*/error")) == findings.count("undecided")

    def test_figures_and_reasons_are_in_every_form(self) -> None:
        facts = (ExactMetric("peak_bytes", 2**20, 2**21), ExactMetric("graph_breaks", 0, 1))
        recall = (ExactMetric("recall_8", 0.5, 0.475),)
        ratio = Estimate(1.083, 1.051, 1.112)
        found = comparison(
            row("slower", time_ratio=ratio, pairs=9, base_s=0.01, head_s=0.0108, facts=facts),
            row("broken", note="head: ValueError: no [bold]"),
            row("worse", facts=recall),
        )
        for width in (80, 160):
            console = Console(width=width, record=True)
            render(found, console)
            said = console.export_text()
            for words in (
                "+8.3%",
                "+5.1%, +11.2%",
                "peak memory 1.00 MiB -> 2.00 MiB (+100.00%)",
                "graph breaks 0 -> 1",
                "no [bold]",
                "regression: 3 of 3 cases",
                "recall of 8 pairs 50.0% -> 47.5%",
                "more questions wrongly",
                "measured again",
            ):
                assert words in " ".join(said.split())
            assert max(map(len, said.splitlines()[1:4])) <= width
        text, xml = markdown(found), junit(found).decode()
        for words in ("+8.3%", "[+5.1%, +11.2%]", "graph breaks 0 -&gt; 1", "50.0% -&gt; 47.5%"):
            assert words in xml and words.replace("&gt;", ">") in text
        assert text.startswith("### Attention gate: regression: 3 of 3 cases")
        tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        assert len(set(tables)) == 1  # what is in a cell does not end it


class TestCheckout:
    """Commits as folders."""

    def test_head_has_uncommitted_changes_and_base_has_not(
        self, repository: Path, tmp_path: Path
    ) -> None:
        found = Repository(repository)
        base = found.base("HEAD~1", tmp_path / "base")
        (repository / "mine.py").write_text("changed")
        with pytest.raises(DirtyError, match=r"no commit has \(mine.py\).*--dirty"):
            found.head(tmp_path / "never", dirty=False)
        head = found.head(tmp_path / "head", dirty=True)
        assert (base.root / "mine.py").read_text() == MINE.format(work=1)
        assert (head.root / "mine.py").read_text() == "changed"
        assert head.commit == git(repository, "rev-parse", "HEAD")
        assert (base.subject, head.subject) == ("work 1", "with changes")
        # nothing is left in the repository, and the change is still there
        assert git(repository, "stash", "list") == ""
        assert git(repository, "worktree", "list").count("\n") == 0
        assert git(repository, "status", "--porcelain").strip() == "M mine.py"

    def test_unknown_revision_and_folder_outside_a_repository(
        self, repository: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RevisionError, match=r"unknown revision 'mian'.*which has main"):
            Repository(repository).base("mian", tmp_path / "base")
        (tmp_path / "none").mkdir()
        with pytest.raises(CheckoutError, match="not a git repository"):
            Repository(tmp_path / "none")


class TestWorker:
    """The process of one side."""

    def test_worker_measures_its_checkout(
        self, repository: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        side = Side("head", repository, ("mine.py:MyAttention",))
        with WorkerClient(side, gate_inputs, tmp_path / "log") as worker:
            assert {"msra", "msra-balanced", "MyAttention"} <= set(worker.attentions)
            case = {"case": asdict(CASE), "name": "a", "seed": 1}
            worker.request("prepare", **case)
            assert worker.request("time", name="a", calls=3) > 0
            facts = worker.request("exact_metrics", name="a")
            assert facts["flops"] == 2 * 4 * 4 * 128 * 128 * 64  # twice the work
            assert facts["parameters"] == 0 and facts["peak_bytes"] >= 4 * 128 * 128 * 4
            assert worker.request("graph_breaks", name="a") == {"graph_breaks": 0}
            decode = {"case": {**case["case"], "phase": "decode"}, "name": "b", "seed": 1}  # type: ignore[dict-item]
            with pytest.raises(WorkerError, match="no streaming form"):
                worker.request("prepare", **decode)
            unknown = {"case": {**case["case"], "attention": "x"}, "name": "x", "seed": 1}  # type: ignore[dict-item]
            with pytest.raises(WorkerError, match="head: ValueError: unknown attention 'x'"):
                worker.request("prepare", **unknown)
            assert worker.request("exact_metrics", name="a") == facts  # goes on, and says the same

    def test_error_of_a_dead_worker_has_its_last_output(
        self, repository: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        (repository / "mine.py").write_text("import os\nprint('farewell', flush=True)\nos._exit(3)")
        with pytest.raises(DiedError, match="worker of base died: farewell"):
            WorkerClient(Side("base", repository, ("mine.py:A",)), gate_inputs, tmp_path / "log")
        (repository / "mine.py").write_text("import nowhere")
        with pytest.raises(WorkerError, match=r"base: ValueError.*No module named 'nowhere'"):
            WorkerClient(Side("base", repository, ("mine.py:A",)), gate_inputs, tmp_path / "log")

    def test_worker_is_killed_at_the_time_limit(
        self, repository: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        (repository / "mine.py").write_text("import time; time.sleep(300)")
        side, start = Side("base", repository, ("mine.py:A",)), perf_counter()
        for end in (start + 1, start):
            with pytest.raises(TimeOverError, match="the time was over"):
                WorkerClient(side, gate_inputs, tmp_path / "log", end)
        assert perf_counter() - start < 60


@pytest.fixture
def small(
    monkeypatch: pytest.MonkeyPatch, repository: Path, gate_inputs: Path, sqlite: str
) -> Path:
    """A gate of one small case, called in the repository."""
    monkeypatch.setattr(workspace, "gate_cases", lambda names: [CASE])
    monkeypatch.setattr(workspace, "write_inputs", lambda path: gate_inputs)
    monkeypatch.chdir(repository)
    return repository


def gated(*, base: str = "HEAD~1", dirty: bool = False, minutes: float = 10.0) -> tuple[int, str]:
    console = Console(width=100, record=True)
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

    def test_twice_the_work_is_a_regression(self, small: Path) -> None:
        status, said = gated()
        assert status == 1 and "regression: 1 of 1 cases" in said
        found = json.loads((small / "out" / "gate.json").read_text())
        (row,) = found["rows"]
        assert row["finding"] == "slower and larger" and row["pairs"] in CONFIRMING
        assert 1.3 < row["time_ratio"]["low"] < row["time_ratio"]["high"] < 2.6
        assert {f["name"] for f in row["facts"]} >= {"flops"}
        assert "slower" in (small / "out" / "gate.md").read_text()
        ElementTree.parse(small / "out" / "gate.xml")

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
        self, tmp_path: Path, gate_inputs: Path
    ) -> None:
        source = MINE.format(work=1)
        base = self.of(tmp_path, gate_inputs, source)
        assert isinstance(base, dict) and base["graph_breaks"] == 0
        some = int(base["peak_bytes"] * 0.05 / 4)
        for figure, line in {
            "peak_bytes": f"extra = q.new_empty({some})",
            "graph_breaks": "torch._dynamo.graph_break()",
        }.items():
            worse = source.replace("for _", f"{line}\n        for _")
            for _ in range(3):
                row = compare_exact(LONG, base, self.of(tmp_path, gate_inputs, worse))
                assert (row.finding, [fact.name for fact in row.facts]) == ("larger", [figure])
        assert compare_exact(LONG, base, self.of(tmp_path, gate_inputs, source)) == Row(
            LONG, "same"
        )


class TestSequentialTest:
    """The order of screening and confirmation, with made-up ratios."""

    @staticmethod
    def measure(
        ratios: dict[str, float], rounds: int = 100, calls: list[tuple[str, ...]] | None = None
    ) -> Measure:
        """Measures these log ratios; NaN is not to be believed, and the time is over once."""
        seen = [] if calls is None else calls

        def measure(
            some: Sequence[Case], seed: int
        ) -> Iterator[tuple[Case, Measurement | OutputError]]:
            if len(seen) >= rounds:
                raise TimeOverError("the time was over")
            seen.append(tuple(c.attention for c in some))
            jitter = 0.001 * (seed % 5)
            for case in some:
                ratio = ratios[case.attention]
                if math.isnan(ratio):
                    yield case, OutputError("head: it remembers")
                else:
                    yield case, Measurement(ratio + jitter, (1.0,), (1.0,))

        return measure

    @classmethod
    def of(
        cls, ratios: dict[str, float], rounds: int = 100
    ) -> tuple[list[Row], list[tuple[str, ...]]]:
        """Findings for cases with these log ratios, and which cases were measured together."""
        cases = [Case("speed", name, 128, "float32", "forward") for name in ratios]
        calls: list[tuple[str, ...]] = []
        measure = cls.measure(ratios, rounds, calls)
        found = SequentialTest(measure).rows(cases)
        return [found[case] for case in cases], calls

    def test_only_suspects_are_measured_again(self) -> None:
        rows, calls = self.of({"slow": 0.1, "other": 0.0})
        assert [r.finding for r in rows] == ["slower", "same"]
        assert calls[: SCREENING[0]] == [("slow", "other")] * SCREENING[0]
        assert calls[SCREENING[0] :] == [("slow",)] * CONFIRMING[0]
        assert rows[0].pairs == CONFIRMING[0]  # those of screening do not count

    def test_failed_case_is_not_measured_again(self) -> None:
        rows, calls = self.of({"cheat": math.nan, "slow": 0.1})
        assert [r.finding for r in rows] == ["failed", "slower"]
        assert rows[0].note == "head: it remembers"
        assert calls[1:] == [("slow",)] * (SCREENING[0] + CONFIRMING[0] - 1)

    @pytest.mark.parametrize(
        ("rounds", "note"),
        [
            (1, "the time was over"),
            (2, r"confirmed or denied it \(0 of 9"),
            (SCREENING[0] + 4, r"confirmed or denied it \(4 of 9"),
        ],
    )
    def test_time_limit_in_a_round(self, rounds: int, note: str) -> None:
        rows, _ = self.of({"slow": 0.1}, rounds)
        assert rows[0].finding == "undecided" and re.search(note, rows[0].note)

    def test_case_that_is_larger_and_slower(self) -> None:
        names = {"both": 0.1, "larger": 0.0, "late": 0.1, "cheat": math.nan}
        cases = {name: Case("speed", name, 128, "float32", "forward") for name in names}
        facts = (ExactMetric("peak_bytes", 1.0, 2.0),)
        rows = {case: Row(case, "larger", facts=facts) for case in cases.values()}
        found = merge_rows(rows, SequentialTest(self.measure(names)))
        assert {row.case.attention: row.finding for row in found.values()} == {
            "both": "slower and larger",
            "larger": "larger",
            "late": "slower and larger",
            "cheat": "failed",
        }
        assert all(row.facts == facts for row in found.values())
        late = {cases["late"]: Row(cases["late"], "larger", facts=facts)}
        late = merge_rows(late, SequentialTest(self.measure(names, SCREENING[0])))
        (row,) = late.values()
        assert row.finding == "larger" and row.time_ratio is not None
        assert row.note.startswith("whether it is slower is not decided: the time was over")
        console = Console(width=100, record=True)
        render(comparison(*found.values(), row), console)
        said = " ".join(console.export_text().split())
        assert "slower and larger" in said and "whether it is slower is not decided" in said

    def test_ratios_within_the_slack_are_not_measured_again(self) -> None:
        rows, calls = self.of({"a": 0.005, "b": -0.1})
        assert [r.finding for r in rows] == ["same", "faster"]
        assert len(calls) == SCREENING[0]


def normalised_noise(draw: np.random.Generator, kind: str, size: tuple[int, ...]) -> Any:
    """Return noise of standard deviation 1."""
    noise = draw.normal(0, 1, size)
    if kind == "heavy tails":
        noise = draw.standard_t(3, size) / 3**0.5
    if kind == "spikes":
        noise = (noise + draw.normal(0, 4, size) * (draw.random(size) < 0.1)) / 2.6**0.5
    return noise


KINDS = pytest.mark.parametrize("kind", ["normal", "heavy tails", "spikes"])


@KINDS
def test_interval_covers_if_the_spread_is_as_calibrated(kind: str) -> None:
    draw, spread = np.random.default_rng(2), 0.012
    for pairs in (*decision_rule.SCREENING, *decision_rule.CONFIRMING):
        noise = normalised_noise(draw, kind, (300, pairs))
        found = [decision_rule.estimate((spread * row).tolist(), spread) for row in noise]
        assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.92  # 0.95 within noise


@KINDS
@pytest.mark.parametrize("times", [1.0, 1.5, 2.5])
def test_intervals_of_whole_runs_cover_on_a_machine_that_is_noisier_than_calibrated(
    kind: str, times: float
) -> None:
    """Wherever screening and confirmation stop: 320 cases of the same code, 32 a run."""
    draw = np.random.default_rng(3)
    cases = [Case("speed", f"a{n}", 128, "float32", "forward") for n in range(32)]

    def measure(some: Sequence[Case], turn: int) -> Iterator[tuple[Case, Measurement]]:
        noise = times * decision_rule.TYPICAL * normalised_noise(draw, kind, (len(some),))
        for case, ratio in zip(some, noise.tolist(), strict=True):
            yield case, Measurement(ratio, (1.0,), (1.0,))

    rows = [row for _ in range(10) for row in SequentialTest(measure).rows(cases).values()]
    assert {row.finding for row in rows} <= {"same", "faster"}
    ratios = [row.time_ratio for row in rows]
    assert np.mean([one is not None and one.low <= 1 <= one.high for one in ratios]) >= 0.945


def test_noise_is_that_of_the_median_case() -> None:
    draw, spread = np.random.default_rng(4), 0.012
    factors = []
    for _ in range(40):
        samples = [(row.tolist(), spread) for row in draw.normal(0, 2 * spread, (32, 3))]
        odd = [([0.5, -0.5, 0.1], spread), ([0.0], spread)]
        factors.append(decision_rule.noise_factor([*samples, *odd]))
    assert 1.8 < np.mean(factors) < 2.2 and max(factors) < 3
    assert decision_rule.noise_factor([([0.0, 1e-4, 0.0], spread)] * 8) == 1.0
    assert decision_rule.noise_factor([]) == 1.0
