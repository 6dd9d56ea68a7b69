"""The summary of a run, the sentences on it, and its table in the terminal."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from danon.report.conclusions import conclusions
from danon.report.crossover import Crossover, crossover
from danon.report.figure import Figure
from danon.report.formatting import format_crossover
from danon.report.summary import summarize
from danon.report.terminal_summary import print_summary
from danon.runs.case import Case, CaseResult
from danon.runs.journal import RecordedRun
from danon.runs.run_info import RunInfo

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
RUNS = sorted(path.name for path in REFERENCE.iterdir())
SETTINGS = {"window": 64}


def timed(name: str, length: int, speedup: float, phase: str = "forward") -> CaseResult:
    """Return an outcome of the suite speed, or of decode."""
    suite = "decode" if phase == "decode" else "speed"
    ratio = 1 / speedup
    metrics = {
        "time_s": ratio,
        "time_ratio": ratio,
        "time_ratio_low": 0.9 * ratio,
        "time_ratio_high": 1.1 * ratio,
        "conclusive": 1.0,
    }
    case = Case(suite, name, length, "bfloat16", phase)  # type: ignore[arg-type]
    config = {} if name == "sdpa" else SETTINGS
    return CaseResult(case, "measured", "", name, metrics, config=config)


def peak(name: str, length: int, mebibytes: float) -> CaseResult:
    case = Case("memory", name, length, "bfloat16", "forward")
    metrics = {"peak_bytes": mebibytes * 2**20}
    config = {} if name == "sdpa" else SETTINGS
    return CaseResult(case, "measured", "", name, metrics, config=config)


def lookup(name: str, length: int, right: int, config: dict[str, int] | None = None) -> CaseResult:
    """Return an outcome of 1000 questions, all of which dense attention answers."""
    case = Case("pretrained", name, length, "float32", "forward", task="lookup")
    metrics = {
        "accuracy": right / 1000,
        "answers": 1000.0,
        "lost_answers": 1000.0 - right,
        "gained_answers": 0.0,
    }
    own = {} if name == "sdpa" else SETTINGS if config is None else config
    return CaseResult(case, "measured", "", name, metrics, config=own)


def run_of(ucsa: int = 1000, config: dict[str, int] | None = None) -> list[CaseResult]:
    """Return a run in which linear is faster than ucsa, and answers nothing."""
    return [
        *(timed("sdpa", n, 1.0) for n in (1024, 4096)),
        *(timed("ucsa", n, s) for n, s in ((1024, 0.5), (4096, 2.0))),
        *(timed("linear", n, s) for n, s in ((1024, 2.0), (4096, 8.0))),
        *(peak(name, 4096, size) for name, size in (("sdpa", 2), ("ucsa", 40), ("linear", 90))),
        timed("ucsa", 4096, 3.0, "decode"),
        *(lookup(name, 4096, n) for name, n in (("sdpa", 1000), ("linear", 4))),
        lookup("ucsa", 4096, ucsa, config),
    ]


class TestCrossover:
    @pytest.mark.parametrize(
        ("speedups", "expected", "text"),
        [
            ({1024: 0.5, 4096: 2.0}, Crossover(2048), "2k"),
            ({1024: 0.5, 4096: 0.9}, Crossover(4096, ">"), ">4k"),
            ({1024: 1.5, 4096: 2.0}, Crossover(1024, "<"), "<1k"),
            ({1024: 2.0, 4096: 0.5, 16384: 2.0}, Crossover(8192), "8k"),
            ({1024: 0.25, 4096: 2.0}, Crossover(1024 * 4 ** (2 / 3)), "2.5k"),
            ({}, None, "-"),
        ],
    )
    def test_length(
        self, speedups: dict[int, float], expected: Crossover | None, text: str
    ) -> None:
        found = crossover({n: Figure(x) for n, x in speedups.items()})
        assert format_crossover(found) == text
        assert (found is None) == (expected is None)
        if found and expected:
            assert found.side == expected.side
            assert math.isclose(found.length, expected.length)

    def test_extrapolated_speedups_say_nothing(self) -> None:
        speedups = {1024: Figure(0.5), 4096: Figure(2.0, extrapolated=True)}
        assert crossover(speedups) == Crossover(1024, ">")


class TestSummary:
    def test_rows_have_every_kind_of_figure(self, info: RunInfo) -> None:
        summary = summarize(run_of(), info)
        assert [row.attention for row in summary.rows] == ["linear", "ucsa", "sdpa"]
        row = summary.rows[1]
        assert (row.speedup.value, row.peak, row.quality) == (2.0, 40 * 2**20, 1.0)
        assert row.decode.value == 3.0 and row.pays_from == Crossover(2048)
        assert (summary.length, summary.decode_length) == (4096, 4096)
        assert summary.best("speedup") == {"linear"} and summary.best("peak") == {"ucsa"}
        assert summary.best("quality") == {"ucsa"}
        assert summary.best("pays_from") == {"linear"}

    def test_quality_of_other_settings_is_left_out(self, info: RunInfo) -> None:
        summary = summarize(run_of(config={"window": 128}), info)
        assert math.isnan(summary.rows[1].quality)

    def test_figures_of_an_unfinished_run(self, info: RunInfo) -> None:
        """Show the longest length that half of the attentions have reached."""
        begun = [*run_of()[:7], timed("sdpa", 16384, 1.0), peak("sdpa", 16384, 8)]
        assert summarize(begun, info).length == 4096
        assert summarize([*begun, timed("linear", 16384, 30.0)], info).length == 16384
        assert summarize([], info).rows == ()


class TestConclusions:
    def test_attention_that_is_as_good(self, info: RunInfo) -> None:
        assert conclusions(run_of(), info) == (
            "On this cpu at 4k (4096) tokens take ucsa: 2.00 times as fast [1.82-2.22] as dense "
            "attention and as good, 100% of lookup answers at 4k, dense 100%; the fastest is "
            "linear (8.00 times as fast [7.27-8.89], <1%).",
            "Least working memory of the faster ones: ucsa, 40.0 MiB at 4k; dense attention needs "
            "2.00 MiB.",
            "A forward pass is faster than dense attention's from so many tokens on: ucsa 2k.",
        )

    def test_nothing_is_as_good(self, info: RunInfo) -> None:
        (first, *_) = conclusions(run_of(ucsa=600), info)
        assert first == (
            "On this cpu at 4k (4096) tokens keep dense attention (sdpa) where quality counts: "
            "nothing faster is shown to be as good (100% of lookup answers at 4k). Of the faster "
            "ones linear (8.00 times as fast [7.27-8.89], <1%) is the fastest, ucsa (2.00 times as "
            "fast [1.82-2.22], 60%) has the best quality."
        )

    def test_run_without_quality(self, info: RunInfo) -> None:
        (first, *_) = conclusions(run_of()[:6], info)
        assert first.endswith("no quality was measured in this run.")

    def test_slow_attentions(self, info: RunInfo) -> None:
        results = [timed("sdpa", 1000, 1.0), timed("ucsa", 1000, 0.5), timed("msra", 1000, 1.5)]
        first, last = conclusions(results[:2], info)
        assert first == "On this cpu at 1000 tokens nothing is faster than dense attention (sdpa)."
        assert last.endswith("from so many tokens on: ucsa none up to 1000.")
        assert conclusions(results, info)[-1].endswith(
            ": msra every measured length (1000 and more), ucsa none up to 1000."
        )

    def test_run_without_a_forward_pass(self, info: RunInfo) -> None:
        assert conclusions([timed("ucsa", 4096, 3.0, "decode")], info) == ()
        assert conclusions([], info) == ()


def printed(results: Sequence[CaseResult], info: RunInfo, width: int) -> list[str]:
    sink = io.StringIO()
    print_summary(results, info, Console(file=sink, width=width))
    return sink.getvalue().splitlines()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("width", [100, 80, 60])
def test_summary_of_a_recorded_run_fits_the_terminal(name: str, width: int) -> None:
    run = RecordedRun.read(REFERENCE / name)
    lines = printed(run.results, run.info, width)
    assert len(lines) <= (35 if width >= 80 else 45)  # and five for the places below
    assert max(map(len, lines)) <= width
    table = [line for line in lines if line.startswith("sdpa ")]
    assert len(table) == 1, "dense attention always has a row"
    names = {r.case.attention for r in run.results}
    firsts = {line.split(" ")[0] for line in lines}
    if width >= 80:
        assert {"msra", "dala", "ucsa"} & names <= firsts, "ours have whole names"


def test_narrow_terminal_has_names_and_speedups(info: RunInfo) -> None:
    lines = printed(run_of(), info, 30)
    assert "attention    at 4k" in "\n".join(lines)
    assert any(line.split() == ["ucsa", "2.00", "40.0*"] for line in lines)


def test_run_without_figures(info: RunInfo) -> None:
    case = Case("speed", "gla", 1024, "float32", "forward")
    lines = printed([CaseResult(case, "unavailable", "needs CUDA")], info, 80)
    assert "No case has figures." in lines
    assert lines[-1] == "Not measured: gla (unavailable) (why: danon report --unmeasured)."


@pytest.mark.parametrize(("count", "words"), [(2, "1 more machine"), (3, "2 more machines")])
def test_run_on_several_machines(info: RunInfo, count: int, words: str) -> None:
    nodes = [("a", "2"), ("b", "2"), ("c", "8")][:count]  # the third is of another kind
    results = [
        dataclasses.replace(
            timed(name, 1024, 1.0),
            place={"host": "vm", "node": node, "machine": {"cpu": "x", "cores": cores}},
        )
        for name, (node, cores) in zip(("sdpa", "msra", "ucsa"), nodes, strict=False)
    ]
    said = " ".join(" ".join(printed(results, info, 80)).split())
    assert f"vm, node a: sdpa (x, 2 cores) and {words}: danon report --tables" in said
