"""results.json and samples.parquet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from recorded_cases import measured, some_results, two_texts

from danon.runs.export import write_results
from danon.runs.run_info import RunInfo


def test_results_json_and_samples_of_a_run(tmp_path: Path, info: RunInfo) -> None:
    results = [*some_results(), measured("nan", 1024, error_vs_dense=float("nan"))]
    write_results(results, info, tmp_path)
    first = (tmp_path / "results.json").read_bytes()
    write_results(results[::-1], info, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == first
    loaded = json.loads(first, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert loaded["schema"] == 1 and loaded["run"]["run_id"] == info.run_id
    assert len(loaded["results"]) == len(results)
    table = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(table) == 6 * 4
    mine = [r for r in table if r["attention"] == "sdpa" and r["length"] == 4096]
    assert [(r["side"], r["index"], r["seconds"]) for r in mine] == [
        ("candidate", 0, 0.1),
        ("candidate", 1, 0.2),
        ("reference", 0, 0.3),
        ("reference", 1, 0.25),
    ]
    assert {r["run_id"] for r in table} == {info.run_id}


def test_samples_of_a_training(tmp_path: Path, info: RunInfo) -> None:
    write_results([measured("sdpa", 1024), *two_texts()], info, tmp_path)
    table = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    tasks = {(row["suite"], row["task"], row["seconds"]) for row in table if row["index"] == 0}
    assert tasks == {
        ("speed", "", 0.1),
        ("speed", "", 0.3),
        ("language", "code", 40.0),
        ("language", "prose", 50.0),
    }


def test_sample_series_without_a_unit(tmp_path: Path, info: RunInfo) -> None:
    wrong = replace(measured("sdpa", 1024), samples={"candidate": [1.0]})
    with pytest.raises(ValueError, match="sample series 'candidate': must be seconds"):
        write_results([wrong], info, tmp_path)
