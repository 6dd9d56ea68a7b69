"""The runner of cases, its order of cases and its forecasts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repositories import MINE

from danon.attention import registry
from danon.attention.discovery import discover
from danon.bench.cost_forecast import CostForecaster, Forecast
from danon.bench.profile import CaseGrid, Profile
from danon.bench.profile_names import DESCRIPTIONS
from danon.bench.runner import CaseRunner
from danon.bench.suite import planned_cases
from danon.bench.suite_selection import select_suites
from danon.config.mechanism import mechanisms
from danon.runs.case import Case, CaseResult
from suites.profiles import PROFILES
from suites.speed import Speed


class TestProfiles:
    def test_order_of_attentions_and_lengths(self) -> None:
        cases = planned_cases(PROFILES["quick"], ("sdpa", "window"), "cpu")
        assert len({case.id for case in cases}) == len(cases)
        lengths = [case.length for case in cases if case.length and not case.task]
        assert lengths == sorted(lengths)
        assert [case.attention for case in cases[:2]] == ["sdpa", "window"]
        assert all(case.length == 0 for case in cases if case.suite == "scaling")

    @pytest.mark.parametrize("name", PROFILES)
    def test_scaling_has_enough_lengths(self, name: str) -> None:
        profile = PROFILES[name]
        for grid in profile.grids["scaling"]:
            assert len(grid.lengths) >= 3

    def test_every_profile_is_described_for_users(self) -> None:
        assert tuple(DESCRIPTIONS) == tuple(PROFILES) == ("smoke", "quick", "standard", "full")

    def test_shorter_cases_end_in_none(self) -> None:
        case = Case("speed", "sdpa", 16384, "bfloat16", "forward")
        shorter = Speed.shorter(PROFILES["quick"], case)
        assert shorter is not None
        assert shorter.length == 4096
        first = replace(case, length=1024)
        assert Speed.shorter(PROFILES["quick"], first) is None

    def test_quick_measures_attentions_that_people_choose_between(self, tmp_path: Path) -> None:
        profile = PROFILES["quick"]
        names, _ = discover((), (), default=profile.attentions)
        assert names[0] == "sdpa" and {*mechanisms(), "window"} <= {*names}
        assert len(names) == 10
        # What the user names is measured as well, or alone.
        (tmp_path / "mine.py").write_text(MINE.format(work=1))
        target = f"{tmp_path}/mine.py:MyAttention"
        try:
            added, _ = discover((target, "bigbird"), (), default=profile.attentions)
            assert {*added} == {*names, "MyAttention", "bigbird"}
            alone, _ = discover((target,), ("bigbird",), default=profile.attentions)
            assert alone == ("sdpa", "bigbird", "MyAttention")
        finally:
            registry.remove("MyAttention")

    def test_quick_runs_suites_of_one_configuration(self) -> None:
        default = PROFILES["quick"].suites
        chosen = select_suites((), print, default)
        assert chosen == ("speed", "memory", "decode", "scaling", "pretrained")
        assert select_suites(("recall",), print, default) == ("recall",)
        assert {*chosen, "recall", "language", "bounds"} == {*select_suites((), print)}


class TestForecast:
    def costs(self, *known: tuple[int, float]) -> CostForecaster:
        costs = CostForecaster()
        for length, seconds in known:
            costs.add(Case("speed", "a", length, "float32", "forward"), seconds)
        return costs

    def seconds(self, costs: CostForecaster, length: int) -> float:
        found = costs.forecast(Case("memory", "a", length, "float32", "forward"), 7)
        assert found is not None
        return found.seconds

    def test_forecast_from_one_length(self) -> None:
        costs = self.costs((1000, 1.0))
        assert self.seconds(costs, 4000) == pytest.approx(8 * self.seconds(costs, 1000))

    def test_forecast_from_two_lengths(self) -> None:
        costs = self.costs((1000, 1.0), (4000, 4.0))
        growth = self.seconds(costs, 16000) / self.seconds(costs, 4000)
        assert 4 < growth < 8

    def test_no_forecast_for_other_attentions(self) -> None:
        costs = self.costs((1000, 1.0))
        assert costs.forecast(Case("speed", "b", 2000, "float32", "forward"), 7) is None
        assert costs.forecast(Case("speed", "a", 2000, "bfloat16", "forward"), 7) is None


@pytest.fixture
def runner() -> CaseRunner:
    discover((), ())
    block = CaseGrid("forward", ("float32",), (64, 128))
    grids = dict.fromkeys(("speed", "memory", "bounds"), (block,))
    profile = Profile(grids, seconds=0.05, width=0.1, cap_s=20.0)
    return CaseRunner(profile, on_begin=lambda case: None, on_result=lambda result: None)


def speed(attention: str, length: int) -> Case:
    return Case("speed", attention, length, "float32", "forward")


class TestCaseRunner:
    def test_case_is_measured_once(self, runner: CaseRunner) -> None:
        assert runner.result(speed("sdpa", 64)) is runner.result(speed("sdpa", 64))

    def test_expensive_case_is_not_started(
        self, runner: CaseRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            CostForecaster,
            "forecast",
            lambda self, case, calls, kind, exponent: Forecast(300.0, 64),
        )
        found = runner.result(speed("window", 64))
        assert found.status == "over budget"
        assert found.reason.startswith("estimated 300 s at least, going by 64 tokens")
        assert not found.metrics
        assert "over budget already" in runner.result(speed("window", 128)).reason

    def test_extrapolated_dense_attention_is_marked(
        self, runner: CaseRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = CostForecaster.forecast

        def forecast(self: CostForecaster, case: Case, *others: Any) -> Forecast | None:
            dense_and_long = case.attention == "sdpa" and case.length == 128
            return Forecast(300.0, 64) if dense_and_long else original(self, case, *others)

        monkeypatch.setattr(CostForecaster, "forecast", forecast)
        found, dense = runner.result(speed("window", 128)), runner.result(speed("sdpa", 64))
        assert found.status == "measured", found.reason
        expected = found.metrics["time_s"] / (4 * dense.metrics["time_s"])
        assert found.metrics["time_ratio_extrapolated"] == pytest.approx(expected)
        assert found.metrics["speedup_extrapolated"] == pytest.approx(1 / expected)
        assert found.metrics["extrapolated_from_length"] == 64
        assert not {"time_ratio", "speedup", "reference_time_s"} & set(found.metrics)
        assert list(found.samples) == ["candidate_s"]

    def test_out_of_memory_is_over_budget(
        self, runner: CaseRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hungry(*args: object) -> None:
            raise RuntimeError("can't allocate memory: you tried to allocate 4297064448 bytes.")

        monkeypatch.setattr(registry.get("window"), "forward", hungry)
        found = runner.result(speed("window", 64))
        assert found.status == "over budget"
        assert found.reason == "out of memory: 4,098 MiB more was too much"

    def test_earlier_outcomes_are_reused(self) -> None:
        heard: list[object] = []
        known = CaseResult(speed("sdpa", 64), "measured", metrics={"time_s": 1.0})
        runner = CaseRunner(
            PROFILES["smoke"], on_begin=heard.append, on_result=heard.append, earlier=[known]
        )
        assert runner.result(speed("sdpa", 64)) is known
        assert heard == []
