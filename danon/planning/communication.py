"""The collectives of a rank in a step: how often, and how many bytes.

The bytes of a collective are those of its whole tensor: what an all-gather makes, what a
reduce-scatter begins from, what an all-reduce adds up, and what is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from danon.config import UCSAConfig
from danon.planning.buffers import gathered_by_block, gathered_numbers
from danon.planning.held_stages import MASTER, Stage, padded_shard
from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape, TensorShape

__all__ = ["Collective", "Kind", "Pass", "collectives"]

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "send"]
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of DDP's first bucket of gradients, and of the others, as torch has them."""


@dataclass(frozen=True)
class Collective:
    """All uses of a collective for one purpose, in a step of one rank.

    Attributes:
        kind: of the collective.
        axis: axis of the mesh that it runs along.
        content: what is communicated.
        count: uses.
        bytes: of all uses.
        ranks: that take part.
        spread: neighbouring ranks that hold all that take part.
        waits: the computation waits for it; else it runs beside.
        once: it runs once a step; else with each micro-batch.
    """

    kind: Kind
    axis: str
    content: str
    count: int
    bytes: int
    ranks: int
    spread: int
    waits: bool
    once: bool = False


@dataclass(frozen=True)
class Pass:
    """A micro-batch of a rank, and how many there are in a step.

    Attributes:
        rows: sequences of a micro-batch.
        count: micro-batches of a step.
        checkpointing: blocks are recomputed in the backward pass.
        dtype: of the computation.
    """

    rows: int
    count: int
    checkpointing: bool
    dtype: torch.dtype


def collectives(
    stage: Stage, shape: ModelShape, mesh: Mesh, each: Pass, used: Iterable[str] | None = None
) -> list[Collective]:
    """Return what a rank communicates in a step.

    Args:
        stage: of the rank.
        shape: of the model.
        mesh: of the ranks.
        each: its micro-batches.
        used: names of a block's parameters that get a gradient; None: all.
    """
    found = [
        *_of_parameters(stage, shape, mesh, each, used),
        *_of_tensors(stage, shape, mesh, each),
        *_of_stages(stage, shape, mesh, each),
        *_of_sequences(stage, shape, mesh, each),
    ]
    return [collective for collective in found if collective.count]


def _of_parameters(
    stage: Stage, shape: ModelShape, mesh: Mesh, each: Pass, used: Iterable[str] | None
) -> Iterator[Collective]:
    """Yield the gathering of parameters and the reduction of gradients."""
    root, layers = stage.root_shapes(shape), stage.layers
    if mesh.holders == 1:
        if mesh.data > 1:
            blocks = list(shape.block_shapes(mesh.tensor).values()) * layers
            shapes = [*list(root.values())[:1], *blocks, *list(root.values())[1:]]
            size = MASTER * sum(map(math.prod, shapes))
            yield Collective(
                "all-reduce",
                "data",
                "gradients",
                _buckets(shapes) + 1,
                size + 4 * len(shapes),  # the last one says which parameters were used
                mesh.data,
                mesh.spread("data"),
                waits=True,
                once=True,
            )
        return
    trained = whole = gathered_by_block(shape, mesh.tensor, mesh.holders)
    if used is not None:
        blocks_of = shape.block_shapes(mesh.tensor)
        trained = gathered_numbers((blocks_of[name] for name in used), mesh.holders)
    outside = gathered_numbers(root.values(), mesh.holders)
    groups = layers + bool(root)
    where = ("shard x sequence" if mesh.sequence > 1 else "shard", mesh.holders)
    spread = mesh.spread("holders")
    yield Collective(
        "all-gather",
        where[0],
        "parameters",
        each.count * (layers + groups),
        each.count * (2 * layers * whole + outside) * each.dtype.itemsize,
        mesh.holders,
        spread,
        waits=False,
    )
    reduced = layers * trained + outside
    yield Collective(
        "reduce-scatter",
        where[0],
        "gradients",
        each.count * groups,
        each.count * reduced * MASTER,
        mesh.holders,
        spread,
        waits=False,
    )
    if mesh.data > 1:
        yield Collective(
            "all-reduce",
            "data",
            "gradients",
            groups,
            reduced // mesh.holders * MASTER,
            mesh.data,
            mesh.spread("data"),
            waits=True,
            once=True,
        )


def _buckets(shapes: Iterable[TensorShape]) -> int:
    """Count DDP's buckets, in the order of the parameters: each is full once it has its bytes."""
    count, filled, room = 0, 0, FIRST_BUCKET
    for shape in shapes:
        filled += MASTER * math.prod(shape)
        if filled >= room:
            count, filled, room = count + 1, 0, BUCKET
    return count + (filled > 0)


def _activations(shape: ModelShape, mesh: Mesh, each: Pass) -> int:
    """Return the bytes of the residual stream of a micro-batch."""
    return each.rows * shape.length // mesh.sequence * shape.width * each.dtype.itemsize


def _of_tensors(stage: Stage, shape: ModelShape, mesh: Mesh, each: Pass) -> Iterator[Collective]:
    """Yield the sums over ranks that share heads and inner width."""
    if mesh.tensor == 1:
        return
    ranks, spread = mesh.tensor, mesh.spread("tensor")
    count = each.count * stage.layers * (6 if each.checkpointing else 4)
    size = count * _activations(shape, mesh, each)
    yield Collective("all-reduce", "tensor", "activations", count, size, ranks, spread, waits=True)
    blocks = shape.block_shapes(mesh.tensor)
    learned = [x for name, x in blocks.items() if name.startswith("mixer.")]
    bytes_of = stage.layers * MASTER * sum(padded_shard(x, mesh.holders) for x in learned)
    yield Collective(
        "all-reduce",
        "tensor",
        "gradients of attentions",
        stage.layers,
        bytes_of,
        ranks,
        spread,
        waits=True,
        once=True,
    )


def _of_stages(stage: Stage, shape: ModelShape, mesh: Mesh, each: Pass) -> Iterator[Collective]:
    """Yield what goes to the stages before and after."""
    if mesh.pipeline == 1:
        return
    count = each.count * ((not stage.last) + (not stage.first))
    auxiliary = each.rows * MASTER  # one number a sequence
    size = count * (_activations(shape, mesh, each) + auxiliary)
    spread = mesh.spread("pipeline")
    yield Collective("send", "pipeline", "activations", count, size, 2, spread, waits=True)
    if stage.first or stage.last:
        embedding = MASTER * padded_shard((shape.vocab, shape.width), mesh.holders)
        yield Collective(
            "all-reduce",
            "pipeline",
            "gradient of the embedding",
            1,
            embedding,
            2,
            spread,
            waits=True,
            once=True,
        )


def _of_sequences(stage: Stage, shape: ModelShape, mesh: Mesh, each: Pass) -> Iterator[Collective]:
    """Yield keys and values that the ranks of a sequence give each other."""
    if mesh.sequence == 1:
        return
    ranks, spread = mesh.sequence, mesh.spread("sequence")
    again = 2 if each.checkpointing else 1
    keys = each.rows * shape.kv_heads // mesh.tensor * shape.length * shape.head_width
    size, blocks = 2 * keys * each.dtype.itemsize, each.count * stage.layers
    yield Collective(
        "all-gather",
        "sequence",
        "keys, values",
        2 * again * blocks,
        again * blocks * size,
        ranks,
        spread,
        waits=True,
    )
    yield Collective(
        "reduce-scatter",
        "sequence",
        "gradients of keys, values",
        2 * blocks,
        blocks * size,
        ranks,
        spread,
        waits=True,
    )
    if shape.mechanism in ("ucsa", "hybrid"):  # a hybrid may select UCSA
        numbers = each.rows * UCSAConfig.query_block * shape.width // mesh.tensor
        yield Collective(
            "send",
            "sequence",
            "queries that choose",
            again * blocks,
            again * blocks * numbers * each.dtype.itemsize,
            2,
            spread,
            waits=True,
        )
