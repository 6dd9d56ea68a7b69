"""Planned collectives equal those of trainings with two ranks, in number and bytes."""

from __future__ import annotations

from typing import Any

import pytest
from ranks_of_two import Case, Counts, run_case, run_ranks

from danon.planning import Mesh, ModelShape
from danon.planning.fake_devices import fake_ranks
from danon.planning.step_plan import Layout, Plan, Task, make_plan
from danon.planning.step_time import Rates

RATES = Rates(flops=1e12, link=1e9, node_link=1e10, node=8)


def shape(mechanism: str, length: int, width: int = 64) -> ModelShape:
    return ModelShape(
        layers=2,
        width=width,
        heads=4,
        kv_heads=2,
        vocab=251,  # no multiple of the ranks
        length=length,
        mechanism=mechanism,
    )


LONG = 2200
CASES = {
    "msra, nothing far": Case(shape("msra", 150), "fsdp"),
    "msra recomputed": Case(shape("msra", LONG), "fsdp", checkpointing=True, peak=True),
    "msra bf16": Case(shape("msra", LONG), "fsdp", dtype="bf16"),
    "ucsa, two passes": Case(shape("ucsa", LONG), "fsdp", passes=2),
    "msra ddp": Case(shape("msra", 150), "ddp"),
    "dala ddp, two passes": Case(shape("dala", LONG), "ddp", passes=2),
    "wide ddp": Case(shape("msra", 64, width=1024), "ddp"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    results = run_ranks(list(CASES.values()), tmp_path_factory.mktemp("ranks"))
    return dict(zip(CASES, results, strict=True))


def planned(case: Case, mesh: Mesh) -> Plan:
    task = Task(
        shape=case.shape,
        ranks=mesh.ranks,
        batch_tokens=mesh.readers * case.passes * case.shape.length,
        dtype=case.dtype,
        device_bytes=1e12,
        rates=RATES,
    )
    return make_plan(task, Layout(mesh=mesh, rows=1, checkpointing=case.checkpointing))


def counts(plan: Plan) -> Counts:
    return {each.kind: (each.count, each.bytes) for each in plan.communication}


def mesh_of(case: Case) -> Mesh:
    return Mesh(shard=2) if case.strategy == "fsdp" else Mesh(data=2)


@pytest.mark.parametrize("name", CASES)
def test_collectives_of_two_ranks(name: str, measured: dict[str, dict[str, Any]]) -> None:
    case = CASES[name]
    assert counts(planned(case, mesh_of(case))) == measured[name]["counts"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.peak])
def test_memory_of_a_rank(name: str, measured: dict[str, dict[str, Any]]) -> None:
    memory = planned(CASES[name], mesh_of(CASES[name])).memory
    together = memory.activations + memory.buffers
    assert together == pytest.approx(measured[name]["peak"], rel=0.05)


def test_copies_of_a_sharded_model() -> None:
    case = CASES["msra, nothing far"]
    with fake_ranks(8):
        real = run_case(case, replicas=2)["counts"]
    assert counts(planned(case, Mesh(data=2, shard=4))) == real


@pytest.mark.parametrize(
    ("mesh", "checkpointing", "expected"),
    [
        # 2 layers, 2 sums forward and 2 backward each; and 1 a layer for what attentions learn
        (Mesh(tensor=2), False, {("all-reduce", "tensor"): 8 + 2}),
        (Mesh(tensor=2), True, {("all-reduce", "tensor"): 12 + 2}),
        # a stage of a layer sends once a micro-batch; the embedding is summed once
        (Mesh(pipeline=2), False, {("send", "pipeline"): 1, ("all-reduce", "pipeline"): 1}),
        (
            Mesh(sequence=2),
            False,
            {
                ("all-gather", "shard x sequence"): 5,
                ("reduce-scatter", "shard x sequence"): 3,
                ("all-gather", "sequence"): 4,
                ("reduce-scatter", "sequence"): 4,
            },
        ),
    ],
    ids=str,
)
def test_counts_of_other_axes(
    mesh: Mesh, checkpointing: bool, expected: dict[tuple[str, str], int]
) -> None:
    plan = planned(Case(shape("msra", LONG), "fsdp", checkpointing=checkpointing), mesh)
    found: dict[tuple[str, str], int] = {}
    for each in plan.communication:
        key = each.kind, each.axis
        found[key] = found.get(key, 0) + each.count
    assert found == expected


def test_bytes_of_other_axes() -> None:
    wide = shape("msra", LONG)
    by_axis = {
        axis: planned(Case(wide, "fsdp"), Mesh(**{axis: 2})).communication
        for axis in ("tensor", "pipeline", "sequence")
    }
    stream = LONG * 64 * 4
    assert by_axis["tensor"][0].bytes == 8 * stream
    assert by_axis["pipeline"][0].bytes == stream + 4  # and the auxiliary loss
    assert by_axis["pipeline"][1].bytes == 251 * 64 * 4
    (keys,) = (c for c in by_axis["sequence"] if (c.kind, c.axis) == ("all-gather", "sequence"))
    assert keys.bytes == 2 * 2 * LONG * 2 * 16 * 4  # layers, keys and values, 2 heads of 16


def test_rates_by_the_place_of_the_ranks() -> None:
    inside = planned(Case(shape("msra", LONG), "fsdp"), Mesh(tensor=2)).communication[0]
    assert RATES.seconds(inside) == pytest.approx(2 * 0.5 * inside.bytes / 1e10)
    case = Case(shape("msra", LONG), "fsdp")
    gather, scatter = planned(case, Mesh(shard=16)).communication
    assert RATES.seconds(gather) == pytest.approx(15 / 16 * gather.bytes / 1e9)
    send = planned(case, Mesh(pipeline=2)).communication[0]
    assert RATES.seconds(send) == pytest.approx(send.bytes / 1e10)
