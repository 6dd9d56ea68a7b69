"""Files under results/ are as docs/results.md says, and as the readers check it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter

from danon import tuned
from danon.gate import result
from danon.gate.thresholds import Accepted, Threshold, Thresholds, Timing
from danon.measure.statistics import Estimate
from danon.report.gate_error_rates import gate_error_rates
from danon.runs.case import SCHEMA, Case, CaseResult, Phase, Status
from danon.runs.export import write_results
from danon.runs.journal import RecordedRun, RunStatus
from danon.runs.jsonl import read_json_lines
from danon.runs.run_info import RunInfo
from danon.tuning import target
from gate_validation.recall_rounds import recall_rates
from gate_validation.rounds import read as read_rounds

RESULTS = Path(__file__).parents[2] / "results"
PAGE = (RESULTS.parent / "docs" / "results.md").read_text(encoding="utf-8")
OWN = ("runs", "tune", "gate", "models")
"""Folders that are not committed; nor are reports and locks."""


def a_run(place: Path) -> None:
    run = RecordedRun.read(place.parent)
    assert run.results and run.status == "FINISHED"


def a_study(place: Path) -> None:
    attention, _, kind = place.stem.rpartition("-")
    attention, kind = (
        (attention, kind) if kind in target.names() else (place.stem, tuned.HYPERPARAMETERS)
    )
    found = tuned.read(attention, place.parent, kind)
    assert found and set(found) <= set(tuned.GOALS)
    for some in found.values():
        assert {"study", "length", "dtype", "device", "trials"} <= some["provenance"].keys()
    if kind == tuned.HYPERPARAMETERS:
        assert tuned.rows(attention, place.parent)


def thresholds(place: Path) -> None:
    assert Thresholds.read(place).cases


def weights(place: Path) -> None:
    assert torch.load(place, weights_only=True)


def rounds(place: Path) -> None:
    assert len(read_rounds(place)) == len(place.read_bytes().splitlines())


def answers(place: Path) -> None:
    assert recall_rates(place) and len(read_json_lines(place)) == len(
        place.read_bytes().splitlines()
    )


def rates(place: Path) -> None:
    found = gate_error_rates(RESULTS / "runs" / "any" / "report.html")
    assert found is not None and found.panels and place.parent.parent == RESULTS


def no_check(place: Path) -> None:
    """Accept a page or a picture unread."""


READERS: dict[str, Callable[[Path], None]] = {
    r"README\.md": no_check,
    r"reference/[\w-]+/(run\.json|cases\.jsonl)": a_run,
    r"tuned/[\w-]+\.json": a_study,
    r"thresholds\.json": thresholds,
    r"recall/\w+\.pt": weights,
    r"gate_validation/rounds\.jsonl": rounds,
    r"gate_validation/recall\.jsonl": answers,
    r"gate_validation/rates\.json": rates,
    r"gate_validation/\w+\.png": no_check,
}


def files() -> list[str]:
    found = (place.relative_to(RESULTS) for place in RESULTS.rglob("*") if place.is_file())
    return sorted(
        place.as_posix()
        for place in found
        if place.parts[0] not in OWN
        and "models" not in place.parts
        and place.name != "report.html"
        and not place.name.startswith(".")
    )


@pytest.mark.parametrize("name", files())
def test_every_file_of_results_is_readable(name: str) -> None:
    (reader,) = (check for form, check in READERS.items() if re.fullmatch(form, name))
    reader(RESULTS / name)


def test_every_reader_reads_a_file() -> None:
    unused = [form for form in READERS if not any(re.fullmatch(form, x) for x in files())]
    assert unused == []


def section(title: str) -> str:
    """Return a section of the page, with the sections below it."""
    marks, _, _ = title.partition(" ")
    rest = PAGE.split(f"{title}\n", 1)[1]
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


@pytest.mark.parametrize(
    ("title", "kinds"),
    [
        ("### run.json", (RunInfo,)),
        ("### cases.jsonl", (Case, CaseResult)),
        ("## gate/gate.json", (result.GateResult, result.Row, result.ExactMetric, Estimate)),
        ("## thresholds.json", (Thresholds, Threshold, Timing, Accepted)),
        ("## tuned/\\<attention\\>.json", ()),
    ],
)
def test_page_lists_every_field(title: str, kinds: tuple[type, ...]) -> None:
    fields = {
        name
        for kind in kinds
        for name in (
            [f.name for f in dataclasses.fields(kind)]
            if dataclasses.is_dataclass(kind)
            else kind.model_fields  # type: ignore[attr-defined]
        )
    }
    assert fields - named(section(title)) == set()


def test_page_lists_every_word_and_the_schema() -> None:
    assert f"version of this page's section; now {SCHEMA}" in section("### run.json")
    assert set(get_args(RunStatus)) <= named(section("### run.json"))
    words = {*get_args(Status), *get_args(Phase)}
    assert words <= named(section("### cases.jsonl"))
    assert set(get_args(result.Finding)) <= named(section("## gate/gate.json"))
    assert set(tuned.GOALS) <= named(section("## tuned/\\<attention\\>.json"))


def test_page_lists_every_column_of_samples(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    case = Case("speed", "sdpa", 64, "float32", "forward")
    info = RunInfo.capture("quick", 0, "", {})
    row = CaseResult(case, "measured", samples={"candidate_s": [1.0]})
    write_results([row], info, tmp_path)
    columns = set(pq.read_table(tmp_path / "samples.parquet").column_names)
    assert columns - named(section("### Files for other tools")) == {
        f.name for f in dataclasses.fields(Case)
    }
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored.keys() == {"schema", "run", "results"}


def test_unknown_field_of_a_case() -> None:
    case = Case("speed", "sdpa", 64, "float32", "forward")
    row = CaseResult(case, "measured", metrics={"time_s": float("nan"), "speedup": 1})
    read = TypeAdapter(CaseResult).validate_json(row.to_json(), strict=True)
    assert read.case == case and read.metrics["time_s"] != read.metrics["time_s"]
    with pytest.raises(ValueError, match="colour"):
        TypeAdapter(Case).validate_python({**dataclasses.asdict(case), "colour": "red"})


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"time_ratio": "half"}, "figures -> time_ratio = 'half': must be a number"),
        ({"score": ["good"]}, "figures -> score = ['good']: must be a number"),
        ({"score": []}, "figures -> score = []: must be a number"),
        ([], "figures: must be an object"),
    ],
)
def test_settings_file_without_numbers(tmp_path: Path, figures: object, words: str) -> None:
    some = {"settings": {}, "choice": {}, "figures": figures, "provenance": {}}
    content = {"attention": "msra", "best": {"speed": some}}
    (tmp_path / "msra.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=re.escape(f"msra.json is no file of danon tune: best -> speed -> {words}")
    ):
        tuned.read("msra", tmp_path)
