"""Figures of the suite bounds in words and tables."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from danon.report import bound_tables as tables
from danon.report import formatting
from danon.report.figure import Figure
from danon.report.html_report import write_report
from danon.runs.case import Case, CaseResult
from danon.runs.run_info import RunInfo


def test_report_without_the_suite(tmp_path: Path) -> None:
    speed = CaseResult(
        Case("speed", "sdpa", 64, "float32", "forward"), "measured", metrics={"time_s": 1.0}
    )
    info = RunInfo.capture("smoke", 0, "danon bench", {"id": "0"})
    write_report([speed], info, tmp_path / "report.html")
    assert "bounds-mass" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.0, 0.0, 0.0), "exact"),
        ((1.0, 2.0, 4.0), "grows"),
        ((4.0, 2.0, 1.0), "holds"),
        ((1.0, 3.0, 1.1), "undecided"),
        ((0.0, 1.0, 2.0), "undecided"),
        ((), ""),
    ],
)
def test_verdict_by_growth(values: tuple[float, ...], verdict: str) -> None:
    points = dict(zip((1024, 4096, 16384), values, strict=False))
    row = tables.Row("msra", "ours", "", {"eps": points}, {})
    assert row.verdict("eps") == verdict


def test_growth_from_two_lengths_has_no_interval() -> None:
    found = tables.growth({1024: 1.0, 4096: 2.0})
    assert found.value == pytest.approx(0.5)
    assert math.isnan(found.low)
    assert formatting.format_signed(found) == "+0.50?"
    assert formatting.format_signed(Figure(-0.5, -0.6, -0.4)) == "-0.50"
    assert formatting.format_signed(tables.growth({1024: 1.0})) == "-"


def test_format_of_distances() -> None:
    written = [
        formatting.format_distance(x) for x in (0.0, 2.3e-7, 0.031, 0.9996, 46.07, 273.6, math.nan)
    ]
    assert written == ["0", "2.3e-07", "0.031", "1.00", "46.1", "274", "-"]


def test_format_of_shares_with_one_owner() -> None:
    assert formatting.format_shares({"near": 0.91, "level 1": 0.09}) == "near 91% level 1 9%"
    assert (
        formatting.format_shares({"msra.near": 0.9, "msra.sinks": 0.1})
        == "msra: near 90% sinks 10%"
    )
    assert (
        formatting.format_shares({"msra.near": 0.5, "dala.near": 0.5})
        == "msra.near 50% dala.near 50%"
    )
    assert formatting.format_shares({}) == "-"


def test_claimed_orders_beside_measured_exponents() -> None:
    def result(suite: str, length: int, **metrics: float) -> CaseResult:
        phase = "decode" if suite == "decode" else "forward"
        where = Case(suite, "msra", length, "bfloat16", phase)  # type: ignore[arg-type]
        return CaseResult(where, "measured", metrics=metrics)

    exponents = {"time_exponent": 1.1, "time_exponent_low": 1.0, "time_exponent_high": 1.2}
    found = tables.bounds(
        [
            result("bounds", 1024, eps=1.0, total_variation=0.1),
            result("scaling", 0, **exponents),
            result("decode", 1024, state_bytes=10.0),
            result("decode", 4096, state_bytes=20.0),
        ],
        "",
    )
    assert found is not None
    time, state = found.rows[0].orders
    assert (time.claim, time.measured) == ("N log N", Figure(1.1, 1.0, 1.2))
    assert (state.claim, state.measured.value) == ("log N", pytest.approx(0.5))
