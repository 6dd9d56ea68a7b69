"""Scoreboard, report and chart: every attention and every reason."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import random
import re
import struct
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from danon import tuned
from danon.report import formatting, tables, terminal
from danon.report.html_report import write_report
from danon.report.speedup_chart import spread_labels, write_chart
from danon.report.unmeasured import unmeasured_cases
from danon.runs.case import Case, CaseResult, Phase
from danon.runs.run_info import RunInfo

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DENSE_LIMIT = 32768  # the longest length at which the made-up run measured dense attention
EVIL = "<script>alert(1)</script>"


@dataclass(frozen=True)
class Kind:
    """An invented attention: seconds = seconds * (N / 1024) ** exponent.

    Attributes:
        limit: the longest length within the budget.
    """

    seconds: float
    exponent: float
    error: float
    semantics: str
    limit: int = 131072
    memory: float = 1.0


KINDS = {
    "sdpa": Kind(0.0045, 1.94, 0.0, "exact (torch SDPA, flash kernel)", DENSE_LIMIT, 0.2),
    "sdpa-math": Kind(0.012, 2.1, 4e-7, "exact (torch SDPA, math kernel, N x N matrix)", 8192, 40),
    "msra": Kind(0.0062, 1.09, 0.11, "exact near window 512, older past in a pyramid"),
    "dala": Kind(0.0054, 1.05, 0.14, "exact near window 512 + important memory slots", memory=1.3),
    "ucsa": Kind(0.0095, 1.14, 0.06, "near window 256 + 16 blocks each query selects", memory=2.2),
    "window": Kind(0.0049, 1.01, 0.17, "exact window 512 + 64 sinks", memory=0.7),
    "flex-window": Kind(0.0089, 1.02, 0.17, "exact window 512 + 64 sinks, compiled", memory=0.8),
    "local-attention": Kind(0.0088, 1.04, 0.21, "exact within its block of 256 and the one before"),
    "longformer": Kind(0.021, 1.05, 0.23, "bidirectional window 512, also when causal", 65536, 6),
    "bigbird": Kind(0.033, 1.1, 0.31, "blocks of 64: window, global and random blocks", 65536, 8),
    "linear": Kind(0.0071, 1.0, 0.83, "linear attention, features elu + 1", memory=1.6),
    "performer": Kind(0.3, 1.02, 0.61, "random features of softmax, causal", 8192, 12),
    "linformer": Kind(0.0069, 1.02, 0.72, "low rank: 256 slots; also when causal", memory=1.1),
    "nsa": Kind(0.16, 1.6, 0.09, "compressed + selected blocks + window", 4096, 60),
    "MyAttention": Kind(0.008, 1.3, 0.02, f"mine {EVIL}", memory=1.5),
}
MISSING = {
    "xformers": "no CPU operator: attn_bias and head dim 64 need CUDA",
    "flash-attn": "package flash_attn is not installed",
    "gla": "package fla needs triton and a GPU",
}


def plausible(name: str, length: int, dtype: str, phase: Phase, rng: random.Random) -> CaseResult:
    kind, case = KINDS[name], Case("speed", name, length, dtype, phase)
    if length > kind.limit:
        return CaseResult(case, "over budget", f"would take over the {phase} limit of 20 s")
    scale = (2.6 if phase != "forward" else 1.0) * (0.45 if dtype == "bfloat16" else 1.0)

    def seconds(of: Kind) -> float:
        power = of.exponent if length > 4096 else (of.exponent + 1) / 2 + 0.35
        return scale * of.seconds * (length / 1024) ** power * math.exp(rng.gauss(0, 0.02))

    own, dense = seconds(kind), seconds(KINDS["sdpa"])
    entries = 900 if name != "sdpa" else length / 2
    useful = 4 * 4 * 64 * length * min(entries, length / 2) / own * (3.5 if scale > 1 else 1)
    metrics = {
        "time_s": own,
        "useful_flops_per_s": useful,
        "conclusive": 1.0,
        "matmul_flops_per_s": 2.3e11,
        "roofline_fraction": useful / 2.3e11,
        "error_vs_dense": kind.error * (length / 16384) ** 0.2,
    }
    ratio = 1.0 if name == "sdpa" else own / dense
    if length <= DENSE_LIMIT:
        metrics |= {
            "time_ratio": ratio,
            "time_ratio_low": ratio * 0.96,
            "time_ratio_high": ratio * 1.05,
            "reference_time_s": dense,
            "speedup": 1 / ratio,
            "conclusive": float(rng.random() < 0.9),
        }
    else:
        metrics |= {"time_ratio_extrapolated": ratio, "speedup_extrapolated": 1 / ratio}
    check = {"kind": "definition", "error": 3e-6 * rng.random(), "tolerance": 1e-5, "rows": 64}
    samples = {"candidate_s": [own] * 5, "reference_s": [dense] * 5}
    return CaseResult(case, "measured", "", kind.semantics, metrics, samples, check)


def plausible_results() -> list[CaseResult]:
    """Return a run with every status, three suites, two dtypes and both phases."""
    rng = random.Random(0)
    views: list[tuple[str, Phase]] = [
        ("float32", "forward"),
        ("bfloat16", "forward"),
        ("float32", "forward+backward"),
    ]
    results = []
    for dtype, phase in views:
        for name, kind in KINDS.items():
            for length in LENGTHS if phase == "forward" else LENGTHS[:5]:
                results.append(plausible(name, length, dtype, phase, rng))
                memory = Case("memory", name, length, dtype, phase)
                if length <= kind.limit:
                    growth = 2 if name == "sdpa-math" else 1
                    peak = kind.memory * 2**21 * (length / 1024) ** growth
                    metrics = {"peak_bytes": peak, "saved_bytes": peak / 2}
                    results.append(CaseResult(memory, "measured", metrics=metrics))
            fitted = Case("scaling", name, 0, dtype, phase)
            low, high = kind.exponent - 0.03, kind.exponent + 0.03
            metrics = {"time_exponent": kind.exponent, "memory_exponent": 1.0}
            metrics |= {"time_exponent_low": low, "time_exponent_high": high}
            results.append(CaseResult(fitted, "measured", metrics=metrics))
        for name, reason in MISSING.items():
            results += [
                CaseResult(Case("speed", name, n, dtype, phase), "unavailable", reason)
                for n in LENGTHS
            ]
    wrong = Case("speed", "broken<b>", 1024, "float32", "forward")
    reason = f"check failed: error 0.3 above 1e-05 {EVIL}"
    results.append(CaseResult(wrong, "failed", reason, f"claims {EVIL}"))
    return results


@pytest.fixture(scope="session")
def results() -> list[CaseResult]:
    return plausible_results()


@pytest.fixture(scope="session")
def info() -> RunInfo:
    fingerprint = {
        "id": "0123456789ab",
        "cpu": "A Processor 9000",
        "cores": "2",
        "threads": "2",
        "memory_gib": "31",
        "device": "cpu",
        "torch": "2.13.0+cpu",
    }
    command = "danon bench --profile full --attention mine.py:MyAttention"
    return RunInfo.capture("full", 0, command, fingerprint)


# --- the shared table


def test_order_and_figures_of_a_scoreboard(results: list[CaseResult], info: RunInfo) -> None:
    data = tables.table(results)
    view = tables.views(data)[0]
    assert (view.phase, view.dtype) == ("forward", "bfloat16")
    board = tables.scoreboard(data, view, info.command)
    assert board.headline == DENSE_LIMIT
    assert board.lengths == LENGTHS
    at = [row.speedups[DENSE_LIMIT].value for row in board.rows if DENSE_LIMIT in row.speedups]
    assert at == sorted(at, reverse=True)
    assert {row.attention for row in board.rows[len(at) :]} == {"sdpa-math", "performer", "nsa"}
    ours = {row.attention: row for row in board.rows}["ucsa"]
    (case,) = [
        r
        for r in results
        if (r.case.suite, r.case.attention, r.case.length) == ("speed", "ucsa", DENSE_LIMIT)
        and (r.case.dtype, r.case.phase) == (view.dtype, view.phase)
    ]
    figure = ours.speedups[DENSE_LIMIT]
    assert figure.value == pytest.approx(case.metrics["speedup"])
    assert figure.low == pytest.approx(1 / case.metrics["time_ratio_high"])
    assert figure.low < figure.value < figure.high
    assert not figure.extrapolated
    assert ours.speedups[131072].extrapolated
    assert ours.exponent.value == KINDS["ucsa"].exponent
    assert ours.peak == KINDS["ucsa"].memory * 2**21 * 32


def test_roles(info: RunInfo) -> None:
    names = ("sdpa", "msra", "ucsa-shared", "super-hybrid", "MyAttention", "window", "msra2")
    assert [tables.role(name, info.command) for name in names] == [
        "reference",
        "ours",
        "ours",
        "ours",
        "yours",
        "baseline",
        "baseline",
    ]
    assert tables.mechanism("ucsa-shared") == "ucsa"
    assert tables.mechanism("super-hybrid") == "super-hybrid"
    assert tables.role("MyAttention", "danon bench") == "baseline"


def test_unmeasured_cases_are_grouped(results: list[CaseResult]) -> None:
    found = unmeasured_cases(tables.table(results))
    assert found[0].attention == "broken<b>"
    assert {a.attention: (a.reason, a.where) for a in found if a.status == "unavailable"} == {
        name: (reason, "everything") for name, reason in MISSING.items()
    }
    nsa = [a.where for a in found if a.attention == "nsa"]
    assert nsa == [
        "speed 8k to 128k (forward bfloat16, forward float32)",
        "speed 8k, 16k (forward+backward float32)",
    ]
    estimates = [
        CaseResult(
            Case("speed", "slow", n, "float32", "forward"), "over budget", f"{s} s, over 8 s"
        )
        for n, s in ((4096, 90.5), (1024, 10))
    ]
    (one,) = unmeasured_cases(tables.table(estimates))
    assert one.reason == "10 s, over 8 s"


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [([0, 30], [0, 30]), ([0, 0], [-5, 5]), ([0, 1, 2, 50], [-9, 1, 11, 50]), ([], [])],
)
def test_positions_of_labels(wanted: list[float], placed: list[float]) -> None:
    assert spread_labels(wanted, 10) == pytest.approx(placed)


# --- the terminal


def shown(results: list[CaseResult], info: RunInfo, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    terminal.render(results, info, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [100, 160])
def test_scoreboard_at_several_widths(results: list[CaseResult], info: RunInfo, width: int) -> None:
    lines = shown(results, info, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "fingerprint 0123456789ab" in text
    for title in ("forward · bfloat16", "forward · float32", "forward+backward · float32"):
        assert title in text
    firsts = [line.split()[0] for line in lines if line]
    for name in (*KINDS, *MISSING, "broken<b>"):
        assert name in firsts, name
    assert "GFLOP/s" in text
    row = next(line for line in lines if line.startswith("ucsa "))
    board = tables.scoreboard(tables.table(results), tables.views(tables.table(results))[0], "")
    ucsa = next(r for r in board.rows if r.attention == "ucsa")
    assert formatting.format_speedup(ucsa.speedups[DENSE_LIMIT]) in row.split()
    assert formatting.format_interval(ucsa.speedups[DENSE_LIMIT]) in row.split()
    assert f"~{ucsa.speedups[131072].value:.1f}" in row
    assert "exact near window 512" in text
    assert "needs triton and a GPU" in text


def test_row_without_a_figure_at_the_lengths_shown(
    results: list[CaseResult], info: RunInfo
) -> None:
    row = next(line for line in shown(results, info, 100) if line.startswith("performer"))
    assert "at 8k" in row


def test_terminal_without_figures(info: RunInfo) -> None:
    assert "No case has figures." in shown([], info, 100)


# --- the report


class Page(HTMLParser):
    """Tags, their attributes, and the text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.raw.get(self._inside, self.words).append(data)

    @property
    def scripts_are_intact(self) -> bool:
        """True if each script of the page is one of danon's: data, library or code."""
        kinds = [attributes.get("type") for tag, attributes in self.tags if tag == "script"]
        code = [script for script in self.raw["script"] if script.startswith('"use strict";')]
        return kinds == ["application/json", "text/plain", *[None] * len(code)]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def payload_of(page: Page) -> dict[str, Any]:
    """Return the data of the page's script, which must be JSON without NaN or infinity."""
    (text,) = [script for script in page.raw["script"] if script.startswith("{")]
    payload: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return payload


def plotly_of(page: Page) -> str:
    """Return the chart library as the page's script unpacks it."""
    (packed,) = [script for script in page.raw["script"] if script.startswith("H4sI")]
    return gzip.decompress(base64.b64decode(packed)).decode()


@pytest.fixture(scope="session")
def page(
    results: list[CaseResult], info: RunInfo, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, info, path)
    return Page(path)


def test_attentions_and_reasons_in_the_report(page: Page, info: RunInfo) -> None:
    for name in (*KINDS, *MISSING, "broken<b>"):
        assert name in page.text
    for reason in MISSING.values():
        assert reason in page.text
    assert "would take over the forward limit of 20 s" in page.text
    assert "cases were checked, all passed" in page.text
    assert info.run_id in page.text
    assert "A Processor 9000" in page.text
    assert info.command in page.text


def test_tuned_settings_in_the_report(
    info: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("speed", "msra", 1024, "float32", "forward")
    cases = case, replace(case, attention="super-hybrid")
    some = [CaseResult(c, "measured", metrics={"time_s": 1.0, "time_ratio": 0.5}) for c in cases]
    path = tmp_path / "results" / "runs" / "one" / "report.html"
    path.parent.mkdir(parents=True)
    (row,) = tuned.rows("msra").values()
    write_report(some, info, path)
    page = path.read_text()
    assert "<h2>Tuned settings" in page and row.provenance["study"] in page
    assert "components (msra (calibration_factor 0.655, " in page, "in words, not in Python"
    for part in ("msra-balanced", "15% (44%)", "0.74-0.75", "window 4096", "16k tokens bfloat16"):
        assert part in page.split("<h2>Tuned settings")[1], part
    assert "tune/" not in page.split("<h2>Tuned settings")[1].split("</section>")[0]
    assert "In this run measured with" not in page
    for window, said in ((row.settings["window"], False), (8, True)):
        variant = replace(case, attention="msra-balanced")
        config = {**row.settings, "window": window}
        measured = CaseResult(variant, "measured", metrics={"time_s": 1.0}, config=config)
        write_report([measured], info, path)
        assert ("In this run measured with other settings: window 8" in path.read_text()) == said
    study = tmp_path / "results" / "tune" / row.provenance["study"] / "report.html"
    study.parent.mkdir(parents=True)
    study.write_text("a page")
    write_report(some, info, path)
    link = re.search(r'<a href="([^"]+)">hyperparameters-msra', path.read_text())
    assert link and (path.parent / link[1]).read_text() == "a page"
    (tmp_path / "msra.json").write_text("{")
    monkeypatch.setattr("danon.tuned.settings.shipped_results", lambda _: tmp_path)
    monkeypatch.chdir(tmp_path)
    write_report(some, info, path)
    assert "msra.json is no file of danon tune" in path.read_text()
    (tmp_path / "msra.json").unlink()
    write_report(some, info, path)
    assert "Tuned settings" not in path.read_text()


def test_escaping_of_results(page: Page) -> None:
    assert f"mine {EVIL}" in page.text
    assert f"check failed: error 0.3 above 1e-05 {EVIL}" in page.text
    assert "alert(1)" not in "".join(page.raw["script"])
    assert page.scripts_are_intact


def test_escaping_of_chart_data(info: RunInfo, tmp_path: Path) -> None:
    name = f"</script>{EVIL}"
    case = Case("speed", name, 1024, "float32", "forward")
    metrics = {"time_s": 1.0, "time_ratio": 0.5, "time_ratio_low": 0.4, "time_ratio_high": math.inf}
    write_report([CaseResult(case, "measured", metrics=metrics)], info, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.scripts_are_intact
    assert payload_of(page)["attentions"][0]["name"] == name


def test_report_needs_no_network(page: Page) -> None:
    for tag, attributes in page.tags:
        loads = {"src", "href", "data", "action", "srcset", "poster"} & attributes.keys()
        within = (attributes.get("href") or "").startswith("#")
        assert not loads or (tag == "a" and within), f"{tag} {attributes}"
    style = "".join(page.raw["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = [
        a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none';")
    assert "plotly.js v" in plotly_of(page)


def test_curves_of_the_charts(page: Page, results: list[CaseResult]) -> None:
    payload = payload_of(page)
    assert {a["name"] for a in payload["attentions"]} == set(KINDS)
    assert len(payload["views"]) == 3
    measured = [
        r
        for r in results
        if r.case.suite == "speed"
        and r.status == "measured"
        and r.case.attention == "longformer"
        and (r.case.dtype, r.case.phase) == ("bfloat16", "forward")
    ]
    curve = payload["views"][0]["curves"]["time_s"]["longformer"]
    assert [p["n"] for p in curve] == [r.case.length for r in measured]
    expected = [r.metrics["time_s"] for r in measured]
    assert [p["value"] for p in curve] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("suite", ["speed", "memory", "scaling", "nothing"])
def test_report_of_one_suite_or_nothing(
    suite: str, results: list[CaseResult], info: RunInfo, tmp_path: Path
) -> None:
    some = [r for r in results if r.case.suite == suite]
    write_report(some, info, tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    said = {
        "memory": "Dense attention was not timed here, so there is no speed-up.",
        "scaling": "No case of this run carries a correctness check.",
        "nothing": "No case of this run has figures.",
        "speed": "dense attention takes",
    }
    assert said[suite] in text


# --- the picture


def test_speedup_chart_with_and_without_speed(
    results: list[CaseResult], info: RunInfo, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    write_chart(results, info, path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    assert width > height > 500
    only_memory = [r for r in results if r.case.suite == "memory"]
    with pytest.raises(ValueError, match="no figure of the speed suite"):
        write_chart(only_memory, info, path)
