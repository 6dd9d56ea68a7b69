"""Error rates of the gate in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gate_rounds import rounds
from rich.console import Console
from test_report import Page, payload_of

from danon.report.gate_error_rates import gate_error_rates
from danon.report.html_report import write_report
from danon.runs.case import Case, CaseResult
from danon.runs.run_info import RunInfo
from gate_validation.command import validate
from gate_validation.error_rates import OURS, error_rates
from gate_validation.rounds import append, read

SPEED = CaseResult(
    Case("speed", "sdpa", 64, "float32", "forward"), "measured", metrics={"time_s": 1.0}
)
RESULTS = Path(__file__).parents[2] / "results" / "gate_validation"


def report(results: Path) -> Page:
    path = results / "runs" / "one" / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report([SPEED], RunInfo.capture("smoke", 0, "danon bench", {"id": "0"}), path)
    return Page(path)


def test_report_has_counted_error_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gate_validation.command.OTHER_TOOLS", {"any": lambda: lambda base, head: True}
    )
    assert "How often the gate errs" not in report(tmp_path).text
    place = tmp_path / "gate_validation"
    assert validate("quiet", 0, place, Console(record=True)) == 0
    assert "How often the gate errs" not in report(tmp_path).text, "there are no rounds"
    for some in rounds(0.0, 33) + rounds(0.1, 33, seed=1):
        append(place / "rounds.jsonl", some)
    assert validate("quiet", 0, place, Console(record=True)) == 0
    page = report(tmp_path)
    for said in ("How often the gate errs", "66 rounds", "0 of 11", "66 of 66", "+10 %", OURS):
        assert said in page.text, said
    ((ours, *_),) = payload_of(page)["alarms"]
    assert ours["method"] == OURS, "first, whatever the others are called"
    assert [(x["slowdown"], x["alarms"]) for x in ours["shares"]] == [(0.0, 0), (0.1, 66)]
    drawn = {a.get("id") for tag, a in page.tags if tag == "div" and a.get("class") == "chart"}
    assert "alarms-0" in drawn


@pytest.mark.parametrize("text", ["{", "[]", '{"time": [{}]}', '{"time": []}'])
def test_wrong_rates_file_is_named_in_the_report(tmp_path: Path, text: str) -> None:
    place = tmp_path / "gate_validation" / "rates.json"
    place.parent.mkdir()
    place.write_text(text)
    page = report(tmp_path)
    assert "rates.json was not written by gate_validation" in page.text and "sdpa" in page.text


@pytest.mark.slow
def test_stored_rates_are_those_of_the_stored_rounds() -> None:
    """A change of the decision rule needs ``python -m gate_validation --minutes 0``."""
    found = error_rates(read(RESULTS / "rounds.jsonl"), {})
    kept = json.loads((RESULTS / "rates.json").read_text())["time"]
    kept = [x for x in kept if x["method"] == OURS]
    assert [(x.load, x.slowdown, x.alarms, x.runs) for x in found] == [
        (x["load"], x["slowdown"], x["alarms"], x["runs"]) for x in kept
    ]
    for rate in found:  # the bars: one in a hundred runs at most, and 90 and 99 %
        least = {0.0: 0.0, 0.03: 0.0, 0.05: 0.9}.get(rate.slowdown, 0.99)
        most = 0.01 if rate.slowdown == 0 else 1.0
        assert least <= rate.alarms / rate.runs <= most, rate
    shown = gate_error_rates(RESULTS.parent / "runs" / "one" / "report.html")
    assert shown is not None and len(shown.panels) == len({rate.load for rate in found})
