"""The gate's output: exit status, table, Markdown and JUnit."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree

import pytest
from gate_results import CASE, comparison
from rich.console import Console

from danon.gate.result import BAD, ExactMetric, Finding, Row
from danon.gate.result_report import junit, markdown, render
from danon.measure.statistics import Estimate


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
            console = Console(width=width, record=True, file=io.StringIO())
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
