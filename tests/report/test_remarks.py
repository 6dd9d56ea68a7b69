"""Attentions checked only against themselves, or that changed the process, are never the best."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from danon.attention.base import BaseAttention
from danon.bench.shapes import oracle_kind
from danon.cli.recommendation_terminal import answer
from danon.report import quality_tables, tables, terminal
from danon.report.html_report import write_report
from danon.report.remarks import doubtful, far, remarks
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo

ITSELF = {"kind": "self in float64", "error": 0.0, "tolerance": 1e-5, "rows": 64}
DEFINED = ITSELF | {"kind": "definition"}
THREADS = {"torch's threads": "2 -> 1"}
UNCHECKED = "checked against itself in float64: nothing tells whether it is right"
CHANGED = "changed torch's threads of the process, for dense attention beside it too"


def results(name: str, ratio: float, error: float, **known: Any) -> list[CaseResult]:
    """Return speed, memory and recall of one attention, with a given record of its check."""
    speed = Case("speed", name, 16384, "bfloat16", "forward")
    recall = Case("recall", name, 256, "float32", "training", task="mqar")
    figures = {"time_ratio": ratio, "time_s": ratio, "error_vs_dense": error}
    made = (
        (speed, figures),
        (replace(speed, suite="memory"), {"peak_bytes": 1.0}),
        (recall, {"accuracy": 0.99, "time_ratio": ratio, "peak_bytes": 1.0}),
    )
    return [CaseResult(case, "measured", metrics=m, **known) for case, m in made]


@pytest.fixture
def found() -> list[CaseResult]:
    return [
        *results("Zeros", 0.03, 1.0, check=ITSELF),
        *results("Slows", 0.1, 0.2, check=DEFINED, notes=THREADS),
        *results("Polite", 0.5, 0.2, check=DEFINED, notes={"the environment": "HOME"}),
        *results("sdpa", 1.0, 0.0, check=DEFINED),
    ]


class TestRemarks:
    def test_doubt_about_a_check_against_itself(self, found: list[CaseResult]) -> None:
        said = remarks(found)
        assert [remark.text for remark in said["Zeros"]] == [UNCHECKED]
        assert [remark.text for remark in said["Slows"]] == [CHANGED]
        assert [remark.text for remark in said["Polite"]] == [
            "changed the environment of the process"
        ]
        assert {name for name, some in said.items() if doubtful(some)} == {"Zeros", "Slows"}

    def test_remark_on_an_output_as_far_as_zeros(self) -> None:
        assert far(1.0) and far(1.9) and not far(0.9) and not far(float("nan"))

    def test_doubt_about_times_beside_other_programs(self) -> None:
        speed, *others = results("window", 0.6, 0.2, check=DEFINED)
        metrics = speed.metrics | {"contended_cores": 0.94}
        (remark,) = remarks([replace(speed, metrics=metrics), *others])["window"]
        assert remark.doubt
        assert remark.text == (
            "other programs took up to 0.9 cores while it was timed (speed forward at 16k): "
            "run it again"
        )

    def test_doubtful_rows_on_the_scoreboard(self, found: list[CaseResult]) -> None:
        data = tables.table(found)
        (view,) = tables.views(data)
        board = tables.scoreboard(data, view, "danon bench", remarks(found))
        assert [row.attention for row in board.rows] == ["Polite", "sdpa", "Zeros", "Slows"]
        console = Console(record=True, width=160, file=io.StringIO())
        info = RunInfo.capture("quick", 0, "danon bench", {"id": "a"})
        terminal.render(found, info, console)
        said = console.export_text()
        zeros = "its output is no nearer to dense attention's than zeros"
        assert f"† Zeros: {UNCHECKED}; {zeros}; never marked as the best." in said
        assert f"† Slows: {CHANGED}; never marked as the best." in said
        assert "† Polite: changed the environment of the process." in said
        assert said.count("Zeros †") == 2, "in speed and in quality"

    def test_pareto_front_without_doubtful_rows(self, found: list[CaseResult]) -> None:
        (task,) = quality_tables.tasks(found, "danon bench")
        assert task.front(256) == {"Polite"}
        sure = [replace(result, check=DEFINED, notes={}) for result in found]
        (task,) = quality_tables.tasks(sure, "danon bench")
        assert task.front(256) == {"Zeros"}, "but for the doubt it would be"

    def test_remarks_in_the_report(self, found: list[CaseResult], tmp_path: Path) -> None:
        info = RunInfo.capture("quick", 0, "danon bench --attention m.py:Zeros", {"id": "a"})
        write_report(found, info, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert page.count(f"† {UNCHECKED}") == 2, "scoreboard, quality"
        assert "Zeros †" in page and "not on the front" in page

    def test_choose_without_doubtful_options(self, found: list[CaseResult], tmp_path: Path) -> None:
        info = RunInfo.capture("quick", 0, "danon bench", {"id": "a"})
        journal = Journal.create(tmp_path, info)
        same = {"size": 16}  # of one configuration, or there would be no verdict
        for result in found:
            if not result.case.task:
                journal.append(replace(result, config=same))
        right = {"accuracy": 0.99, "answers": 4096.0, "lost_answers": 0.0, "gained_answers": 0.0}
        for name in dict.fromkeys(result.case.attention for result in found):
            case = Case("pretrained", name, 16384, "float32", "forward", heads=1, task="lookup")
            journal.append(CaseResult(case, "measured", metrics=right, config=same))
        console = Console(record=True, width=160, file=io.StringIO())
        assert answer((tmp_path,), 16384, 1.0, "lookup", "forward", console) == 0
        said = console.export_text()
        assert said.startswith("Polite: 2.00 times as fast")
        assert f"† Zeros: {UNCHECKED}; not recommended" in said
        assert f"† Slows: {CHANGED}; not recommended" in said


class Claims(BaseAttention):
    """An attention that states a definition, but has none."""

    oracle_kind = "definition"


class Defines(BaseAttention):
    """An attention with a definition that it does not state."""

    def oracle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        return torch.zeros_like(q)


class Approximates(Defines):
    oracle_kind = "another package"


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Claims, "self in float64"), (Defines, "definition"), (Approximates, "another package")],
)
def test_kind_of_a_check_that_a_class_misstates(kind: type[BaseAttention], said: str) -> None:
    assert oracle_kind(kind()) == said
