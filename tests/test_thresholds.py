"""Thresholds: the file, what moves them, and what the gate makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repositories import MINE, git
from rich.console import Console

from danon.gate import command
from danon.gate.accept import Allowance, accept, allowances
from danon.gate.command import THRESHOLDS, Options, acceptance, calibrate, gate
from danon.gate.comparison import Fact, Row
from danon.gate.facts import judged
from danon.gate.thresholds import Accepted, Threshold, Thresholds, ThresholdsError
from danon.measure.case import Case
from danon.measure.fingerprint import fingerprint

CASE = Case("speed", "MyAttention", 128, "float32", "forward")
HERE = fingerprint(torch.device("cpu"))


def threshold(relative_time: float = 2.0, **facts: float) -> Threshold:
    return Threshold(relative_time=relative_time, spread=0.01, drift=0.02, facts=facts)


def thresholds(*, fingerprint: dict[str, str] = HERE, **cases: Threshold) -> Thresholds:
    return Thresholds(
        commit="a" * 40, when="2026-01-31", pairs=10, fingerprint=fingerprint, cases=cases
    )


class TestFile:
    """results/thresholds.json, as people edit it."""

    def test_it_is_read_as_written_and_stays_the_same(self, tmp_path: Path) -> None:
        place = tmp_path / "results" / "thresholds.json"
        some = thresholds(b=threshold(flops=8.0, peak_bytes=4.0), a=threshold())
        some.write(place)
        text = place.read_text()
        assert Thresholds.read(place) == some
        assert text.index('"a"') < text.index('"b"') and text.endswith("}\n")
        Thresholds.read(place).write(place)
        assert place.read_text() == text

    @pytest.mark.parametrize(("change", "words"), [
        ({"cases": {"a": {"relative_time": -1}}}, "cases -> a -> relative_time: .*greater than 0"),
        ({"cases": {"a": {"relative_time": "NaN"}}}, "relative_time"),
        ({"cases": {"a": {"facts": {"flops": "many"}}}}, "facts -> flops: .*valid number"),
        ({"cases": {"a": {"history": [{"why": ""}]}}}, r"history -> 0 -> .*\(5 more\)"),
        ({"cases": {"a": {"relativ_time": 1}}}, "relativ_time: Extra inputs are not permitted"),
        ({"format": 2}, "format: Input should be 1"),
    ])  # fmt: skip
    def test_what_is_wrong_in_it_is_named(
        self, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        place = tmp_path / "thresholds.json"
        values = json.loads(thresholds(a=threshold()).model_dump_json())
        for name, new in change.pop("cases", {}).items():
            values["cases"][name] |= new
        place.write_text(json.dumps(values | change))
        with pytest.raises(ThresholdsError, match=words):
            Thresholds.read(place)

    def test_none_and_half_a_file(self, tmp_path: Path) -> None:
        place = tmp_path / "thresholds.json"
        with pytest.raises(ThresholdsError, match="is not there: `nox -s calibrate` measures it"):
            Thresholds.read(place)
        place.write_text('{"format": 1, "cas')
        with pytest.raises(ThresholdsError, match="the file: Invalid JSON"):
            Thresholds.read(place)


def compared(place: Path, ratio: float | None, *facts: Fact) -> Path:
    """A gate.json with that figure of the case."""
    time = None if ratio is None else {"value": ratio, "low": ratio, "high": ratio}
    row = {"case": {"id": "a"}, "time_ratio": time, "facts": [f.__dict__ for f in facts]}
    place.write_text(json.dumps({"head": "b" * 40, "rows": [row]}))
    return place


class TestAccept:
    """Moving a threshold."""

    def test_what_was_measured_becomes_the_threshold(self, tmp_path: Path) -> None:
        found = compared(tmp_path / "gate.json", 1.25, Fact("flops", 8.0, 16.0))
        old = thresholds(a=threshold(2.0, flops=8.0, parameters=3.0), b=threshold())
        new = accept(old, found, "a", why="exact now", by="Ada")
        assert new.cases["a"].relative_time == 2.5
        assert new.cases["a"].facts == {"flops": 16.0, "parameters": 3.0}
        (kept,) = new.cases["a"].history
        assert (kept.why, kept.by, kept.commit) == ("exact now", "Ada", "b" * 40)
        assert (kept.relative_time, kept.facts) == (2.0, {"flops": 8.0, "parameters": 3.0})
        assert new.cases["b"] == old.cases["b"]
        again = accept(new, found, "a", why="twice", by="Ada")
        assert [entry.why for entry in again.cases["a"].history] == ["exact now", "twice"]

    @pytest.mark.parametrize(("name", "why", "ratio", "words"), [
        ("a", " ", 1.2, "needs --why"), ("c", "so", 1.2, "no threshold of 'c'; known: a"),
        ("a", "so", None, "no figures of 'a'"),
    ])  # fmt: skip
    def test_what_cannot_be_accepted(
        self, tmp_path: Path, name: str, why: str, ratio: float | None, words: str
    ) -> None:
        found = compared(tmp_path / "gate.json", ratio)
        with pytest.raises(ThresholdsError, match=words):
            accept(thresholds(a=threshold()), found, name, why=why, by="Ada")
        with pytest.raises(ThresholdsError, match="run the gate first"):
            accept(thresholds(a=threshold()), tmp_path / "none", "a", why="so", by="Ada")

    def test_between_two_commits_only_what_was_accepted_there_is_allowed(self) -> None:
        entry = Accepted(
            when="2026-02-01", commit="b", by="Ada", why="exact now", relative_time=2.0, facts={}
        )
        before = thresholds(a=threshold(2.0), b=threshold(2.0), c=threshold(2.0))
        moved = threshold(2.5, flops=16.0).model_copy(update={"history": (entry,)})
        after = thresholds(a=moved, b=threshold(2.5), d=moved)  # nobody accepted b
        found = allowances(before, after)
        assert list(found) == ["a"] and found["a"].why == "exact now"
        assert found["a"].log_time == pytest.approx(math.log(1.25))
        assert allowances(None, after) == allowances(before, None) == {}

    def test_accepted_growth_is_no_regression_and_more_is(self) -> None:
        allowed = Allowance(0.0, {"flops": 16.0}, "exact now")
        row = judged(CASE, {"flops": 8.0}, {"flops": 16.0}, allowed)
        assert row.finding == "same" and row.note == "accepted: exact now"
        assert judged(CASE, {"flops": 8.0}, {"flops": 17.0}, allowed).finding == "larger"
        both = {"flops": 8.0, "peak_bytes": 1.0}, {"flops": 16.0, "peak_bytes": 2.0}
        assert judged(CASE, *both, allowed).finding == "larger"


@pytest.fixture
def own(repository: Path, monkeypatch: pytest.MonkeyPatch, gate_inputs: Path) -> Path:
    """A repository with an attention, at its first commit, and a gate of one small case."""
    git(repository, "reset", "--hard", "HEAD~1")
    git(repository, "config", "user.name", "Ada")
    git(repository, "config", "user.email", "ada@example.org")
    monkeypatch.setattr(command, "gate_cases", lambda names: [CASE])
    monkeypatch.setattr(command, "_inputs", lambda place: gate_inputs)
    monkeypatch.chdir(repository)
    return repository


OPTIONS = Options(("mine.py:MyAttention",), "", False, 2.0, Path("out"))


def told(run: Any, *arguments: Any) -> tuple[int, str]:
    console = Console(width=200, record=True)
    status: int = run(*arguments, console)
    return status, " ".join(console.export_text().split())


def commit(folder: Path, work: int, *more: str) -> None:
    (folder / "mine.py").write_text(MINE.format(work=work))
    git(folder, "commit", "-m", f"work {work}", "--", "mine.py", *more)


class TestGate:
    """From calibration to acceptance, in a repository of one's own."""

    def test_calibrated_gated_accepted(self, own: Path) -> None:
        status, said = told(gate, OPTIONS)
        assert status == 7 and "nox -s calibrate" in said

        status, said = told(calibrate, OPTIONS, 3)
        assert status == 0 and "1 of 1 cases calibrated" in said
        found = Thresholds.read(own / THRESHOLDS).cases[CASE.id]
        assert found.facts["flops"] == 4 * 4 * 128 * 128 * 64
        assert 0.3 < found.relative_time < 30 and 0.005 < found.spread < 1 and not found.history
        git(own, "add", str(THRESHOLDS))
        git(own, "commit", "-m", "thresholds")

        status, said = told(gate, OPTIONS)
        assert status == 0 and "thresholds of 20" in said and "no regression in 1 cases" in said

        commit(own, 2)
        status, said = told(gate, OPTIONS)
        assert status == 1 and "slower" in said and "floating point operations" in said

        status, said = told(acceptance, CASE.id, "twice as exact", Path("out"))
        assert status == 0 and "of dense attention's time; commit" in said
        moved = Thresholds.read(own / THRESHOLDS).cases[CASE.id]
        assert moved.relative_time > 1.3 * found.relative_time
        assert (moved.history[-1].by, moved.history[-1].why) == ("Ada", "twice as exact")
        git(own, "commit", "-am", "accept it")

        assert told(gate, OPTIONS)[0] == 0
        against = replace(OPTIONS, against="HEAD~2")
        status, said = told(gate, against)
        assert status == 0 and "accepted: twice as exact" in said

    def test_other_machines_are_told_apart(self, own: Path) -> None:
        """Bytes are not compared, operations are, times are given room, and it says so."""
        other = {**HERE, "torch": "9.9", "cpu": "abacus"}
        facts = {"flops": 4.0 * 4 * 128 * 128 * 64, "peak_bytes": 1.0, "parameters": 0.0}
        for work, status, words in ((1, 0, "no regression"), (2, 1, "larger")):
            commit(own, work) if work == 2 else None
            known = threshold(1000.0, **facts)  # nothing is slower than that
            thresholds(fingerprint=other, **{CASE.id: known}).write(own / THRESHOLDS)
            git(own, "add", str(THRESHOLDS))
            git(own, "commit", "-m", "thresholds", "--allow-empty")
            found, said = told(gate, OPTIONS)
            assert found == status and words in said
            assert "of another machine (abacus, torch 9.9)" in said
            assert "3 times as much; bytes and graph breaks are not compared" in said
            assert "peak memory" not in said

    def test_calibrating_again_is_told_in_the_history(self, own: Path) -> None:
        known = threshold(1000.0, flops=1.0)
        thresholds(**{CASE.id: known}, other=known).write(own / THRESHOLDS)
        git(own, "add", ".")
        git(own, "commit", "-m", "thresholds")
        assert told(calibrate, OPTIONS, 2)[0] == 0
        found = Thresholds.read(own / THRESHOLDS).cases
        assert found["other"] == known  # not measured: stays
        (entry,) = found[CASE.id].history
        assert (entry.why, entry.relative_time) == ("calibrated again", 1000.0)
        assert found[CASE.id].relative_time < 100

    def test_bad_input(self, own: Path) -> None:
        assert told(calibrate, OPTIONS, 1) == (2, "danon gate: --pairs 1: must be at least 2")
        (own / THRESHOLDS).parent.mkdir()
        (own / THRESHOLDS).write_text("{}")
        git(own, "add", ".")
        git(own, "commit", "-m", "wrong")
        status, said = told(gate, OPTIONS)
        assert status == 7 and "commit: Field required" in said


def test_a_case_without_threshold_is_new() -> None:
    row = judged(CASE, "there is no threshold of it", {"flops": 1.0})
    assert row == Row(CASE, "new", note="there is no threshold of it")
