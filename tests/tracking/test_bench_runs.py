"""Benches in MLflow as people see them: names, key figures, order, descriptions, parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_cases import LENGTHS, history, measured, runs_of, some_results, two_texts

from danon.config import MSRAConfig
from danon.report.conclusions import conclusions
from danon.runs.case import Case, CaseResult, Status
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.tracking import store
from danon.tracking.bench_note import bench_note, run_name
from danon.tracking.bench_recorder import Recorder, upload
from danon.tracking.key_figures import key_figures
from danon.tracking.run_tree import metric_name
from danon.tracking.ui_pages import compare_page


def record(info: RunInfo, journal: Journal, results: Sequence[CaseResult]) -> str:
    """Record a bench from start to end, and return the last line."""
    recorder = Recorder(info, journal)
    assert recorder.start().startswith("Recording in MLflow")
    for result in results:
        journal.append(result)
        recorder.log(result)
    return recorder.finish("FINISHED")


def experiments(uri: str) -> dict[str, Any]:
    """Return name -> experiment of those with runs."""
    client = store.connect(uri)
    found = {e.name: e for e in client.search_experiments()}
    return {name: e for name, e in found.items() if client.search_runs([e.experiment_id])}


def test_one_parent_and_one_child_run_per_attention_with_figures(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    (journal.run_dir / "report.html").write_text("<p>report")
    results = [*some_results(), *two_texts()]
    assert record(info, journal, results) == f"Recorded 8 cases in MLflow: {sqlite}"
    assert list(experiments(sqlite)) == ["danon/bench"]
    (parent,), children = runs_of(sqlite, info)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["danon.commit"] == info.commit
    assert json.loads(parent.data.tags["danon.fingerprint"]) == info.fingerprint
    client = store.connect(sqlite)
    files = {run.info.run_name: client.list_artifacts(run.info.run_id) for run in children}
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {
        "report.html",
        "run.json",
        "cases.jsonl",
    }
    assert not any(files.values())  # no settings are known, and the report is stored once
    assert sorted(files) == ["msra", "sdpa"]
    points = [(n, n / 1e6) for n in LENGTHS]
    assert history(sqlite, info, "msra", "speed.forward.float32.time_s") == points
    step = "speed.forward_backward.float32.speedup"
    assert history(sqlite, info, "msra", step) == [(1024, 1.5)]
    (msra,) = (run for run in children if run.info.run_name == "msra")
    assert msra.data.metrics["language.training.float32.code.bits_per_byte"] == 2.1
    assert msra.data.metrics["language.training.float32.prose.bits_per_byte"] == 2.6
    assert msra.data.tags["mlflow.note.content"].startswith("exact")


def test_names_and_tags_to_find_a_bench_by(
    sqlite: str, tmp_path: Path, info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"cpu": "AMD EPYC", "cores": "2", "device": "cpu", "id": "ed46a8e2160f"}
    one = replace(info, commit="9e0fb3c" + 33 * "0", dirty=True, fingerprint=machine)
    record(one, Journal.create(tmp_path, one), some_results())
    (parent,), children = runs_of(sqlite, one)
    name = "quick · 9e0fb3c with changes · EPYC 2 cores · 2 attentions"
    assert parent.info.run_name == name
    for run in (parent, *children):
        tags = {n.removeprefix("danon."): x for n, x in run.data.tags.items()}
        assert (tags["commit"], tags["dirty"]) == (one.commit, "true")
        assert (tags["profile"], tags["device"]) == ("quick", "cpu")
        assert tags["machine"] == "ed46a8e2160f"


@pytest.mark.parametrize(
    ("fingerprint", "expected"),
    [
        ({"cpu": "AMD EPYC", "cores": "2"}, "EPYC 2 cores"),
        ({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": "1"}, "Xeon 1 core"),
        ({"gpu": "NVIDIA H200", "cpu": "x", "cores": "16"}, "H200"),
        ({}, ""),
    ],
)
def test_machine_in_the_name_of_a_run(
    info: RunInfo, fingerprint: dict[str, str], expected: str
) -> None:
    one = replace(info, fingerprint=fingerprint, commit="9e0fb3c", dirty=False)
    parts = run_name(one, 1).split(" · ")
    assert parts == ["quick", "9e0fb3c", *filter(None, [expected]), "1 attention"]


def ranked_results() -> list[CaseResult]:
    """Three attentions, of which "msra" is fastest, and one that cannot run."""
    ratios = {"sdpa": 1.0, "window": 0.5, "msra": 0.25}
    config = {"window": 512, "causal": True, "rate": 8}
    fast = [
        replace(
            measured(name, n, time_ratio=r, time_ratio_low=r, time_ratio_high=r, conclusive=1.0),
            config=config if name == "msra" else {},
        )
        for name, r in ratios.items()
        for n in LENGTHS
    ]
    lookup = Case("pretrained", "msra", 4096, "float32", "forward", task="lookup")
    asked = CaseResult(lookup, "measured", "", "exact", {"accuracy": 0.5}, config=config)
    sized = Case("recall", "msra", 256, "float32", "training", task="mqar")
    trained = replace(asked, case=sized, metrics={"accuracy": 0.75}, config={"window": 8})
    return [trained, *fast, asked, some_results()[-1]]


def test_key_figures_come_first_and_the_best_attention_is_listed_first(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    record(info, journal, ranked_results())
    client = store.connect(sqlite)
    experiment = store.experiment_id(client, sqlite, "bench")
    listed = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert [run.info.run_name for run in listed[:3]] == ["msra", "window", "sdpa"]
    assert "mlflow.parentRunId" not in listed[3].data.tags
    msra, window, sdpa = listed[:3]
    assert dict(list(msra.data.metrics.items())[:3]) == {
        "1 speed-up 4k": 4.0,
        "4 lookup 4k": 0.5,
        "5 mqar 256 other settings": 0.75,
    }
    assert min(msra.data.metrics) == "1 speed-up 4k"
    assert window.data.metrics["1 speed-up 4k"] == 2.0
    assert sdpa.data.metrics["1 speed-up 4k"] == 1.0
    # MLflow draws the first parameter against the first metric.
    assert window.data.params == sdpa.data.params | {"attention": "window"}
    assert msra.data.params == {"attention": "msra", "config.window": "512", "config.rate": "8"}
    assert listed[3].data.metrics == {"speed-up 4k msra": 4.0, "speed-up 4k window": 2.0}
    commit, started = (listed[3].data.params[name] for name in ("commit", "started"))
    assert commit == info.commit[:10] and re.fullmatch(r"\d{4} \d\d:\d\d", started)
    folder = client.download_artifacts(msra.info.run_id, "settings.json")
    settings = {json.dumps(s["settings"]): s["cases"] for s in json.loads(Path(folder).read_text())}
    assert settings['{"window": 8}'] == ["recall/mqar/msra/N256/float32/training/cpu"]
    assert sum(len(cases) for cases in settings.values()) == 4


def test_name_of_a_metric() -> None:
    decode = Case("decode", "msra", 1024, "bfloat16", "decode")
    assert metric_name(decode, "time_s") == "decode.bfloat16.time_s"
    step = replace(decode, phase="forward+backward", task="code")
    assert metric_name(step, "time_s") == "forward_backward.bfloat16.code.time_s"


def test_defaults_are_no_parameters(sqlite: str, journal: Journal, info: RunInfo) -> None:
    config = MSRAConfig(causal=True).to_dict()
    record(info, journal, [replace(measured("msra", 1024), config=config)])
    _, (child,) = runs_of(sqlite, info)
    assert child.data.params == {"attention": "msra"}


def test_description_of_a_bench(sqlite: str, journal: Journal, info: RunInfo) -> None:
    record(info, journal, ranked_results())
    (parent,), children = runs_of(sqlite, info)
    ids = {run.info.run_name: run.info.run_id for run in children}
    note = parent.data.tags["mlflow.note.content"]
    rows = [line for line in note.splitlines() if line.startswith("|")]
    heads = ("attention", "speed-up 4k", "lookup 4k", "mqar 256 other settings")
    assert rows[0] == f"| {' | '.join(heads)} |"
    experiment = parent.info.experiment_id
    links = [f"[{name}](#/experiments/{experiment}/runs/{ids[name]})" for name in ids]
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows[2:]} == set(links)
    assert rows[2].endswith("| 4.00 | 50% | 75% |")
    assert f"[list them](#/experiments/{experiment}/runs?viewStateShareKey=danon)" in note
    assert f"[msra with sdpa]({compare_page(experiment, [ids['msra'], ids['sdpa']])})" in note
    assert "- xformers: unavailable, needs CUDA" in note
    for sentence in conclusions(ranked_results(), info):
        assert sentence in note
    tags = store.connect(sqlite).get_experiment(experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{info.run_id}"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`1 speed-up 4k`", False)
    assert view["searchFilter"].startswith(f"tags.`danon.run_id` = '{info.run_id}'")
    for key in ("danon", info.run_id):
        columns = json.loads(tags[f"mlflow.sharedViewState.{key}"])["selectedColumns"]
        assert columns[0] == "metrics.`1 speed-up 4k`"
    found = store.runs_where(store.connect(sqlite), [experiment], view["searchFilter"])
    assert {run.info.run_name for run in found} == set(ids)


def test_bench_of_quality_alone(info: RunInfo) -> None:
    def trained(attention: str, bits: float) -> CaseResult:
        case = Case("language", attention, 1024, "float32", "training", task="code")
        return CaseResult(case, "measured", metrics={"bits_per_byte": bits})

    results = [trained("sdpa", 2.5), trained("msra", 2.25)]
    figures = key_figures(results, info)
    assert figures.names == ["4 code bits per byte 1k"]
    assert figures.ranked == ("msra", "sdpa")
    assert figures.lower_is_better >= {*figures.names}
    assert "| msra | 2.250 |" in bench_note(results, info, figures, "1", {})
    assert key_figures([], info).names == []


def test_description_of_very_many_attentions(info: RunInfo) -> None:
    ratio = dict.fromkeys(("time_ratio", "time_ratio_low", "time_ratio_high"), 0.5)
    results = [measured(f"attention-{n}", 1024, **ratio) for n in range(300)]
    figures = key_figures(results, info)
    ids = {name: f"{n:032}" for n, name in enumerate(figures.ranked)}
    note = bench_note(results, info, figures, "1", ids)
    assert len(note) < 8000  # MLflow refuses more
    assert " more in the report." in note and "[the first 12](#/compare-runs?" in note
    assert note.endswith("`results.json` every figure.")


def test_outcomes_without_figures(sqlite: str, journal: Journal, info: RunInfo) -> None:
    def outcome(attention: str, status: Status, length: int = 1024) -> CaseResult:
        case = Case("speed", attention, length, "float32", "forward")
        return CaseResult(case, status, f"why {attention} is {status}")

    results = [
        outcome("absent", "unavailable"),
        outcome("slow", "over budget"),
        outcome("wrong", "failed"),
        outcome("partly", "over budget", 4096),
        measured("partly", 1024),
        measured("half", 1024),
        outcome("half", "failed", 4096),
    ]
    record(info, journal, results)
    (parent,), children = runs_of(sqlite, info)
    statuses = {run.info.run_name: run.info.status for run in children}
    assert statuses == {"wrong": "FAILED", "partly": "FINISHED", "half": "FAILED"}
    tags = {run.info.run_name: run.data.tags for run in children}
    assert tags["half"]["danon.reason"] == "why half is failed"
    assert tags["partly"]["danon.case.speed.forward.float32.N4096"].startswith("over budget: why")
    for name, status in (("absent", "unavailable"), ("slow", "over budget")):
        line = f"- {name}: {status}, why {name} is {status}"
        assert line in parent.data.tags["mlflow.note.content"]
    assert upload(journal.run_dir).startswith("0 of 7 cases were new")


def test_several_benches_in_one_store(sqlite: str, tmp_path: Path, info: RunInfo) -> None:
    runs = [replace(info, run_id=f"r{n}") for n in range(4)]
    for one in runs:
        record(one, Journal.create(tmp_path, one), [measured("sdpa", 1024)])
    client = store.connect(sqlite)
    assert list(experiments(sqlite)) == ["danon/bench"]
    everything = client.search_runs([store.experiment_id(client, sqlite, "bench")])
    assert len(everything) == 8
    assert sum("mlflow.parentRunId" not in run.data.tags for run in everything) == 4


def test_records_of_an_earlier_shape_stay_as_they_are(
    sqlite: str, journal: Journal, info: RunInfo
) -> None:
    client = store.connect(sqlite)
    old = store.experiment_id(client, sqlite, "speed")
    client.create_run(old, tags={"danon.run_id": info.run_id}, run_name=info.run_id)
    assert record(info, journal, some_results()).startswith("Recorded 6 cases")
    assert set(experiments(sqlite)) == {"danon/bench", "danon/speed"}
    (before,) = client.search_runs([old])
    assert (before.info.status, before.data.metrics) == ("RUNNING", {})
