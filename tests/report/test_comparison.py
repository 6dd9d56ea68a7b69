"""Comparison of recorded runs: what moved, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from simulated_runs import QUIET, again, measured_again, slower, stored

from danon.report.comparison import Comparison, compare_attentions, compare_runs
from danon.report.comparison_output import to_json, write_page
from danon.report.terminal_comparison import format_change, print_comparison
from danon.runs.case import CONTENDED_CORES, Case, CaseResult
from danon.runs.journal import RecordedRun

SEEDS = range(12)


def changed(change: Callable[[CaseResult], CaseResult | None]) -> Comparison:
    return compare_runs([stored()], [again(stored(), change)])


def with_metrics(result: CaseResult, **metrics: float) -> CaseResult:
    return dataclasses.replace(result, metrics={**result.metrics, **metrics})


def printed(comparison: Comparison, width: int = 100, *, everything: bool = False) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_comparison(comparison, console, everything=everything)
    return [line.rstrip() for line in console.export_text().splitlines()]


def narrow_cases() -> list[CaseResult]:
    """Return cases whose interval became narrow in time."""
    return [
        x
        for x in stored().results
        if x.case.attention in ("ucsa", "msra", "dala", "window")
        and x.metrics.get("conclusive") == 1.0
        and "time_ratio" in x.metrics
    ]


class TestNoise:
    def test_the_same_figures(self) -> None:
        comparison = changed(lambda result: result)
        assert not comparison.moved
        assert len(comparison.tested) > 100
        assert all(figure.change.value == 0 for figure in comparison.figures)

    def test_the_same_code_measured_again(self) -> None:
        alarms = [
            seed for seed in SEEDS if compare_runs([stored()], [measured_again(seed, QUIET)]).moved
        ]
        assert len(alarms) <= 1

    def test_one_case_20_percent_slower(self) -> None:
        cases = narrow_cases()
        exact = 0
        for seed in SEEDS:
            case = cases[seed % len(cases)].case
            again = measured_again(100 + seed, QUIET, planted=case)
            moved = compare_runs([stored()], [again]).moved
            assert {figure.case for figure in moved} <= {case}
            exact += [figure.case for figure in moved] == [case]
            assert not any(figure.better for figure in moved)
        assert exact >= 9

    def test_many_cases_of_one_attention(self) -> None:
        comparison = changed(
            lambda x: slower(x, 1.5) if x.case.attention == "ucsa" and x.samples else x
        )
        names = {figure.case.attention for figure in comparison.moved}
        assert names == {"ucsa"}
        assert comparison.moved[0].change.value == pytest.approx(1 / 1.5 - 1)

    def test_noise_of_one_attention_is_that_of_all(self) -> None:
        noisy = measured_again(0, 6 * QUIET)
        whole, part = compare_runs([stored()], [noisy]), compare_runs([stored()], [noisy], "window")
        assert part.figures
        figures = [f for f in whole.figures if f.case.attention == "window"]
        assert repr(figures) == repr([*part.figures])  # NaN equals nothing


class TestRepeatedRuns:
    """Five runs a side, where equal runs differ by five percent."""

    NOISE = 0.05

    def runs(self, seed: int, planted: Case | None = None) -> list[RecordedRun]:
        return [measured_again(1000 * seed + i, self.NOISE, planted=planted) for i in range(5)]

    def test_the_same_code(self) -> None:
        alarms = [s for s in SEEDS[:6] if compare_runs(self.runs(s), self.runs(100 + s)).moved]
        assert len(alarms) <= 1

    def test_one_case_20_percent_slower(self) -> None:
        cases, found, alone = narrow_cases(), 0, 0
        for seed in SEEDS[:6]:
            case = cases[seed % len(cases)].case
            before, after = self.runs(seed), self.runs(100 + seed, planted=case)
            moved = compare_runs(before, after).moved
            assert {figure.case for figure in moved} <= {case}
            found += [figure.case for figure in moved] == [case]
            alone += bool(compare_runs(before[:1], after[:1]).moved)
        assert found >= 5 > 2 * alone

    def test_one_disturbed_run(self) -> None:
        case = narrow_cases()[0].case
        before, after = self.runs(0), self.runs(100)
        after[1] = again(after[1], lambda x: slower(x, 1.6) if x.case == case else x, "disturbed")
        assert not compare_runs(before, after).moved

    def test_a_run_beside_other_programs_does_not_count(self) -> None:
        case = narrow_cases()[0].case

        def contended(result: CaseResult) -> CaseResult:
            if result.case != case:
                return result
            return with_metrics(slower(result, 3.0), **{CONTENDED_CORES: 1.0})

        before, after = self.runs(0), self.runs(100)
        quiet = compare_runs(before, after[:2] + after[3:])
        after[2] = again(after[2], contended, "contended")
        comparison = compare_runs(before, after)
        figures = [next(f for f in c.figures if f.case == case) for c in (quiet, comparison)]
        assert figures[0].after.value == pytest.approx(figures[1].after.value)
        assert case.attention not in comparison.doubtful

    def test_a_case_that_one_run_lacks(self) -> None:
        case = narrow_cases()[0].case
        before, after = self.runs(0), self.runs(100)
        after[0] = again(after[0], lambda x: None if x.case == case else x, "without")
        comparison = compare_runs(before, after)
        assert case in {figure.case for figure in comparison.tested}


class TestExactFigures:
    def test_a_larger_state(self) -> None:
        comparison = changed(
            lambda x: (
                with_metrics(x, state_bytes=2 * x.metrics["state_bytes"])
                if x.case.attention == "msra" and "state_bytes" in x.metrics
                else x
            )
        )
        assert {(f.case.attention, f.metric.name) for f in comparison.moved} == {
            ("msra", "state_bytes")
        }
        assert all(math.isnan(figure.p) and not figure.better for figure in comparison.moved)

    def test_rounding_of_an_error(self) -> None:
        comparison = changed(
            lambda x: (
                with_metrics(x, error_vs_dense=x.metrics["error_vs_dense"] * 1.0001)
                if "error_vs_dense" in x.metrics
                else x
            )
        )
        assert not comparison.moved

    def test_answers_of_a_model(self) -> None:
        full = RecordedRun.read(stored().run_dir)

        def fewer(result: CaseResult) -> CaseResult:
            wrong = result.case.attention == "msra" and result.case.task == "lookup"
            right = result.metrics.get("accuracy", 0.0)
            return with_metrics(result, accuracy=right / 2) if wrong and right else result

        moved = compare_runs([full], [again(full, fewer)]).moved
        assert {(f.case.attention, f.metric.name) for f in moved} == {("msra", "accuracy")}
        assert all(f.change.low < f.change.value < f.change.high < 0 for f in moved)


class TestNotCompared:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (
                lambda x: dataclasses.replace(x, semantics="window 1"),
                "measured with other settings",
            ),
            (
                lambda x: dataclasses.replace(x, config={**x.config, "kernel": "dense"}),
                "measured with other settings",
            ),
            (
                lambda x: with_metrics(x, **{CONTENDED_CORES: 1.0}),
                "other programs took its cores (†)",
            ),
            (
                lambda x: dataclasses.replace(x, notes={"threads": "1"}),
                "it changed settings of the process (†)",
            ),
            (
                lambda x: dataclasses.replace(x, place={"machine": {"cpu": "other"}}),
                "measured on different machines",
            ),
        ],
    )
    def test_a_reason(self, change: Callable[[CaseResult], CaseResult], reason: str) -> None:
        one = narrow_cases()[0].case
        comparison = changed(lambda x: slower(change(x), 3.0) if x.case == one else x)
        (figure,) = [f for f in comparison.figures if f.case == one and f.metric.name == "speedup"]
        assert (figure.outcome, figure.reason) == ("untested", reason)
        assert comparison.reasons[reason] >= 1
        assert not comparison.moved

    def test_a_case_of_one_run(self) -> None:
        one = narrow_cases()[0].case
        comparison = changed(lambda x: None if x.case == one else x)
        assert [(x.case, x.reason) for x in comparison.unpaired] == [(one, "only in the first run")]
        assert not comparison.broken

    def test_a_failed_row(self) -> None:
        one = narrow_cases()[0].case

        def fail(result: CaseResult) -> CaseResult:
            failed = CaseResult(result.case, "failed", reason="RuntimeError: no")
            return failed if result.case == one else result

        (broken,) = changed(fail).broken
        assert (broken.case, broken.reason) == (one, "failed in the second run")
        assert broken.detail == "RuntimeError: no"
        assert any("RuntimeError: no" in line for line in printed(changed(fail)))

    def test_a_missing_metric(self) -> None:
        one = narrow_cases()[0]
        bare = dataclasses.replace(one, metrics={"time_s": 1.0})
        comparison = changed(lambda x: bare if x.case == one.case else x)
        assert comparison.reasons == {
            "speedup is missing on one side": 1,
            "error_vs_dense is missing on one side": 1,
        }

    def test_another_seed(self) -> None:
        other = again(stored(), lambda x: x)
        other = dataclasses.replace(other, info=dataclasses.replace(other.info, seed=1))
        comparison = compare_runs([stored()], [other])
        assert "measured with another seed" in comparison.reasons
        assert len(comparison.tested) > 100  # times hardly depend on it
        assert "seed 0 and 1" in comparison.differences


class TestAttentions:
    def test_two_attentions(self) -> None:
        comparison = compare_attentions(stored(), "ucsa", "window")
        figures = {
            (f.case.suite, f.case.length): f
            for f in comparison.figures
            if f.metric.name == "speedup" and f.case.dtype == "bfloat16"
        }
        long = figures["decode", 65536]
        assert long.outcome == "moved" and long.better
        assert long.after.value / long.before.value - 1 == pytest.approx(long.change.value)
        assert comparison.names == ("ucsa", "window")

    def test_dense_attention(self) -> None:
        comparison = compare_attentions(stored(), "sdpa", "window")
        figures = [f for f in comparison.figures if f.metric.name == "speedup"]
        assert figures
        assert all(f.before.value == 1.0 for f in figures)

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (("ucsa", "ucsa"), "given twice"),
            (("ucsa", "nope"), "'nope' is not recorded; recorded: "),
        ],
    )
    def test_wrong_names(self, names: tuple[str, str], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            compare_attentions(stored(), *names)


def crowded() -> Comparison:
    """Return a comparison with everything that is printed."""

    def change(result: CaseResult) -> CaseResult:
        if result.case.attention == "dala":
            return CaseResult(result.case, "failed", reason="a long reason " * 20)
        if result.case.attention == "longformer":
            return dataclasses.replace(result, semantics="other")
        if result.case.attention == "nsa":
            return with_metrics(result, **{CONTENDED_CORES: 1.0})
        return slower(with_metrics(result, error_vs_dense=0.5), 3.0)

    other = again(stored(), change)
    facts = {**other.info.fingerprint, "memory_gib": "1", "os": "Linux " * 20, "python": "3.99"}
    versions = {**other.info.versions, "numpy": "99", "torch": "99"}
    info = dataclasses.replace(other.info, fingerprint=facts, versions=versions, profile="full")
    return compare_runs([stored()], [dataclasses.replace(other, info=info, status="KILLED")])


class TestOutput:
    @pytest.mark.parametrize("width", [80, 100])
    def test_at_most_40_lines(self, width: int) -> None:
        lines = printed(crowded(), width)
        assert len(lines) <= 40, "\n".join(lines)
        assert max(map(len, lines)) <= width
        (heading,) = [line for line in lines if line.startswith("attention")]
        assert heading.split()[-1] in ("change", "%")

    @pytest.mark.parametrize("width", [80, 100])
    def test_names_are_whole(self, width: int) -> None:
        lines = printed(changed(lambda result: result), width, everything=True)
        for name in ("local-attention-balanced", "forward+backward float32 4k"):
            assert any(name in line for line in lines)
        assert not any("…" in line for line in lines)

    def test_everything(self) -> None:
        comparison = crowded()
        lines = printed(comparison, 120, everything=True)
        assert len(lines) > len(comparison.figures)

    def test_nothing_moved(self) -> None:
        lines = printed(changed(lambda result: result))
        assert any(line.startswith("0 of 106 figures with noise moved, 0 of") for line in lines)

    def test_json(self) -> None:
        values = json.loads(to_json(crowded()))
        assert {x["outcome"] for x in values["figures"]} == {"moved", "same", "untested"}
        assert values["runs"] == [[stored().info.run_id], ["again"]]
        assert "NaN" not in to_json(crowded())

    def test_page(self, tmp_path: Path) -> None:
        path = tmp_path / "comparison.html"
        comparison = crowded()
        write_page(comparison, path)
        text = path.read_text(encoding="utf-8")
        assert text.count("<tr>") >= len(comparison.figures) + len(comparison.unpaired)
        assert "other programs took its cores" in text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.2, "+20 %"), (-0.031, "-3.1 %"), (11.0, "x12"), (math.nan, "-"), (0.0, "+0.0 %")],
    )
    def test_change(self, value: float, text: str) -> None:
        assert format_change(value) == text
