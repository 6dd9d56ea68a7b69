"""The gate's decisions from ratios: rates of error, stopping, and intervals."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from gate_results import comparison
from rich.console import Console

from danon.gate import decision_rule
from danon.gate.against_commit import merge_rows
from danon.gate.decision_rule import CONFIRMING, SCREENING, Decision, Tolerance
from danon.gate.paired_processes import Measurement
from danon.gate.result import ExactMetric, Row
from danon.gate.result_report import render
from danon.gate.sequential_test import Measure, SequentialTest
from danon.gate.worker_client import OutputError, TimeOverError
from danon.runs.case import Case


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
        """Return the rows of cases with these log ratios, and the groups measured together."""
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
        console = Console(width=100, record=True, file=io.StringIO())
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
