"""Plans: what is found, what does not fit, how long a step takes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from danon.planning import Mesh, ModelShape, shape_for
from danon.planning.search import find_layout, find_rows
from danon.planning.step_plan import Layout, Task, default_batch, make_plan
from danon.planning.step_time import Rates, training_flops

RATES = Rates(flops=4e14, link=50e9, node_link=450e9, node=8)


def task(shape: ModelShape, ranks: int, **fields: object) -> Task:
    given = {
        "shape": shape,
        "ranks": ranks,
        "batch_tokens": default_batch(shape.length),
        "dtype": "bf16",
        "device_bytes": 80e9,
        "rates": RATES,
    }
    return Task(**{**given, **fields})  # type: ignore[arg-type]


SMALL = shape_for(1e8, length=2048, vocab=32_000)


def test_model_that_fits_one_device() -> None:
    plan = find_layout(task(SMALL, 1), None, None)
    assert plan.fits and plan.layout.mesh == Mesh() and not plan.layout.checkpointing
    assert plan.communication == () and plan.time.bubble == 0
    assert list(plan.time.shares()) == ["compute"]


def test_memory_decides_for_recomputation() -> None:
    small = task(SMALL, 1)
    free, repeated = (find_layout(small, None, each) for each in (False, True))
    assert repeated.memory.total < free.memory.total
    room = dataclasses.replace(small, device_bytes=repeated.memory.total * 1.01 / 0.9)
    plan = find_layout(room, None, None)
    assert plan.fits and plan.layout.checkpointing
    assert 1.1 * free.time.total < plan.time.total < 4 / 3 * free.time.total  # the head is not
    assert not find_layout(room, None, False).fits


def test_nothing_fits() -> None:
    big = task(shape_for(7e9, length=2048), 2, device_bytes=40e9)
    plan = find_layout(big, None, None)
    assert not plan.fits
    assert plan.memory.held.total > big.usable
    others = [find_rows(big, mesh, True) for mesh in (Mesh(data=2), Mesh(pipeline=2))]
    assert plan.memory.total <= min(each.memory.total for each in others)


def test_the_found_mesh_is_the_fastest_that_fits() -> None:
    asked = task(shape_for(7e9, length=2048), 8)
    best = find_layout(asked, None, None)
    assert best.fits
    for mesh in (Mesh(shard=8), Mesh(tensor=8), Mesh(shard=2, pipeline=4), Mesh(data=2, tensor=4)):
        other = find_rows(asked, mesh, None)
        assert not other.fits or other.time.total >= best.time.total * 0.999


def test_time_of_a_step_by_hand() -> None:
    asked = task(SMALL, 1)
    plan = make_plan(asked, Layout(mesh=Mesh(), rows=4, checkpointing=False))
    assert plan.time.total == pytest.approx(training_flops(SMALL, asked.sequences) / RATES.flops)


def test_bubble_of_a_pipeline() -> None:
    asked = task(SMALL, 4, batch_tokens=16 * 2048)
    plan = make_plan(asked, Layout(mesh=Mesh(pipeline=4), rows=1, checkpointing=False))
    busy = plan.time.total - plan.time.bubble
    assert plan.time.bubble == pytest.approx(busy * 3 / 16, rel=0.05)
    assert plan.memory.stage.number in (0, 3)


def test_ranks_share_the_work() -> None:
    one = make_plan(task(SMALL, 1), Layout(mesh=Mesh(), rows=1, checkpointing=False))
    for mesh in (Mesh(data=4), Mesh(shard=4), Mesh(sequence=4)):
        plan = make_plan(task(SMALL, 4), Layout(mesh=mesh, rows=1, checkpointing=False))
        assert plan.time.compute == pytest.approx(one.time.compute / 4)


def test_figures_as_json() -> None:
    plan = find_layout(task(SMALL, 8), [Mesh(shard=2, tensor=4)], True)
    figures = json.loads(json.dumps(plan.to_dict()))
    sizes = figures["bytes"]
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    assert sum(sizes[name] for name in parts) == sizes["total"]
    assert figures["mesh"] == {"data": 1, "shard": 2, "tensor": 4, "pipeline": 1, "sequence": 1}
    assert figures["model"]["parameters"] == SMALL.parameters
    assert sum(figures["step"]["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"batch_tokens": 3000}, ("batch_tokens = 3000", "multiple of the length 2048")),
        ({"batch_tokens": 1024}, ("batch_tokens = 1024",)),
        ({"dtype": "fp8"}, ("dtype = 'fp8'", "bf16, fp32")),
        ({"ranks": 0}, ("ranks = 0", "at least 1")),
    ],
)
def test_tasks_that_are_refused(fields: dict[str, object], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        task(SMALL, 1, **fields) if "ranks" not in fields else task(SMALL, 0)
    for part in parts:
        assert part in str(error.value)


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="rows = 3: must divide the 2048 sequences"):
        make_plan(task(SMALL, 1), Layout(mesh=Mesh(), rows=3, checkpointing=False))


def test_no_mesh() -> None:
    with pytest.raises(ValueError, match=r"no mesh spreads 12 layers .* over 37 ranks"):
        find_layout(task(SMALL, 37), None, None)


def test_default_batch() -> None:
    assert default_batch(8192) == 4 * 2**20
    assert default_batch(6000) == 6000 * 512
    assert default_batch(2**24) == 2**24
