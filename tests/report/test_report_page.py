"""The page of the report: order, headings, sizes, colours."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import Page, payload_of, plausible_results

from danon.config.mechanism import mechanisms
from danon.report import style
from danon.report.columns import COLUMNS
from danon.report.conclusions import conclusions
from danon.report.figure import Figure
from danon.report.formatting import format_interval, format_unit_interval
from danon.report.glossary import Glossary
from danon.report.html_report import write_report
from danon.report.summary import summarize
from danon.report.tradeoff import tradeoff
from danon.runs.case import CaseResult
from danon.runs.journal import RecordedRun
from danon.runs.run_info import RunInfo

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "danon" / "report" / "template"
LOOKUP = ROOT / "results" / "reference" / "cpu-quick-lookup"
LARGEST_BYTES = 2_500_000
AA_TEXT, AA_GRAPHICS = 4.5, 3.0


class Outline(HTMLParser):
    """The ids of a page, its links within, its headings, and the text pieces of its cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unexplained: list[str] = []
        self.explanations: set[str] = set()
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self._head = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"][1:]] if values.get("href", "").startswith("#") else []
        self._head = tag == "thead" or (self._head and tag != "tbody")
        if tag in ("td", "th"):
            self.cells.append([])
        if tag in ("td", "th", "button"):
            self._open.append(tag)
        if tag == "button" and values.get("class") == "explained":
            assert values["data-column"] == values["aria-describedby"]
            self.explanations.add(values["data-column"])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "button") and self._open:
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & {*self._open}:
            self.cells[-1].append(data)
        if self._head and "th" in self._open and "button" not in self._open and data.strip():
            self.unexplained.append(data)


@pytest.fixture(scope="module")
def recorded() -> RecordedRun:
    return RecordedRun.read(LOOKUP)


@pytest.fixture(scope="module")
def path(recorded: RecordedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "report.html"
    write_report(recorded.results, recorded.info, path)
    return path


@pytest.fixture(scope="module")
def outline(path: Path) -> Outline:
    return Outline(path)


def test_size_of_a_report(path: Path) -> None:
    assert path.stat().st_size <= LARGEST_BYTES


def test_report_opens_with_conclusions_and_the_tradeoff(path: Path, recorded: RecordedRun) -> None:
    page = Page(path)
    said = conclusions(recorded.results, recorded.info)
    places = [page.text.index(" ".join(sentence.split())) for sentence in said]
    html = path.read_text()
    assert len(said) == 3 and places == sorted(places)
    assert html.index('class="conclusions"') < html.index('id="tradeoff"') < html.index("<table")


def test_contents_link_every_section(outline: Outline) -> None:
    assert len(outline.ids) == len(set(outline.ids))
    assert {"summary", "scoreboard", "quality", "bounds", "columns"} <= {*outline.links}
    assert {*outline.links} <= {*outline.ids}


def test_every_heading_has_an_explanation(outline: Outline) -> None:
    assert outline.unexplained == []
    assert outline.explanations and outline.explanations <= {*outline.ids}


def test_explanations_are_those_of_the_terminal(path: Path) -> None:
    page = Page(path)
    for name in ("speed-up", "error", "pays from", "status"):
        assert page.text.count(COLUMNS[name].text) == 1, name


def test_headings_of_columns_are_distinct() -> None:
    titles = [column.title for column in COLUMNS.values()]
    assert len(titles) == len(set(titles))


def test_unknown_column_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        Glossary().use("nonsense")


def test_text_of_cells_is_not_glued(outline: Outline) -> None:
    for pieces in outline.cells:
        for one, other in itertools.pairwise(pieces):
            glued = one[-1:].isalnum() and other[:1].isalnum()
            assert not glued, pieces


@pytest.mark.parametrize(
    ("figure", "least", "written"),
    [
        (Figure(3.4, 3.3, 3.55), 0, "3.30-3.55"),
        (Figure(1.0, -8.85, 10.7), -math.inf, "-8.85 to 10.7"),
        (Figure(1.0, -8.85, 10.7), 0, ""),
        (Figure(0.0, -1e-17, 0.0), 0, "0.00-0.00"),
        (Figure(1.0), 0, ""),
        (None, 0, ""),
    ],
)
def test_interval_beyond_what_is_possible(figure: Figure, least: float, written: str) -> None:
    assert format_interval(figure, least=least) == written


def test_interval_of_seconds_below_zero_is_left_out() -> None:
    assert format_unit_interval(Figure(1.0, -0.1, 2.0), "s") == ""
    assert format_unit_interval(Figure(1.0, 0.5, 2.0), "s") == "500 ms to 2.00 s"
    assert format_unit_interval(Figure(1.0, -0.1, 2.0), "") == "-0.1 to 2"


# --- quality against speed


def test_points_of_the_tradeoff(recorded: RecordedRun) -> None:
    found = tradeoff(recorded.results, summarize(recorded.results, recorded.info))
    assert found is not None
    assert (found.metric, found.default, [*found.points]) == (
        "accuracy",
        16384,
        [1024, 4096, 16384],
    )
    points = {point.attention: point for point in found.points[16384]}
    assert points["sdpa"].best and points["sdpa"].speedup.value == 1
    cases = {
        (r.case.suite, r.case.task): r.metrics
        for r in recorded.results
        if (r.case.attention, r.case.length) == ("dala", 16384) and r.status == "measured"
    }
    assert points["dala"].quality.value == cases["pretrained", "lookup"]["accuracy"]
    assert points["dala"].speedup.value == 1 / cases["speed", ""]["time_ratio"]


def test_tradeoff_without_quality_shows_errors() -> None:
    results = plausible_results()
    info = RunInfo.capture("full", 0, "danon bench", {"id": "0"})
    found = tradeoff(results, summarize(results, info))
    assert found is not None and found.metric == "error_vs_dense"
    assert found.default == 32768, "where dense attention was timed, not extrapolated"
    assert "sdpa" not in {p.attention for points in found.points.values() for p in points}


def test_tradeoff_of_trained_models_alone() -> None:
    run = RecordedRun.read(ROOT / "results" / "reference" / "cpu-standard-quality")
    found = tradeoff(run.results, summarize(run.results, run.info))
    assert found is not None and "as it is in the model" in found.origin


def test_tradeoff_of_dense_attention_alone(recorded: RecordedRun) -> None:
    dense = [r for r in recorded.results if r.case.attention == "sdpa"]
    assert tradeoff(dense, summarize(dense, recorded.info)) is None


# --- colours


def colours(scheme: str) -> dict[str, str]:
    """Return the variables of report.css in the light or the dark mode."""
    text = (TEMPLATE / "report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root[^{]*\{(.*?)\}", text, re.DOTALL)[:2]
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return found if scheme == "light" else found | dict(re.findall(r"--([\w-]+): (#\w{6})", dark))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_text(scheme: str) -> None:
    known = colours(scheme)
    pairs = [*itertools.product(("ink", "soft", "accent"), ("page", "card", "mine"))]
    pairs += [(text, "card") for text in ("bad", "warn")]
    pairs += [("on-branch", name) for name in known if name.startswith("branch-")]
    low = {p: c for p in pairs if (c := contrast(known[p[0]], known[p[1]])) < AA_TEXT}
    assert low == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_curves(scheme: str) -> None:
    ours = [f"{name}{tail}" for name in mechanisms() for tail in ("", "-balanced", "-speed")]
    looks = style.styles(["sdpa", *ours, *(f"baseline{i}" for i in range(14))], "danon bench")
    card = colours(scheme)["card"]
    for name, look in looks.items():
        least = AA_GRAPHICS if name.startswith("baseline") else AA_TEXT  # ours are named in them
        assert contrast(getattr(look, scheme), card) >= least, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_branches_have_colours_of_their_own(scheme: str) -> None:
    known = [value for name, value in colours(scheme).items() if name.startswith("branch-")]
    assert len(known) == len(set(known)) == 10


def test_tuned_attentions_look_different() -> None:
    names = ["sdpa", "msra", "msra-balanced", "msra-speed", "window", "window-balanced"]
    looks = style.styles(names, "danon bench")
    assert len({look.light for look in looks.values()}) == len(names)
    assert len({look.dark for look in looks.values()}) == len(names)
    assert {name for name, look in looks.items() if look.dash == "dash"} == {
        "msra-balanced",
        "msra-speed",
        "window-balanced",
    }


# --- in a browser


@pytest.mark.slow
def test_charts_in_a_browser(path: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    command = [browser, "--headless", "--no-sandbox", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--window-size=400,900"]
    command += ["--virtual-time-budget=20000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = re.findall(r'class="chart[^"]*js-plotly-plot"', done.stdout)
    assert len(drawn) == len(re.findall(r'class="chart[ "]', done.stdout)) > 10


def test_every_script_is_known(path: Path) -> None:
    assert Page(path).scripts_are_intact
    assert payload_of(Page(path))["tradeoff"]["points"]["16384"]


def test_report_of_nothing(tmp_path: Path) -> None:
    info = RunInfo.capture("smoke", 0, "danon bench", {"id": "0"})
    nothing: list[CaseResult] = []
    write_report(nothing, info, tmp_path / "report.html")
    outline = Outline(tmp_path / "report.html")
    assert outline.links == ["unmeasured", "checks", "columns", "provenance"]
