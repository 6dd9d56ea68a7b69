"""Meshes: what is read, what is refused, and which there are."""

from __future__ import annotations

import math

import pytest

from danon.planning import Mesh, shape_for
from danon.planning.mesh import AXES, all_meshes, mesh_of

SHAPE = shape_for(1e9, length=8192)


def test_reading() -> None:
    mesh = mesh_of("shard=64, tensor=8", 512)
    assert mesh == Mesh(shard=64, tensor=8) and mesh.ranks == 512
    assert mesh_of(str(mesh), 512) == mesh


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("shard=64", ("'shard=64'", "has 64 ranks, must have 8")),
        ("expert=8", ("'expert=8'", "data, shard, tensor, pipeline, sequence")),
        ("shard=8,shard=1", ("each axis once",)),
        ("shard=-8", ("shard = '-8'", "at least 1")),
        ("shard=x", ("shard = 'x'", "whole number")),
        ("shard", ("shard = ''", "whole number")),
        ("", ("must be AXIS=RANKS",)),
    ],
)
def test_texts_that_are_refused(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must") as error:
        mesh_of(text, 8)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (Mesh(pipeline=32), ("pipeline = 32 stages", "at most the 16 layers")),
        (Mesh(tensor=16), ("tensor = 16", "16 heads", "8 key/value heads")),
        (Mesh(sequence=3), ("sequence = 3", "divide the length 8192")),
        (Mesh(data=5), ("data * shard = 5", "divide the 64 sequences")),
        (Mesh(data=2), ("has 2 ranks, must have 7",)),
    ],
)
def test_meshes_that_are_refused(mesh: Mesh, parts: tuple[str, ...]) -> None:
    ranks = 7 if mesh == Mesh(data=2) else mesh.ranks
    with pytest.raises(ValueError, match="must") as error:
        mesh.check(SHAPE, ranks, 64)
    assert not mesh.fits(SHAPE, ranks, 64)
    for part in parts:
        assert part in str(error.value)


def test_axis_below_one() -> None:
    with pytest.raises(ValueError, match="data = 0: must be at least 1"):
        Mesh(data=0)


def test_all_meshes() -> None:
    found = list(all_meshes(SHAPE, 64, 16, node=4))
    assert len(found) == len(set(found))
    for mesh in found:
        assert mesh.ranks == 64 and mesh.tensor <= 4 and mesh.readers <= 16
    every = [
        Mesh(**dict(zip(AXES, sizes, strict=True)))
        for sizes in _factors(64, len(AXES))
        if sizes[2] <= 4
    ]
    assert set(found) == {mesh for mesh in every if mesh.fits(SHAPE, 64, 16)}


def _factors(number: int, count: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(number,)]
    return [
        (first, *rest)
        for first in range(1, number + 1)
        if number % first == 0
        for rest in _factors(number // first, count - 1)
    ]


def test_groups_of_neighbours() -> None:
    mesh = Mesh(data=2, shard=4, tensor=8, pipeline=3, sequence=5)
    spreads = [mesh.spread(x) for x in ("tensor", "sequence", "shard", "data", "pipeline")]
    assert spreads == [8, 40, 160, 320, 960]
    assert spreads[-1] == mesh.ranks == math.prod((2, 4, 8, 3, 5))
    assert mesh.spread("holders") == 160 and mesh.holders == 20 and mesh.readers == 8
