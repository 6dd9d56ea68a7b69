"""The tables of docs/how-to/plan.md agree with plans, models on fake devices and measurements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks_of_two import Case, run_ranks
from test_activations import measured_peak, planned_peak
from test_communication import counts, mesh_of, planned

from danon.planning import Mesh, ModelShape, shape_for
from danon.planning.held_stages import distinct_stages

PAGE = (Path(__file__).parents[2] / "docs/how-to/plan.md").read_text(encoding="utf-8")
PARAMETERS = {"1B": 1e9, "10B": 1e10, "100B": 1e11, "1T": 1e12}
SIZES = {"layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "vocab": 1000, "length": 4096}


def table(heading: str) -> list[list[str]]:
    """Return the cells of the rows of a table, by the first cell of its heading."""
    (rows,) = re.findall(rf"^\| {heading} \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


@pytest.mark.parametrize("row", table("parameters"), ids=lambda row: row[0])
def test_held_bytes(row: list[str]) -> None:
    shape = shape_for(PARAMETERS[row[0]], length=8192)
    (stage,) = distinct_stages(shape.layers, 1)
    held = [stage.held(shape, Mesh(shard=ranks)).total for ranks in (8, 256, 4096)]
    assert row[1:] == [f"{size / 1e9:.3f}" for size in held]


@pytest.mark.parametrize("row", table("mechanism"), ids=lambda row: " ".join(row[:2]))
def test_planned_activations(row: list[str]) -> None:
    shape = ModelShape(**SIZES, mechanism=row[0])
    assert row[2] == f"{planned_peak(shape, checkpointing=row[1] == 'recomputed') / 1e6:.1f}"


@pytest.mark.slow
@pytest.mark.parametrize("row", table("mechanism"), ids=lambda row: " ".join(row[:2]))
def test_measured_activations(row: list[str]) -> None:
    shape = ModelShape(**SIZES, mechanism=row[0])
    peak = measured_peak(shape, checkpointing=row[1] == "recomputed")
    assert float(row[3]) == pytest.approx(peak / 1e6, rel=0.01)


def documented_case(training: str) -> Case:
    dtype = "bf16" if "bfloat16" in training else "fp32"
    return Case(ModelShape(**SIZES), "fsdp", dtype=dtype)


@pytest.mark.parametrize("row", table("training"), ids=lambda row: " ".join(row[:2]))
def test_planned_collectives(row: list[str]) -> None:
    case = documented_case(row[0])
    assert counts(planned(case, mesh_of(case)))[row[1]] == (int(row[2]), int(row[3]))


@pytest.mark.slow
def test_measured_collectives(tmp_path: Path) -> None:
    rows = table("training")
    trainings = list(dict.fromkeys(row[0] for row in rows))
    results = run_ranks([documented_case(name) for name in trainings], tmp_path)
    found = dict(zip(trainings, results, strict=True))
    for name, kind, times, size in rows:
        assert found[name]["counts"][kind] == (int(times), int(size))
