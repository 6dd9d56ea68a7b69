"""Planned bytes of parameters, gradients and optimizer equal those of models on fake devices."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from danon.models import Backbone
from danon.planning import Mesh, ModelShape, shape_for
from danon.planning.fake_devices import built_bytes, fake_ranks
from danon.planning.held_stages import HeldBytes, Stage, all_stages, distinct_stages

WORLDS = [8, 256, pytest.param(4096, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("parameters", [1e9, 1e10, 1e11, 1e12], ids=["1B", "10B", "100B", "1T"])
def test_sharded(parameters: float, world: int) -> None:
    shape, mesh = shape_for(parameters, length=8192), Mesh(shard=world)
    (stage,) = distinct_stages(shape.layers, 1)
    assert built_bytes(stage, shape, mesh) == stage.held(shape, mesh)


@pytest.mark.parametrize("mechanism", ["msra", "dala", "ucsa", "hybrid"])
@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=8),
        Mesh(data=2, shard=4),
        Mesh(tensor=4, pipeline=3, data=2),
        Mesh(data=2, shard=8, tensor=4, pipeline=3, sequence=2),
    ],
    ids=str,
)
def test_mixed_meshes(mesh: Mesh, mechanism: str) -> None:
    shape = shape_for(1e9, length=8192, mechanism=mechanism)
    for stage in distinct_stages(shape.layers, mesh.pipeline):
        assert built_bytes(stage, shape, mesh) == stage.held(shape, mesh)


def test_one_rank_holds_the_model() -> None:
    shape = ModelShape(layers=3, width=64, heads=4, kv_heads=2, vocab=100, length=512)
    model = Backbone(shape.config(), shape.mixer, "lm")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    parameters = sum(p.nbytes for p in model.parameters())
    (stage,) = distinct_stages(3, 1)
    assert stage.held(shape, Mesh()) == HeldBytes(parameters, parameters, states)


def test_stages_of_a_pipeline() -> None:
    assert [s.layers for s in all_stages(10, 4)] == [2, 3, 3, 2]
    assert [s.layers for s in all_stages(7, 4)] == [2, 2, 2, 1]
    assert [s.layers for s in all_stages(4, 4)] == [1, 1, 1, 1]
    assert distinct_stages(10, 4) == (Stage(0, 4, 2), Stage(1, 4, 3), Stage(3, 4, 2))
    assert distinct_stages(10, 2) == (Stage(0, 2, 5), Stage(1, 2, 5))
    assert distinct_stages(10, 1) == (Stage(0, 1, 10),)
    assert [s.in_flight(3) for s in all_stages(8, 4)] == [3, 3, 2, 1]


def test_process_group_that_is_there_already() -> None:
    with fake_ranks(2):
        shape = shape_for(1e9, length=8192)
        with pytest.raises(ValueError, match="process group is there already"):
            built_bytes(Stage(0, 1, 16), shape, Mesh(shard=2))
        assert dist.get_world_size() == 2
    assert not dist.is_initialized()
